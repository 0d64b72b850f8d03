"""How packed layers run: custom operators `torch.ops.sparsedm.nm4_linear` and `nm4_conv2d`, seen by torch.compile and export.

Both compute on the CPU, in float32 or in bfloat16 with float32 sums. A weight is given as values [out, inputs / 4 * N] and
two-bit positions (uint8), which `packing.tensors.pack` makes, perhaps in another order (orders.py); all arguments are checked
before a kernel runs.
"""

import functools

import torch

from . import orders
from .build import library, why_off

_NO_KERNEL = 2  # as in nm_kernels.cpp
_definitions = torch.library.Library("sparsedm", "DEF")
_definitions.define("nm4_linear(Tensor x, Tensor values, Tensor positions, Tensor? bias, int order=0) -> Tensor")
_definitions.define(
    "nm4_conv2d(Tensor x, Tensor values, Tensor positions, Tensor? bias, int[] kernel, int stride, int padding, int order=0)"
    " -> Tensor"
)


def available(dtype: torch.dtype = torch.float32) -> bool:
    """Whether there are CPU kernels for `dtype`: float32, or bfloat16 on CPUs with AVX512-BF16. Compiles them if need be."""
    kernels = library()
    return kernels is not None and (dtype == torch.float32 or (dtype == torch.bfloat16 and bool(kernels.sparsedm_has_bfloat())))


@functools.cache
def why_not(inputs: int, outputs: int, kept: int, dtype: torch.dtype) -> str:
    """Why no kernel takes `outputs` rows of `inputs` (channels * kernel size) with `kept` of every 4 nonzero, or ""."""
    if dtype not in (torch.float32, torch.bfloat16):
        return f"no packed kernel for {dtype}"
    if kept not in (1, 2, 3) or inputs % 4 or inputs * kept % 16:
        return f"no packed kernel for {kept}:4 of {inputs} inputs"
    if dtype == torch.bfloat16 and (kept != 2 or outputs % 2):
        return f"no packed bfloat16 kernel for {kept}:4 and {outputs} outputs"
    if library() is None:
        return f"the packed kernels are off: {why_off()}"
    return "" if available(dtype) else "no bfloat16 instructions (AVX512-BF16) for the packed kernels"


def nm4_linear(
    x: torch.Tensor, values: torch.Tensor, positions: torch.Tensor, bias: torch.Tensor | None, order: int = orders.ROWS
) -> torch.Tensor:
    """Linear layer: x [..., in] to [..., out].

    Raises:
        ValueError: another dtype or device, shapes that do not fit, or no kernels on this machine.
    """
    if x.dim() < 1:
        raise ValueError("x is [..., in], not a number")
    inputs, outputs = x.shape[-1], values.shape[0]
    kept = _check(x, values, positions, bias, inputs, inputs, order)
    y = x.new_empty(*x.shape[:-1], outputs)
    tokens = x.numel() // inputs
    if x.dtype == torch.float32 and order:
        if orders.best((outputs, inputs), 1, kept, x.dtype) == order:
            _call("sparsedm_sliced_linear", (x, values, positions, bias, y), tokens, inputs, outputs, kept)
            return y
        (values, positions), order = orders.rows(values, positions, 1, kept, order), orders.ROWS
    sizes = (tokens, inputs, outputs, kept, order)
    _call("sparsedm_nm4_linear", (x, values, positions, bias, y), x.dtype == torch.bfloat16, *sizes)
    return y


def nm4_conv2d(
    x: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    bias: torch.Tensor | None,
    kernel: list[int],
    stride: int,
    padding: int,
    order: int = orders.ROWS,
) -> torch.Tensor:
    """Convolution: x [B, in, H, W] to [B, out, H', W'], one stride and zero padding for both axes.

    Raises:
        ValueError: another dtype or device, shapes that do not fit, stride or padding that are too large to compute with, or no
            kernels on this machine.
    """
    if x.dim() != 4 or x.shape[1] % 4:
        raise ValueError(f"x is [B, C, H, W] with C a multiple of 4, not {list(x.shape)}")
    if min(x.shape[2:]) < 1:
        raise ValueError(f"x {list(x.shape)} has no pixels")
    if len(kernel) != 2 or min(*kernel, stride, padding + 1) < 1:
        raise ValueError(f"kernel {kernel}, stride {stride} and padding {padding} are no convolution")
    images, channels, height, width = x.shape
    kept = _check(x, values, positions, bias, channels * kernel[0] * kernel[1], channels, order)
    y = _conv_shape(x, values, positions, bias, kernel, stride, padding)
    sizes, outputs = (images, channels, height, width, values.shape[0]), values.shape[0]
    if x.dtype == torch.float32 and order:
        if orders.best((outputs, channels, *kernel), stride, kept, x.dtype) == order:
            _call("sparsedm_sliced_conv2d", (x, values, positions, bias, y), *sizes, kernel[0], padding, kept)
            return y
        (values, positions), order = orders.rows(values, positions, kernel[0] * kernel[1], kept, order), orders.ROWS
    sizes = (x.dtype == torch.bfloat16, *sizes, *kernel, stride, padding, kept, order)
    _call("sparsedm_nm4_conv2d", (x, values, positions, bias, y), *sizes)
    return y


def _check(x, values, positions, bias, inputs: int, channels: int, order: int) -> int:
    """Kept weights per group of 4, or a ValueError."""
    if values.dim() != 2:
        raise ValueError(f"values are [out, kept inputs], not {list(values.shape)}")
    outputs, dtype = values.shape[0], x.dtype
    alike = values.dtype == dtype and (bias is None or (bias.dtype == dtype and bias.is_cpu))
    if not (alike and x.is_cpu and values.is_cpu and positions.is_cpu and positions.dtype == torch.uint8):
        raise ValueError("the packed kernels take x, values and bias of one dtype, and uint8 positions, on the CPU")
    kept = values.shape[1] * 4 // inputs if inputs else 0
    reason = why_not(inputs, outputs, kept, dtype)
    if reason:
        raise ValueError(f"{reason}; sparsedm.unpack gives plain layers")
    fits = values.shape[1] * 4 == inputs * kept and positions.numel() * 4 == values.numel()
    if not fits or (bias is not None and bias.shape != (outputs,)):
        raise ValueError(f"x {list(x.shape)}, values {list(values.shape)} and {positions.numel()} bytes of positions do not fit")
    in_slices = order > 0 and order % 8 == 0 and order * kept % 16 == 0 and channels % order == 0
    in_pairs = order == orders.PAIRS and kept == 2 and inputs % 8 == 0 and outputs % 2 == 0
    if order and not (in_slices or in_pairs):
        raise ValueError(f"{channels} inputs have no packed kernel of order {order}")
    return kept


def _call(name: str, tensors: tuple[torch.Tensor | None, ...], *sizes: int) -> None:
    x, values, positions, bias, y = tensors
    x, values, positions = x.contiguous(), values.contiguous(), positions.contiguous()  # kept alive during the call
    bias = None if bias is None else bias.float().contiguous()  # in float32, as the sums
    torch.get_num_threads()  # makes torch.set_num_threads hold in a Python thread that has not used torch yet
    pointers = x.data_ptr(), values.data_ptr(), positions.data_ptr(), None if bias is None else bias.data_ptr(), y.data_ptr()
    status = getattr(library(), name)(*pointers, *sizes)
    if status == _NO_KERNEL:
        raise ValueError(f"{name} has no kernel for the sizes {sizes}; stride or padding may be too large")
    if status:
        raise MemoryError(f"{name} could not allocate its panels for x {list(x.shape)}")


def _linear_shape(x, values, positions, bias, order=orders.ROWS):
    return x.new_empty(*x.shape[:-1], values.shape[0])


def _conv_shape(x, values, positions, bias, kernel, stride, padding, order=orders.ROWS):
    height, width = ((n + 2 * padding - k) // stride + 1 for n, k in zip(x.shape[2:], kernel, strict=True))
    if height < 1 or width < 1:
        raise ValueError(f"x {list(x.shape)} is smaller than the kernel {list(kernel)}")
    return x.new_empty(x.shape[0], values.shape[0], height, width)


_definitions.impl("nm4_linear", nm4_linear, "CPU")
_definitions.impl("nm4_conv2d", nm4_conv2d, "CPU")
torch.library.register_fake("sparsedm::nm4_linear", _linear_shape, lib=_definitions)
torch.library.register_fake("sparsedm::nm4_conv2d", _conv_shape, lib=_definitions)
