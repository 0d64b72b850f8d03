"""One call of a model to see how often each layer runs, and on what: without arithmetic, on the meta device, where that works."""

import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..masking.layers import NEVER_CALLED, TRANSPOSED, WEIGHTED, densify, is_sparse, weight_layers
from .denoisers import each, example_inputs


def positions(
    model: nn.Module, inputs: Mapping[str, torch.Tensor] | None = None, observer: AbstractContextManager | None = None
) -> dict[str, int]:
    """How many positions (tokens, pixels) each linear, convolution or packed layer computes in one call, by name.

    Those of a transposed convolution are the pixels that it reads.

    Args:
        inputs: keyword arguments of the call; by default `denoisers.example_inputs(model)`. With `inputs`, a model that does
            not run on the meta device, as it computes with the values of its tensors, is called for real.
        observer: a context to be active during the call; entered anew it must begin anew.

    Raises:
        ValueError: no `inputs`, and a class or a config that does not tell what they would be.
    """

    def run(shadow: nn.Module, inputs: Mapping) -> dict[str, int]:
        found: dict[str, int] = {}

        def watch(name: str, layer: nn.Module, forward: Callable, input: torch.Tensor, *args, **kwargs) -> torch.Tensor:
            output = forward(input, *args, **kwargs)
            seen = input if isinstance(layer, TRANSPOSED) else output
            axes = len(layer.weight.shape)
            found[name] = found.get(name, 0) + seen.numel() // seen.shape[-1 if axes == 2 else 1 - axes]
            return output

        _wrap_layers(shadow, watch)
        with observer or nullcontext():
            shadow(**inputs)
        return found

    return _dry(model, inputs, run)


def input_shapes(model: nn.Module, inputs: Mapping[str, torch.Tensor] | None = None) -> dict[str, tuple[int, ...]]:
    """The shape of each layer's input in its last call; arguments as `positions`."""

    def run(shadow: nn.Module, inputs: Mapping) -> dict[str, tuple[int, ...]]:
        found: dict[str, tuple[int, ...]] = {}

        def watch(name: str, layer: nn.Module, forward: Callable, input: torch.Tensor, *args, **kwargs) -> torch.Tensor:
            found[name] = tuple(input.shape)
            return forward(input, *args, **kwargs)

        _wrap_layers(shadow, watch)
        shadow(**inputs)
        return found

    return _dry(model, inputs, run)


def bypassed(model: nn.Module, inputs: Mapping[str, torch.Tensor] | None = None) -> dict[str, str]:
    """The layers whose forward is not all that uses their weight in one call, and why; arguments as `positions`.

    A mask in their forward would not hold elsewhere: `F.linear(x, self.layer.weight)`, `F.multi_head_attention_forward`.
    """

    def run(shadow: nn.Module, inputs: Mapping) -> dict[str, str]:
        layers = dict(weight_layers(shadow))
        called, readers = set(), _OutsideReads(layers)

        def watch(name: str, layer: nn.Module, forward: Callable, *args, **kwargs) -> torch.Tensor:
            called.add(name)
            with readers.within(name):
                return forward(*args, **kwargs)

        _wrap_layers(shadow, watch)
        with readers:
            shadow(**inputs)
        elsewhere = dict.fromkeys(readers.found & called, "its weight is used outside of its forward, too")
        return elsewhere | dict.fromkeys(layers.keys() - called, NEVER_CALLED)

    return _dry(model, inputs, run)


class _OutsideReads(TorchDispatchMode):
    """Finds the layers whose weights are computed with while their forward does not run."""

    def __init__(self, layers: Mapping[str, nn.Module]):
        super().__init__()
        self.found: set[str] = set()
        self._names = {_storage(layer.weight): name for name, layer in layers.items()}
        self._running: list[str] = []

    @contextmanager
    def within(self, name: str) -> Iterator[None]:
        self._running.append(name)
        yield
        self._running.pop()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made_alike = func.overloadpacket.__name__.startswith("new_") or func.overloadpacket.__name__.endswith("_like")
        if not made_alike:  # which read dtype, device and shape alone
            tensors = (x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor))
            self.found |= {self._names.get(_storage(x), "") for x in tensors} - {"", *self._running}
        return func(*args, **(kwargs or {}))


def _storage(tensor: torch.Tensor) -> int:
    """What a tensor has in common with its views and with `tensor.data`."""
    return tensor.untyped_storage()._cdata


def _dry(model: nn.Module, inputs: Mapping | None, run: Callable[[nn.Module, Mapping], Any]) -> Any:
    """`run(shadow, inputs)` on meta copies; where that fails, and `inputs` are given, with the values of the tensors.

    The shadow is the model in eval mode with other module objects, sparse-training layers as plain ones.
    """
    guessed = not inputs
    inputs = inputs or example_inputs(model)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            return run(meta_copy(model).eval(), each(lambda x: x.to("meta"), inputs))
        except Exception as error:  # of any kind: a class that is not known may do anything with what it is not used to
            if guessed:
                given = ", ".join(inputs)
                raise ValueError(f"{type(model).__name__} does not take {given} ({error}); pass inputs={{...}}") from error
            if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
                raise
        return run(_plain(structure_of(model)).eval(), inputs)


def _wrap_layers(shadow: nn.Module, watch: Callable) -> None:
    """Let `watch(name, layer, forward, *args, **kwargs)` stand for the forward of each linear, convolution or packed layer."""
    for name, module in shadow.named_modules():
        if isinstance(module, WEIGHTED) or hasattr(module, "weight_shape"):
            module.forward = functools.partial(watch, name, module, module.forward)


def meta_copy(model: nn.Module) -> nn.Module:
    """A copy without storage; sparse-training layers become plain ones of the same shape."""

    def empty(tensor: torch.Tensor) -> torch.Tensor:
        made = torch.empty_like(tensor, device="meta")
        return nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made

    return _plain(structure_of(model, empty))


def structure_of(model: nn.Module, tensor: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor) -> nn.Module:
    """A copy of the modules whose parameters and buffers are `tensor(those of the model)`: by default the very same."""
    return copy.deepcopy(model, {id(each): tensor(each) for each in (*model.parameters(), *model.buffers())})


def _plain(model: nn.Module) -> nn.Module:
    return densify(model) if is_sparse(model) else model
