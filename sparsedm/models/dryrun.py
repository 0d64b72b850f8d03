"""A dry run: one call of a model that shows how often each layer runs, and on which shapes; on the meta device where possible."""

import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..masking.layers import NEVER_CALLED, densify, is_sparse
from ..masking.plain import TRANSPOSED, WEIGHTED, weight_layers
from .denoisers import each, example_inputs


def positions(
    model: nn.Module, inputs: Mapping[str, torch.Tensor] | None = None, observer: AbstractContextManager | None = None
) -> dict[str, int]:
    """How many positions (tokens, pixels) each linear, convolution or packed layer computes in one call, by name.

    For a transposed convolution the pixels of its input are counted.

    Args:
        inputs: keyword arguments of the call; by default `denoisers.example_inputs(model)`. With `inputs`, a model that does
            not run on the meta device, because it computes with the values of its tensors, is called for real.
        observer: a context that is active during the call; each time it is entered it must begin anew.

    Raises:
        ValueError: no `inputs`, and a class or a config from which they cannot be made.
    """

    def run(shadow: nn.Module, inputs: Mapping) -> dict[str, int]:
        counts: dict[str, int] = {}

        def watch(name: str, layer: nn.Module, forward: Callable, input: torch.Tensor, *args, **kwargs) -> torch.Tensor:
            output = forward(input, *args, **kwargs)
            counted = input if isinstance(layer, TRANSPOSED) else output
            axes = len(layer.weight.shape)
            counts[name] = counts.get(name, 0) + counted.numel() // counted.shape[-1 if axes == 2 else 1 - axes]
            return output

        _wrap_layers(shadow, watch)
        with observer or nullcontext():
            shadow(**inputs)
        return counts

    return _dry(model, inputs, run)


def input_shapes(model: nn.Module, inputs: Mapping[str, torch.Tensor] | None = None) -> dict[str, tuple[int, ...]]:
    """The shape of each layer's input in its last call; arguments as `positions`."""

    def run(shadow: nn.Module, inputs: Mapping) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}

        def watch(name: str, layer: nn.Module, forward: Callable, input: torch.Tensor, *args, **kwargs) -> torch.Tensor:
            shapes[name] = tuple(input.shape)
            return forward(input, *args, **kwargs)

        _wrap_layers(shadow, watch)
        shadow(**inputs)
        return shapes

    return _dry(model, inputs, run)


def bypassed(model: nn.Module, inputs: Mapping[str, torch.Tensor] | None = None) -> dict[str, str]:
    """The layers whose weight one call uses outside of their forward, and why; arguments as `positions`.

    A mask in the forward would not reach such a use: `F.linear(x, self.layer.weight)`, `F.multi_head_attention_forward`.
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
        elsewhere = dict.fromkeys(readers.names & called, "its weight is used outside of its forward, too")
        return elsewhere | dict.fromkeys(layers.keys() - called, NEVER_CALLED)

    return _dry(model, inputs, run)


class _OutsideReads(TorchDispatchMode):
    """Collects in `names` the layers whose weights are computed with while their forward does not run."""

    def __init__(self, layers: Mapping[str, nn.Module]):
        super().__init__()
        self.names: set[str] = set()
        self._name_of = {_storage(layer.weight): name for name, layer in layers.items()}
        self._running: list[str] = []

    @contextmanager
    def within(self, name: str) -> Iterator[None]:
        self._running.append(name)
        yield
        self._running.pop()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if not name.startswith("new_") and not name.endswith("_like"):  # these read dtype, device and shape alone
            tensors = (x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor))
            self.names |= {self._name_of.get(_storage(x), "") for x in tensors} - {"", *self._running}
        return func(*args, **(kwargs or {}))


def _storage(tensor: torch.Tensor) -> int:
    """A number that a tensor has in common with its views and with `tensor.data`."""
    return tensor.untyped_storage()._cdata


def _dry(model: nn.Module, inputs: Mapping | None, run: Callable[[nn.Module, Mapping], Any]) -> Any:
    """`run(shadow, inputs)` on meta copies; where that fails, and the caller gave `inputs`, with the values of the tensors.

    The shadow is a copy of the model's modules in eval mode, with plain layers in the place of sparse-training layers.
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
        try:
            return run(_plain(structure_of(model, _frozen)).eval(), inputs)
        except Exception as error:
            if "flex_attention" not in repr(error) and not type(error).__module__.startswith("torch._dynamo"):
                raise
            name, remedy = type(model).__name__, "sparsify it without inputs= and train it instead of calibrating it"
            raise ValueError(f"{name} computes with flex attention, which no dry run can follow; {remedy}") from error


def _frozen(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself for a shadow of the model: flop counters do not take parameters that want gradients as arguments."""
    return nn.Parameter(tensor.detach(), requires_grad=False) if isinstance(tensor, nn.Parameter) else tensor


def _wrap_layers(shadow: nn.Module, watch: Callable) -> None:
    """Let `watch(name, layer, forward, *args, **kwargs)` stand for the forward of each linear, convolution or packed layer."""
    for name, module in shadow.named_modules():
        if isinstance(module, WEIGHTED) or hasattr(module, "weight_shape"):
            module.forward = functools.partial(watch, name, module, module.forward)


def meta_copy(model: nn.Module) -> nn.Module:
    """A copy of the model without storage; sparse-training layers become plain layers of the same shape."""

    def empty(tensor: torch.Tensor) -> torch.Tensor:
        meta = torch.empty_like(tensor, device="meta")
        return nn.Parameter(meta, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else meta

    return _plain(structure_of(model, empty))


def structure_of(model: nn.Module, tensor: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor) -> nn.Module:
    """A copy of the modules, with `tensor(x)` for every parameter and buffer x of the model: by default x itself."""
    return copy.deepcopy(model, {id(x): tensor(x) for x in (*model.parameters(), *model.buffers())})


def _plain(model: nn.Module) -> nn.Module:
    return densify(model) if is_sparse(model) else model
