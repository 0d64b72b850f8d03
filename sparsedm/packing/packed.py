"""Packed layers: N:M weights without their zeros, run by kernels that never load them. For inference.

`pack` replaces the layers of a folded (or sparse-training) model that run faster so on this machine, `unpack` puts plain
layers back, bit for bit. `sparsedm.report` tells which layers are packed, and why the others are not.
"""

import copy
import math
import zlib
from collections.abc import Mapping

import torch
from diffusers import ModelMixin
from diffusers.quantizers import DiffusersAutoQuantizer
from torch import nn

from ..masking import layers, nm
from ..masking.nm import NMPattern
from ..masking.plain import save_as, save_as_is, with_weights
from ..models import dryrun
from ..models.denoisers import Inputs, each, example_inputs
from . import gpu, kernels, tensors, tuning
from .base import PackedLayer
from .gpu import SemiStructuredLayer
from .kernels import orders

BACKENDS = ("auto", "kernel")
FASTER = 1.02  # "auto" packs a layer whose kernel is faster by this: it saves memory, too
WHOLE_FASTER = 1.03  # and keeps a model packed that gains this much as a whole
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class _CPULayer(PackedLayer):
    """A layer for the CPU kernels: parameter `values` and buffers `positions` of the weight, and `bias` [out] or None.

    `values` is a parameter, without gradient, for code that asks a layer's parameters for their dtype or device. Values and
    positions lie in the order `order` (kernels/orders.py) of the fastest kernel on this machine; in state dicts, in rows.
    """

    def __init__(self, plain: nn.Linear | nn.Conv2d, pattern: NMPattern | str):
        super().__init__(plain, pattern)
        values, positions = tensors.pack(plain.weight, self.pattern)
        self.order = orders.ROWS
        self.values = nn.Parameter(values, requires_grad=False)
        self.register_buffer("positions", positions)
        self.register_buffer("bias", None if plain.bias is None else plain.bias.detach().clone())

    def _choose_kernel(self) -> None:
        """For this machine and dtype; the tensors are replaced, as copies of the module may share them."""
        inputs, outputs = math.prod(self.weight_shape[1:]), self.weight_shape[0]
        self._bfloat = not kernels.why_not(inputs, outputs, self.pattern.n, torch.bfloat16)
        compute = torch.bfloat16 if self.values.dtype == torch.bfloat16 and self._bfloat else torch.float32
        order = orders.best(self.weight_shape, self._stride(), self.pattern.n, compute)
        if order != self.order:
            values, positions = orders.arranged(*self._rows(), self._spots(), self.pattern.n, order)
            self.values, self.positions, self.order = nn.Parameter(values, requires_grad=False), positions, order

    def _spots(self) -> int:
        """Positions of the kernel."""
        return math.prod(self.weight_shape[2:])

    def _stride(self) -> int:
        return 1

    def _rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Values and positions in the order of files."""
        return orders.rows(self.values.detach(), self.positions, self._spots(), self.pattern.n, self.order)

    def __setstate__(self, state: dict) -> None:
        super().__setstate__({"order": orders.ROWS} | state)  # which layers pickled by earlier versions do not have
        self._choose_kernel()  # the layer may come from another machine

    def _apply(self, *args, **kwargs):
        super()._apply(*args, **kwargs)
        self._choose_kernel()  # the dtype may be another
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.order != orders.ROWS:
            destination[prefix + "values"], destination[prefix + "positions"] = self._rows()

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        own = dict(zip(("values", "positions"), self._rows(), strict=True))
        found = {name: state_dict.get(prefix + name, tensor) for name, tensor in own.items()}
        if all(found[name].shape == tensor.shape for name, tensor in own.items()):  # others are refused below
            arranged = orders.arranged(*found.values(), self._spots(), self.pattern.n, self.order)
            state_dict = state_dict | {prefix + k: x for k, x in zip(own, arranged, strict=True) if prefix + k in state_dict}
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._choose_kernel()

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        self.refuse_gradients(input)
        axis, inputs = self._channels, self.weight_shape[1]
        if input.dim() < -axis or input.shape[axis] != inputs:
            raise ValueError(f"{type(self).__name__} takes {inputs} inputs along axis {axis}, not x {list(input.shape)}")
        if input.dtype not in _DTYPES:
            raise ValueError(f"{type(self).__name__} takes float32, bfloat16 or float16, not {input.dtype}")
        values, bias, device = self.values, self.bias, input.device.type
        autocast = device != "meta" and torch.is_autocast_enabled(device)
        wanted = torch.get_autocast_dtype(device) if autocast else values.dtype
        dtype = torch.bfloat16 if wanted == torch.bfloat16 and self._bfloat else torch.float32  # that for float16, too
        y = self._run(_cast(input, dtype), _cast(values, dtype), None if bias is None else _cast(bias, dtype))
        return _cast(y, wanted if autocast else input.dtype)

    def kept(self) -> torch.Tensor:
        return self.values

    def dense_weight(self) -> torch.Tensor:
        return tensors.unpack(*self._rows(), self.pattern, self.weight_shape)


def _cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """As `x.to(dtype)`, which takes long to find out that there is nothing to do."""
    return x if x.dtype == dtype else x.to(dtype)


class PackedLinear(_CPULayer):
    """`nn.Linear` with a packed weight."""

    _channels = -1

    def __init__(self, plain: nn.Linear, pattern: NMPattern | str):
        super().__init__(plain, pattern)
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self._choose_kernel()

    def _run(self, x: torch.Tensor, values: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return torch.ops.sparsedm.nm4_linear.default(x, values, self.positions, bias, self.order)

    def plain(self) -> nn.Linear:
        plain = nn.Linear(self.in_features, self.out_features, self.bias is not None)
        return with_weights(plain, self.dense_weight(), self.bias)


class PackedConv2d(_CPULayer):
    """`nn.Conv2d` with a packed weight; one stride and zero padding for both axes."""

    _channels = -3

    def __init__(self, plain: nn.Conv2d, pattern: NMPattern | str):
        super().__init__(plain, pattern)
        self.kernel_size, self.stride, self.padding = plain.kernel_size, plain.stride, plain.padding
        self.in_channels, self.out_channels = plain.in_channels, plain.out_channels  # which models read
        self._choose_kernel()

    def _stride(self) -> int:
        return self.stride[0]

    def _run(self, x: torch.Tensor, values: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        kernel, stride, padding = list(self.kernel_size), self.stride[0], self.padding[0]
        return torch.ops.sparsedm.nm4_conv2d.default(x, values, self.positions, bias, kernel, stride, padding, self.order)

    def plain(self) -> nn.Conv2d:
        outputs, inputs = self.weight_shape[:2]
        conv = nn.Conv2d(inputs, outputs, self.kernel_size, self.stride, self.padding, bias=self.bias is not None)
        return with_weights(conv, self.dense_weight(), self.bias)


def pack(model: nn.Module, *, backend: str = "auto", batch: int = 4, inputs: Inputs | None = None) -> nn.Module:
    """Pack layers of `model` in place; returns the model, folded and in eval mode.

    Args:
        backend: "auto" times every distinct layer against its dense form and keeps the faster, and the whole model likewise;
            "kernel" packs every layer that a kernel serves.
        batch: how many pictures the timed calls take.
        inputs: keyword arguments of one call on one picture, for models whose config does not tell their shapes.

    Raises:
        ValueError: unknown backend, a model with no N:M sparse layer, or, for "auto", one whose config does not tell the shapes
            of its inputs.

    Whatever is raised, also by the model when it is timed: the model is unchanged then.
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; known: {', '.join(BACKENDS)}")
    if not layers.patterns(model):
        raise ValueError(f"{type(model).__name__} has no N:M sparse layer to pack; sparsify and fold it first")
    auto = backend == "auto"
    shapes = dryrun.input_shapes(model, inputs) if auto else None
    dense = _folded_beside(model)
    reasons, packed = {}, {}
    for name, pattern in layers.patterns(dense).items():
        module = dense.get_submodule(name)
        reasons[name], times = why_not(module, pattern), None
        if auto and not reasons[name]:
            reasons[name], times = _too_slow(module, pattern, shapes.get(name), batch)
        if not reasons[name]:
            packed[name] = packed_layer(module, pattern)
            packed[name].times = times
    if auto and packed:
        reason = _why_slower(dense, packed, _batched(inputs, batch) if inputs else example_inputs(model, batch))
        if reason:
            reasons |= dict.fromkeys(packed, reason)
            packed = {}
    layers.fold(model).eval()  # nothing fails from here on
    for name, reason in reasons.items():
        model.get_submodule(name).dense_reason = reason
    for name, layer in packed.items():
        _replace(model, name, layer)
    if packed:
        save_as(model, _for_saving)
    return model


def _folded_beside(model: nn.Module) -> nn.Module:
    """A folded copy in eval mode, which shares all tensors with the model but the weights that folding changes."""
    masked = {id(module.weight) for _, module in layers.nm_layers(model)}
    return layers.fold(dryrun.structure_of(model, lambda x: copy.deepcopy(x) if id(x) in masked else x)).eval()


def _too_slow(
    module: nn.Module, pattern: NMPattern, shape: tuple[int, ...] | None, batch: int
) -> tuple[str, tuning.Times | None]:
    """Why "auto" does not pack a layer, or "", and its times; `shape` is the shape of its input for one picture."""
    if shape is None:
        return layers.NEVER_CALLED, None
    times = _times(module, pattern, (batch, *shape[1:]))
    return "" if times.gain >= FASTER else f"its packed kernel is no faster here ({times})", times


def _batched(inputs: Inputs, batch: int) -> Inputs:
    """The inputs of one picture, `batch` times."""
    return each(lambda x: x.repeat(batch, *[1] * (x.dim() - 1)) if x.dim() and x.shape[0] == 1 else x, inputs)


def _why_slower(dense: nn.Module, packed: Mapping[str, PackedLayer], inputs: Inputs) -> str:
    """Why the model is not packed, or "": layers that win alone may lose together, as caches are cold within a model, and small
    layers cost overhead."""
    names = {name: str(layer.pattern) for name, layer in packed.items()}
    shapes = [(name, tuple(p.shape), p.dtype) for name, p in dense.named_parameters()]
    key = (
        type(dense).__name__,
        *{str(p.device) for p in dense.parameters()},
        zlib.crc32(repr((shapes, names)).encode()),
        *each(lambda x: tuple(x.shape), inputs).items(),
    )

    def variants():
        fast = dryrun.structure_of(dense)
        for name, layer in packed.items():
            _replace(fast, name, layer)
        return {"dense": lambda: dense(**inputs), "packed": lambda: fast(**inputs)}

    times = tuning.times(key, variants, rounds=7)
    return "" if times.gain >= WHOLE_FASTER else f"the whole model is no faster packed ({times})"


_PACKED_CLASS = {nn.Linear: PackedLinear, nn.Conv2d: PackedConv2d}


def packed_layer(plain: nn.Linear | nn.Conv2d, pattern: NMPattern | str) -> nn.Module:
    """The packed form of one layer, for its device. Raises ValueError for a layer not `pattern` sparse, or without a kernel."""
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
    packed = [(name, module) for name, module in model.named_modules() if is_packed(module)]
    for name, module in packed:
        _replace(model, name, module.plain())
    if packed:
        save_as_is(model)
    return model


def _for_saving(model: nn.Module) -> nn.Module:
    """The model unpacked; diffusers' `save_pretrained` writes its N:M sparse weights packed then."""
    unpack(model)
    if isinstance(model, ModelMixin):
        model.hf_quantizer = DiffusersAutoQuantizer.from_config(dict(tensors.QUANTIZATION))
        if not model.config.get("quantization_config"):
            model.register_to_config(quantization_config=dict(tensors.QUANTIZATION))
    return model


def is_packed(module: nn.Module) -> bool:
    """Whether `module` is a packed layer."""
    return isinstance(module, PackedLayer)


def has_packed(model: nn.Module) -> bool:
    """Whether `model` has packed layers."""
    return any(map(is_packed, model.modules()))
