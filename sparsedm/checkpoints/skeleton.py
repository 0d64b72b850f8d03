"""From a config to a model: built without memory first, compared with the weights, then filled with them."""

import contextlib
import inspect
import math
import threading
from collections.abc import Iterable, Iterator, Mapping
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import torch
from diffusers import ModelMixin
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from ..pruning import structure
from .statedict import State

TABLES = 2**24  # numbers that a model may hold beside its weights, however small these are (position embeddings)
DENSER = 16  # times the weights: what a model with such tables may have been before it was pruned
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2)
NAMED = 3  # tensors in a message


def model_of(cls: type[ModelMixin], config: Mapping, pruning: structure.Record | None, weights: State) -> ModelMixin:
    """The model that `config` and the `pruning` record describe, for a state dict: its tensors take no memory yet, as a rule.

    Raises:
        ValueError: a setting of another type than the class takes, the class cannot be made of the config, it has many more
            tensors than `weights`, or the record does not fit.
    """
    _check_types(cls, config)
    _check_layers(config, len(weights))
    model = _built(cls, config, len(weights), "meta")
    numbers = sum(value.numel() for value in weights.values())
    tables = _has_tables(model)
    if tables and sum(x.numel() for x in _tensors_of(model)) > DENSER * numbers + TABLES:
        raise ValueError(f"its {cls.__name__} is many times as large as the weights")
    if tables:  # only the class itself can fill them
        model = _built(cls, config, len(weights), "cpu")
    if pruning is not None:
        if structure.extent(pruning) > 2 * numbers:  # each number is of one input and one output at most
            raise ValueError("the pruning record does not fit the weights: it keeps more channels than there are numbers")
        structure.apply(model, pruning)
    return model


def _check_types(cls: type[ModelMixin], config: Mapping) -> None:
    """Raise ValueError for a setting of plainly another type than the class takes, by its annotation and its default.

    Whole numbers are sizes and counts: below zero, many make a model of the same weights that fails at its first call.
    """
    try:
        hints = get_type_hints(cls.__init__)
    except (NameError, TypeError):  # annotations may name what is imported for type checkers alone
        hints = {}
    for name, parameter in inspect.signature(cls.__init__).parameters.items():
        if name in config and name in hints:
            kinds = _kinds(hints[name]) | _kinds(type(parameter.default))
            kinds -= {int} if float in kinds else set()
            if not _is_of(config[name], kinds):
                known = " or ".join(sorted(_KINDS[kind] for kind in kinds))
                raise ValueError(f"{name} is {str(config[name])[:40]!r}, but {cls.__name__} takes {known}")
            if int in kinds and _negative(config[name]) and not _negative(parameter.default):
                raise ValueError(f"{name} is {config[name]}, but {cls.__name__} takes no negative number there")


def _negative(value: Any) -> bool:
    """Whether a whole number, or one in a list, is below zero."""
    if isinstance(value, (list, tuple)):
        return any(map(_negative, value))
    return type(value) is int and value < 0


_KINDS = {
    bool: "true or false", int: "a whole number", float: "a finite number", str: "text", list: "a list", dict: "an object",
    NoneType: "null",
}  # fmt: skip


def _kinds(hint: Any) -> set[type]:
    """The types in an annotation, without those of elements, as JSON has them; `object` for any other type."""
    origin = get_origin(hint) or hint
    if origin in (Union, UnionType):
        return set().union(*map(_kinds, get_args(hint)))
    kind = list if origin is tuple else origin
    return {kind} if kind in _KINDS else {object}


def _is_of(value: Any, kinds: set[type]) -> bool:
    """Whether a value of a config may be meant as one of `kinds`; null and false stand for "none" where there is a choice."""
    if object in kinds:
        return True
    if value is None or value is False:
        return bool in kinds or len(kinds) > 1
    if isinstance(value, float):
        return float in kinds and math.isfinite(value) or int in kinds and value.is_integer()
    if type(value) is int:
        return bool(kinds & {int, float}) or (bool in kinds and value in (0, 1))
    return type(value) in kinds


def _check_layers(config: Mapping, tensors: int) -> None:
    """Raise ValueError for more layers than weights: some classes make lists of that length before they make a layer."""
    for key, value in config.items():
        if ("layers" in key or "depth" in key) and isinstance(value, int) and value > tensors:
            raise ValueError(f"{key} is {str(value)[:20]}, but there are {tensors} weights")


def _built(cls: type[ModelMixin], config: Mapping, tensors: int, device: str) -> ModelMixin:
    try:
        with _at_most(2 * tensors + 100), torch.device(device), _Unfilled() if device == "meta" else contextlib.nullcontext():
            return cls.from_config(config)
    except Exception as error:  # of any kind: a class may do anything with values that it does not expect
        raise ValueError(f"no {cls.__name__} can be made of it ({str(error) or repr(error)})"[:500]) from error


class _Unfilled(TorchFunctionMode):
    """Within this context initial values are not drawn: drawing takes a third of the time, and the weights replace the values."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", None) == torch.nn.init.__name__:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _at_most(limit: int) -> Iterator[None]:
    """Within this context the modules that this thread makes may get `limit` parameters; one more raises ValueError."""
    made, thread = 0, threading.get_ident()

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal made
        made += parameter is not None and threading.get_ident() == thread
        if made > limit:
            raise ValueError(f"it has more than {limit} parameters, many more than there are weights")

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def _has_tables(model: nn.Module) -> bool:
    """Whether `model` holds tensors that are not in its state dict."""
    stored = {id(value) for value in model.state_dict(keep_vars=True).values()}
    return any(id(tensor) not in stored for tensor in _tensors_of(model))


def _tensors_of(model: nn.Module) -> Iterator[torch.Tensor]:
    """All tensors of a model: parameters, buffers and attributes, also the tensors in containers."""
    for module in model.modules():
        yield from _tensors(list(vars(module).values()))


def _tensors(values: Iterable) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (dict, list, tuple)):
            yield from _tensors(dict.values(value) if isinstance(value, dict) else value)  # a config may have an entry "values"


def misfits(model: nn.Module, weights: State) -> str:
    """In words, which of the weights do not fit `model`; "" if all fit."""
    expected = model.state_dict()
    reasons = [f"{name} is missing" for name in expected if name not in weights]
    reasons += [f"{name} is not of the model" for name in weights if name not in expected]
    reasons += [text for name, value in expected.items() if name in weights and (text := _misfit(name, weights[name], value))]
    return "; ".join(reasons[:NAMED]) + (f"; and {len(reasons) - NAMED} more" if len(reasons) > NAMED else "")


def _misfit(name: str, value: torch.Tensor, expected: torch.Tensor) -> str:
    if value.shape != expected.shape:
        return f"{name} has shape {list(value.shape)}, not {list(expected.shape)}"
    fits = value.dtype in FLOATS if expected.is_floating_point() else value.dtype == expected.dtype
    return "" if fits else f"{name} is of {value.dtype}, not {expected.dtype}"


def fill(model: nn.Module, weights: State) -> None:
    """Give `model` the weights, in float32; the weights must have no `misfits`.

    Raises:
        ValueError: a tensor holds NaN or infinity, by name.
    """
    model.load_state_dict({name: _in_memory(name, value) for name, value in weights.items()}, assign=True)


def _in_memory(name: str, value: torch.Tensor) -> torch.Tensor:
    """A copy, because a tensor of a file is mapped from it, with the strides of a fresh tensor: kernels are chosen by them."""
    dtype = torch.float32 if value.is_floating_point() else value.dtype
    copy = torch.empty(value.shape, dtype=dtype, device=value.device).copy_(value)
    if copy.is_floating_point() and not is_finite(copy):
        raise ValueError(f"{name} holds {copy[~copy.isfinite()][0]:g}")
    return copy


def is_finite(value: torch.Tensor) -> bool:
    """Whether no number is NaN or infinite; a finite sum tells it much faster than looking at each."""
    return math.isfinite(value.sum()) or bool(value.isfinite().all())
