"""One call of a model without arithmetic, on the meta device: how often does each layer run?"""

import copy
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from ..masking.layers import WEIGHTED, densify, nm_layers
from .denoisers import each, example_inputs


def positions(
    model: nn.Module, inputs: Mapping[str, torch.Tensor] | None = None, observer: AbstractContextManager | None = None
) -> dict[str, int]:
    """How many positions (tokens, pixels) each linear, convolution or packed layer computes in one call, by name.

    Args:
        inputs: keyword arguments of the call; by default `denoisers.example_inputs(model)`.
        observer: a context to be active during the call.

    Raises:
        ValueError: no `inputs`, and a class or a config that does not tell what they would be.
    """
    found: dict[str, int] = {}

    def note(name: str, module: nn.Module, x: torch.Tensor, output: torch.Tensor) -> None:
        channels = -1 if len(_weight_shape(module)) == 2 else 1
        found[name] = found.get(name, 0) + output.numel() // output.shape[channels]

    _call(model, inputs, note, observer)
    return found


def input_shapes(model: nn.Module, inputs: Mapping[str, torch.Tensor] | None = None) -> dict[str, tuple[int, ...]]:
    """The shape of each layer's input in its last call; arguments as `positions`."""
    found: dict[str, tuple[int, ...]] = {}
    _call(model, inputs, lambda name, module, x, output: found.update({name: tuple(x.shape)}))
    return found


def _call(model: nn.Module, inputs, note: Callable, observer: AbstractContextManager | None = None) -> None:
    """Call a meta copy of the model, with `note(name, module, input, output)` after each layer."""
    guessed = not inputs
    inputs = each(lambda x: x.to("meta"), inputs or example_inputs(model))
    shadow = meta_copy(model)
    for name, module in shadow.named_modules():
        if isinstance(module, WEIGHTED) or hasattr(module, "weight_shape"):
            module.register_forward_hook(lambda module, args, output, name=name: note(name, module, args[0], output))
    try:
        with observer or nullcontext(), torch.no_grad():
            shadow(**inputs)
    except Exception as error:  # of any kind: a class that is not known may do anything with what it is not used to
        if not guessed:
            raise
        given = ", ".join(inputs)
        raise ValueError(f"{type(model).__name__} does not take {given} ({error}); pass inputs={{...}}") from error


def _weight_shape(layer: nn.Module) -> tuple[int, ...]:
    return layer.weight_shape if hasattr(layer, "weight_shape") else layer.weight.shape


def meta_copy(model: nn.Module) -> nn.Module:
    """A copy without storage; sparse-training layers become plain ones of the same shape."""
    memo = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        empty = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    shadow = copy.deepcopy(model, memo)
    return densify(shadow) if any(True for _ in nm_layers(shadow)) else shadow
