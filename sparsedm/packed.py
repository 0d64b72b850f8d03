"""Packed layers: N:M weights without their zeros, run by kernels that never load them. For inference.

`pack` replaces the layers of a folded (or sparse-training) model that run faster so on this machine, `unpack` puts plain
layers back, bit for bit. `sparsedm.report` tells which layers are packed, and why the others are not.
"""

import copy
import functools

import torch
from torch import nn

from . import dryrun, kernels, latency, layers, nm, packing
from .nm import NMPattern

BACKENDS = ("auto", "kernel")
FASTER = 1.1  # "auto" packs a layer whose kernel beats the dense one by this: short timings are noisy
WHOLE_FASTER = 1.03  # and keeps a model packed that gains this much as a whole


class _PackedLayer(nn.Module):
    """What the packed layers share: buffers `values` and `positions` of the weight [out, in, ...], and `bias` [out] or None."""

    def __init__(self, plain: nn.Linear | nn.Conv2d, pattern: NMPattern | str):
        super().__init__()
        self.pattern, self.weight_shape = NMPattern.parse(pattern), tuple(plain.weight.shape)
        values, positions = packing.pack(plain.weight, self.pattern)
        self.register_buffer("values", values)
        self.register_buffer("positions", positions)
        self.register_buffer("bias", None if plain.bias is None else plain.bias.detach().clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError("packed layers have no gradient: sample under torch.no_grad(), or train before sparsedm.pack")
        # Compilers and the meta device need the operators; without them a call takes some microseconds less.
        traced = x.device.type != "cpu" or torch.compiler.is_compiling()
        return self._run(torch.ops.sparsedm if traced else kernels, x.float()).to(x.dtype)  # in float32 under autocast too

    def dense_weight(self) -> torch.Tensor:
        """The weight [out, in, ...] with its zeros."""
        return packing.unpack(self.values, self.positions, self.pattern, self.weight_shape)

    def extra_repr(self) -> str:
        return f"{'x'.join(map(str, self.weight_shape))}, pattern={self.pattern}, bias={self.bias is not None}"


class PackedLinear(_PackedLayer):
    """`nn.Linear` with a packed weight."""

    def __init__(self, plain: nn.Linear, pattern: NMPattern | str):
        super().__init__(plain, pattern)
        self.in_features, self.out_features = plain.in_features, plain.out_features

    def _run(self, operators, x: torch.Tensor) -> torch.Tensor:
        return operators.nm4_linear(x, self.values, self.positions, self.bias)

    def plain(self) -> nn.Linear:
        """The same layer unpacked."""
        return _with_weights(nn.Linear(self.in_features, self.out_features, self.bias is not None), self)


class PackedConv2d(_PackedLayer):
    """`nn.Conv2d` with a packed weight; one stride and zero padding for both axes."""

    def __init__(self, plain: nn.Conv2d, pattern: NMPattern | str):
        super().__init__(plain, pattern)
        self.kernel_size, self.stride, self.padding = plain.kernel_size, plain.stride, plain.padding

    def _run(self, operators, x: torch.Tensor) -> torch.Tensor:
        kernel, stride, padding = list(self.kernel_size), self.stride[0], self.padding[0]
        return operators.nm4_conv2d(x, self.values, self.positions, self.bias, kernel, stride, padding)

    def plain(self) -> nn.Conv2d:
        """The same layer unpacked."""
        outputs, inputs = self.weight_shape[:2]
        conv = nn.Conv2d(inputs, outputs, self.kernel_size, self.stride, self.padding, bias=self.bias is not None)
        return _with_weights(conv, self)


def _with_weights(plain: nn.Module, packed: _PackedLayer) -> nn.Module:
    plain.to(packed.values.device, packed.values.dtype)
    with torch.no_grad():
        plain.weight.copy_(packed.dense_weight())
        if packed.bias is not None:
            plain.bias.copy_(packed.bias)
    return plain.eval()


def pack(model: nn.Module, *, backend: str = "auto", batch: int = 4, inputs: dict[str, torch.Tensor] | None = None) -> nn.Module:
    """Pack layers of `model` in place; returns the model, folded and in eval mode.

    Args:
        backend: "auto" times every distinct layer against its dense form, with the inputs that `batch` pictures give it, and
            keeps the faster, and the whole model likewise; "kernel" packs all that a kernel serves.
        inputs: of one call on one picture, for models whose config does not tell their shapes.

    Raises:
        ValueError: unknown backend, or a model with no N:M sparse layer.
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; known: {', '.join(BACKENDS)}")
    layers.fold(model).eval()
    patterns = layers.patterns(model)
    if not patterns:
        raise ValueError(f"{type(model).__name__} has no N:M sparse layer to pack; sparsify and fold it first")
    auto = backend == "auto"
    shapes = dryrun.input_shapes(model, inputs) if auto else {}
    plain = copy.deepcopy(model) if auto else None
    for name, pattern in patterns.items():
        module = model.get_submodule(name)
        reason = why_not(module, pattern)
        if not reason and name in shapes:
            gain = _measured_gain(_key(module), pattern, (batch, *shapes[name][1:]), torch.get_num_threads())
            reason = "" if gain >= FASTER else f"its packed kernel is no faster here ({gain:.2f}x)"
        module.dense_reason = reason
        if not reason:
            _replace(model, name, _PACKED_CLASS[type(module)](module, pattern))
    if auto and any(map(is_packed, model.modules())):
        _unpack_if_slower(model, plain, inputs or dryrun.example_inputs(model, batch))
    return model


def _unpack_if_slower(model: nn.Module, plain: nn.Module, inputs: dict[str, torch.Tensor], rounds: int = 7) -> None:
    """Layers that win alone may lose together: caches are cold within a model, and small layers cost overhead."""
    with torch.no_grad():
        timings = latency.interleaved({"dense": lambda: plain(**inputs), "packed": lambda: model(**inputs)}, rounds=rounds)
    gain = latency.ratio(timings, "dense", "packed")
    if gain < WHOLE_FASTER:
        names = [name for name, module in model.named_modules() if is_packed(module)]
        unpack(model)
        for name in names:
            model.get_submodule(name).dense_reason = f"the whole model is no faster packed ({gain:.2f}x)"


_PACKED_CLASS = {nn.Linear: PackedLinear, nn.Conv2d: PackedConv2d}


def why_not(module: nn.Module, pattern: NMPattern) -> str:
    """Why no kernel serves this layer, or ""."""
    weight = module.weight
    if type(module) not in _PACKED_CLASS:
        return f"no packed kernel for {type(module).__name__}"
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return f"no packed kernel for {weight.dtype} on {weight.device.type}"
    if pattern.m != 4 or weight.shape[1] % 4 or not kernels.serves(weight[0].numel(), pattern.n):
        return f"no packed kernel for {pattern} with {weight.shape[1]} inputs"
    if isinstance(module, nn.Conv2d) and not _plain_convolution(module):
        return "no packed kernel for grouped, dilated, padded or strided in other ways than zeros and one number"
    return "" if kernels.available() else "no C++ compiler for the packed kernels"


def _plain_convolution(conv: nn.Conv2d) -> bool:
    one_number = not isinstance(conv.padding, str) and len(set(conv.stride)) == len(set(conv.padding)) == 1
    return conv.groups == 1 and set(conv.dilation) == {1} and conv.padding_mode == "zeros" and one_number


def _key(module: nn.Linear | nn.Conv2d) -> tuple:
    """What tells two layers apart for timing."""
    if isinstance(module, nn.Linear):
        return nn.Linear, module.in_features, module.out_features
    return nn.Conv2d, module.in_channels, module.out_channels, module.kernel_size, module.stride, module.padding


@functools.cache
def _measured_gain(key: tuple, pattern: NMPattern, shape: tuple[int, ...], threads: int, rounds: int = 9) -> float:
    """Time of the dense layer over that of the packed one, for x of `shape` on this machine with `threads`."""
    cls, *sizes = key
    dense = cls(*sizes)
    with torch.no_grad():
        dense.weight.copy_(nm.masked(dense.weight, nm.mask(dense.weight, pattern)))
        packed, x = _PACKED_CLASS[cls](dense, pattern), torch.randn(shape)
        timings = latency.interleaved({"dense": lambda: dense(x), "packed": lambda: packed(x)}, rounds=rounds)
    return latency.ratio(timings, "dense", "packed")


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def unpack(model: nn.Module) -> nn.Module:
    """Back to plain layers with the same weights, bit for bit, in place; returns the model."""
    for name, module in [(n, m) for n, m in model.named_modules() if isinstance(m, _PackedLayer)]:
        _replace(model, name, module.plain())
    return model


def is_packed(module: nn.Module) -> bool:
    """Whether `module` is a packed layer."""
    return isinstance(module, _PackedLayer)
