"""Packed layers: N:M weights without their zeros, run by kernels that never load them. For inference.

`pack` replaces the layers of a folded (or sparse-training) model that run faster so on this machine, `unpack` puts plain
layers back, bit for bit. `sparsedm.report` tells which layers are packed, and why the others are not.
"""

import copy
import functools
import math
import zlib

import torch
from torch import nn

from ..masking import layers, nm
from ..masking.nm import NMPattern
from ..models import dryrun
from ..models.denoisers import Inputs, each, example_inputs
from . import gpu, kernels, tensors, tuning
from .gpu import SemiStructuredLayer

BACKENDS = ("auto", "kernel")
FASTER = 1.02  # "auto" packs a layer whose kernel is faster by this: it saves memory, too
WHOLE_FASTER = 1.03  # and keeps a model packed that gains this much as a whole
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class _PackedLayer(nn.Module):
    """What the packed layers share: buffers `values` and `positions` of the weight [out, in, ...], and `bias` [out] or None."""

    def __init__(self, plain: nn.Linear | nn.Conv2d, pattern: NMPattern | str):
        super().__init__()
        self.pattern, self.weight_shape = NMPattern.parse(pattern), tuple(plain.weight.shape)
        values, positions = tensors.pack(plain.weight, self.pattern)
        self.register_buffer("values", values)
        self.register_buffer("positions", positions)
        self.register_buffer("bias", None if plain.bias is None else plain.bias.detach().clone())
        self.times: tuning.Times | None = None  # what "auto" measured
        self._choose_kernel()

    def _choose_kernel(self) -> None:
        inputs, outputs = math.prod(self.weight_shape[1:]), self.weight_shape[0]
        self._bfloat = not kernels.why_not(inputs, outputs, self.pattern.n, torch.bfloat16)

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._choose_kernel()  # the layer may come from another machine

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError("packed layers have no gradient: sample under torch.no_grad(), or train before sparsedm.pack")
        axis, inputs = self._channels, self.weight_shape[1]
        if x.dim() < -axis or x.shape[axis] != inputs:
            raise ValueError(f"{type(self).__name__} takes {inputs} inputs along axis {axis}, not x {list(x.shape)}")
        if x.dtype not in _DTYPES:
            raise ValueError(f"{type(self).__name__} takes float32, bfloat16 or float16, not {x.dtype}")
        values, bias, device = self.values, self.bias, x.device.type
        autocast = device != "meta" and torch.is_autocast_enabled(device)
        wanted = torch.get_autocast_dtype(device) if autocast else values.dtype
        dtype = torch.bfloat16 if wanted == torch.bfloat16 and self._bfloat else torch.float32  # that for float16, too
        bias = None if bias is None else bias.to(dtype)
        y = self._run(x.to(dtype), values.to(dtype), bias)
        return y.to(wanted if autocast else x.dtype)

    def dense_weight(self) -> torch.Tensor:
        """The weight [out, in, ...] with its zeros."""
        return tensors.unpack(self.values, self.positions, self.pattern, self.weight_shape)

    def extra_repr(self) -> str:
        return f"{'x'.join(map(str, self.weight_shape))}, pattern={self.pattern}, bias={self.bias is not None}"


class PackedLinear(_PackedLayer):
    """`nn.Linear` with a packed weight."""

    _channels = -1

    def __init__(self, plain: nn.Linear, pattern: NMPattern | str):
        super().__init__(plain, pattern)
        self.in_features, self.out_features = plain.in_features, plain.out_features

    def _run(self, x: torch.Tensor, values: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return torch.ops.sparsedm.nm4_linear(x, values, self.positions, bias)

    def plain(self) -> nn.Linear:
        """The same layer unpacked."""
        plain = nn.Linear(self.in_features, self.out_features, self.bias is not None)
        return layers.with_weights(plain, self.dense_weight(), self.bias)


class PackedConv2d(_PackedLayer):
    """`nn.Conv2d` with a packed weight; one stride and zero padding for both axes."""

    _channels = -3

    def __init__(self, plain: nn.Conv2d, pattern: NMPattern | str):
        super().__init__(plain, pattern)
        self.kernel_size, self.stride, self.padding = plain.kernel_size, plain.stride, plain.padding

    def _run(self, x: torch.Tensor, values: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        kernel, stride, padding = list(self.kernel_size), self.stride[0], self.padding[0]
        return torch.ops.sparsedm.nm4_conv2d(x, values, self.positions, bias, kernel, stride, padding)

    def plain(self) -> nn.Conv2d:
        """The same layer unpacked."""
        outputs, inputs = self.weight_shape[:2]
        conv = nn.Conv2d(inputs, outputs, self.kernel_size, self.stride, self.padding, bias=self.bias is not None)
        return layers.with_weights(conv, self.dense_weight(), self.bias)


def pack(model: nn.Module, *, backend: str = "auto", batch: int = 4, inputs: Inputs | None = None) -> nn.Module:
    """Pack layers of `model` in place; returns the model, folded and in eval mode.

    Args:
        backend: "auto" times every distinct layer against its dense form, with the inputs that `batch` pictures give it, and
            keeps the faster, and the whole model likewise; "kernel" packs all that a kernel serves.
        inputs: of one call on one picture, for models whose config does not tell their shapes.

    Raises:
        ValueError: unknown backend, a model with no N:M sparse layer, or, for "auto", one whose config does not tell the shapes
            of its inputs; nothing is changed then.
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; known: {', '.join(BACKENDS)}")
    if not layers.patterns(model):
        raise ValueError(f"{type(model).__name__} has no N:M sparse layer to pack; sparsify and fold it first")
    auto = backend == "auto"
    shapes = dryrun.input_shapes(model, inputs) if auto else {}
    patterns = layers.patterns(layers.fold(model).eval())
    plain = copy.deepcopy(model) if auto else None
    for name, pattern in patterns.items():
        module = model.get_submodule(name)
        reason, found = why_not(module, pattern), None
        if not reason and name in shapes:
            found = _times(module, pattern, (batch, *shapes[name][1:]))
            reason = "" if found.gain >= FASTER else f"its packed kernel is no faster here ({found})"
        module.dense_reason = reason
        if not reason:
            layer = packed_layer(module, pattern)
            layer.times = found
            _replace(model, name, layer)
    if auto and any(map(is_packed, model.modules())):
        _unpack_if_slower(model, plain, _batched(inputs, batch) if inputs else example_inputs(model, batch))
    if any(map(is_packed, model.modules())) and hasattr(model, "save_pretrained"):
        model.save_pretrained = functools.partial(_save_unpacked, model)
    return model


def _batched(inputs: Inputs, batch: int) -> Inputs:
    """The inputs of one picture, `batch` times."""
    return each(lambda x: x.expand(batch, *x.shape[1:]) if x.dim() and x.shape[0] == 1 else x, inputs)


def _save_unpacked(self: nn.Module, save_directory, **kwargs) -> None:
    """diffusers' save_pretrained on an unpacked copy: the folder that any tool reads."""
    unpack(copy.deepcopy(self)).save_pretrained(save_directory, **kwargs)


def _unpack_if_slower(model: nn.Module, plain: nn.Module, inputs: Inputs) -> None:
    """Layers that win alone may lose together: caches are cold within a model, and small layers cost overhead."""
    names = {name: str(module.pattern) for name, module in model.named_modules() if is_packed(module)}
    shapes = [(name, tuple(p.shape), p.dtype) for name, p in plain.named_parameters()]
    key = (
        type(model).__name__,
        *{str(p.device) for p in plain.parameters()},
        zlib.crc32(repr((shapes, names)).encode()),
        *each(lambda x: tuple(x.shape), inputs).items(),
    )
    found = tuning.times(key, lambda: {"dense": lambda: plain(**inputs), "packed": lambda: model(**inputs)}, rounds=7)
    if found.gain < WHOLE_FASTER:
        unpack(model)
        for name in names:
            model.get_submodule(name).dense_reason = f"the whole model is no faster packed ({found})"


_PACKED_CLASS = {nn.Linear: PackedLinear, nn.Conv2d: PackedConv2d}


def packed_layer(plain: nn.Linear | nn.Conv2d, pattern: NMPattern | str) -> nn.Module:
    """The packed form of one layer, for its device. Raises ValueError if it is not `pattern` sparse, or no kernel serves it."""
    if plain.weight.is_cuda:
        return SemiStructuredLayer(plain, pattern)
    reason = why_not(plain, NMPattern.parse(pattern))
    if reason:
        raise ValueError(f"{type(plain).__name__} cannot be packed: {reason}")
    return _PACKED_CLASS[type(plain)](plain, pattern)


def why_not(module: nn.Module, pattern: NMPattern) -> str:
    """Why no kernel serves this layer, or ""."""
    weight = module.weight
    if type(module) not in _PACKED_CLASS:
        return f"no packed kernel for {type(module).__name__}"
    if weight.is_cuda:
        return gpu.why_not(module, pattern)
    if weight.device.type != "cpu":
        return f"no packed kernel on {weight.device.type}"
    if pattern.m != 4:
        return f"no packed kernel for {pattern}, only for 1:4, 2:4 and 3:4"
    if weight.shape[1] % 4:
        return f"packed kernels need a multiple of 4 inputs, not {weight.shape[1]}"
    if isinstance(module, nn.Conv2d) and not _plain_convolution(module):
        return "no packed kernel for grouped, dilated, padded or strided in other ways than zeros and one number"
    compute = torch.float32 if weight.dtype == torch.float16 else weight.dtype
    return kernels.why_not(weight[0].numel(), len(weight), pattern.n, compute)


def _plain_convolution(conv: nn.Conv2d) -> bool:
    one_number = not isinstance(conv.padding, str) and len(set(conv.stride)) == len(set(conv.padding)) == 1
    return conv.groups == 1 and set(conv.dilation) == {1} and conv.padding_mode == "zeros" and one_number


def _key(module: nn.Linear | nn.Conv2d) -> tuple:
    """What tells two layers apart for timing."""
    if isinstance(module, nn.Linear):
        return nn.Linear, module.in_features, module.out_features
    return nn.Conv2d, module.in_channels, module.out_channels, module.kernel_size, module.stride, module.padding


def _times(module: nn.Linear | nn.Conv2d, pattern: NMPattern, shape: tuple[int, ...]) -> tuning.Times:
    """Times of a layer like this one, dense and packed, for x of `shape`."""
    (cls, *sizes), weight = _key(module), module.weight
    device = torch.cuda.get_device_name(weight.device) if weight.is_cuda else weight.device.type

    def variants():
        dense = cls(*sizes).to(weight)
        dense.weight.copy_(nm.masked(dense.weight, nm.mask(dense.weight, pattern)))
        packed, x = packed_layer(dense, pattern), torch.randn(shape).to(weight)
        return {"dense": lambda: dense(x), "packed": lambda: packed(x)}

    with torch.no_grad(), torch.random.fork_rng(devices=[]):  # the user's random numbers do not depend on what is remembered
        return tuning.times((cls.__name__, *sizes, pattern, weight.dtype, device, shape), variants)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def unpack(model: nn.Module) -> nn.Module:
    """Back to plain layers with the same weights, bit for bit, in place; returns the model."""
    for name, module in [(n, m) for n, m in model.named_modules() if is_packed(m)]:
        _replace(model, name, module.plain())
    model.__dict__.pop("save_pretrained", None)
    return model


def is_packed(module: nn.Module) -> bool:
    """Whether `module` is a packed layer."""
    return isinstance(module, (_PackedLayer, SemiStructuredLayer))
