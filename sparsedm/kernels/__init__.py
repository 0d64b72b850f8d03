"""How packed layers run: custom operators `torch.ops.sparsedm.nm4_linear` and `nm4_conv2d`, seen by torch.compile and export.

Both compute in float32 on the CPU. Weights are values [out, inputs / 4 * N] and two-bit positions (uint8) as `packing.pack`
makes them; everything is checked before a kernel runs.
"""

import torch

from .build import library

_definitions = torch.library.Library("sparsedm", "DEF")
_definitions.define("nm4_linear(Tensor x, Tensor values, Tensor positions, Tensor? bias) -> Tensor")
_definitions.define(
    "nm4_conv2d(Tensor x, Tensor values, Tensor positions, Tensor? bias, int[] kernel, int stride, int padding) -> Tensor"
)


def available() -> bool:
    """Whether the CPU kernels are compiled, compiling them if need be."""
    return library() is not None


def serves(inputs: int, kept: int) -> bool:
    """Whether the kernels take rows of `inputs` (channels * kernel size) with `kept` of every 4 nonzero."""
    return kept in (1, 2, 3) and inputs % 4 == 0 and inputs * kept % 16 == 0


def nm4_linear(x: torch.Tensor, values: torch.Tensor, positions: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Linear layer: x [..., in] to [..., out].

    Raises:
        ValueError: another dtype or device, shapes that do not fit, or no kernels on this machine.
    """
    inputs, outputs = x.shape[-1], len(values)
    kept = _check(x, values, positions, bias, inputs)
    y = x.new_empty(*x.shape[:-1], outputs)
    _call("sparsedm_nm4_linear", (x, values, positions, bias, y), x.numel() // inputs, inputs, outputs, kept)
    return y


def nm4_conv2d(
    x: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    bias: torch.Tensor | None,
    kernel: list[int],
    stride: int,
    padding: int,
) -> torch.Tensor:
    """Convolution: x [B, in, H, W] to [B, out, H', W'], one stride and zero padding for both axes.

    Raises:
        ValueError: another dtype or device, shapes that do not fit, or no kernels on this machine.
    """
    if x.dim() != 4:
        raise ValueError(f"x is [B, C, H, W], not {list(x.shape)}")
    images, channels, height, width = x.shape
    kept = _check(x, values, positions, bias, channels * kernel[0] * kernel[1])
    y = _conv_shape(x, values, positions, bias, kernel, stride, padding)
    sizes = (images, channels, height, width, len(values), *kernel, stride, padding, kept)
    _call("sparsedm_nm4_conv2d", (x, values, positions, bias, y), *sizes)
    return y


def _check(x, values, positions, bias, inputs: int) -> int:
    """Kept weights per group of 4, or a ValueError."""
    tensors = [t for t in (x, values, bias) if t is not None]
    if any(t.dtype != torch.float32 or t.device.type != "cpu" for t in tensors) or positions.dtype != torch.uint8:
        raise ValueError("the packed kernels compute in float32 on the CPU, with uint8 positions")
    kept = values.shape[1] * 4 // inputs if inputs else 0
    fits = serves(inputs, kept) and values.shape[1] * 4 == inputs * kept and positions.numel() * 4 == values.numel()
    if not fits or (bias is not None and bias.shape != (len(values),)):
        raise ValueError(f"x {list(x.shape)}, values {list(values.shape)} and {positions.numel()} bytes of positions do not fit")
    return kept


def _call(name: str, tensors: tuple[torch.Tensor | None, ...], *sizes: int) -> None:
    kernels = library()
    if kernels is None:
        raise ValueError("the packed kernels are not available here; sparsedm.unpack gives plain layers")
    tensors = [None if t is None else t.contiguous() for t in tensors]  # kept alive during the call
    if getattr(kernels, name)(*(None if t is None else t.data_ptr() for t in tensors), *sizes):
        raise MemoryError(f"{name} could not allocate its panels for x {list(tensors[0].shape)}")


def _linear_shape(x, values, positions, bias):
    return x.new_empty(*x.shape[:-1], len(values))


def _conv_shape(x, values, positions, bias, kernel, stride, padding):
    height, width = ((n + 2 * padding - k) // stride + 1 for n, k in zip(x.shape[2:], kernel, strict=True))
    if height < 1 or width < 1:
        raise ValueError(f"x {list(x.shape)} is smaller than the kernel {list(kernel)}")
    return x.new_empty(len(x), len(values), height, width)


_definitions.impl("nm4_linear", nm4_linear, "CPU")
_definitions.impl("nm4_conv2d", nm4_conv2d, "CPU")
torch.library.register_fake("sparsedm::nm4_linear", _linear_shape, lib=_definitions)
torch.library.register_fake("sparsedm::nm4_conv2d", _conv_shape, lib=_definitions)
