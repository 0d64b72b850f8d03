"""The packed kernels through their operators and layers: right for any shape, layout and thread, and never out of bounds."""

import copy
import importlib.util
import os
import pickle
import platform
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from sparsedm.masking import nm
from sparsedm.measure import speed
from sparsedm.packing import kernels, packed, tensors
from sparsedm.packing.kernels import build, orders

pytestmark = pytest.mark.skipif(not kernels.available(), reason="no C++ compiler for the packed kernels")


class Kind(NamedTuple):
    """What the kernels of a dtype do."""

    tolerance: float  # error allowed, as a share of what the absolute products add up to
    patterns: tuple[str, ...] = ("1:4", "2:4", "3:4")
    outputs: int = 1  # their number is a multiple of this

    def rounded(self, outputs: int) -> int:
        return -(-outputs // self.outputs) * self.outputs


KINDS = {torch.float32: Kind(1e-5)}
if kernels.available(torch.bfloat16):
    KINDS[torch.bfloat16] = Kind(2**-8, ("2:4",), 2)
per_dtype = pytest.mark.parametrize("dtype", KINDS, ids=str)
per_dtype_and_pattern = pytest.mark.parametrize(("dtype", "pattern"), [(d, p) for d in KINDS for p in KINDS[d].patterns], ids=str)

EXAMPLES = "SPARSEDM_EXAMPLES"  # per property test; the same ones every time
examples = settings(max_examples=int(os.environ.get(EXAMPLES, 200)), derandomize=True, deadline=None, database=None)

DTYPES = st.sampled_from([*KINDS])
SEEDS = st.integers(0, 2**32 - 1)
THREADS = st.sampled_from([1, 2, 3])


def sparse(layer: nn.Module, pattern: str = "2:4") -> nn.Module:
    with torch.no_grad():
        layer.weight.copy_(nm.masked(layer.weight, nm.mask(layer.weight, pattern)))
    return layer


def pack(layer: nn.Module, pattern: str = "2:4") -> nn.Module:
    return (packed.PackedLinear if isinstance(layer, nn.Linear) else packed.PackedConv2d)(layer, pattern)


@torch.no_grad()
def assert_same(layer: nn.Module, x: torch.Tensor, pattern: str = "2:4", result: torch.Tensor | None = None) -> None:
    """`result`, by default what the packed `layer` makes of `x`, is what the folded layer makes of it in float64."""
    result = pack(layer, pattern)(x) if result is None else result
    exact = copy.deepcopy(layer).double()
    expected = exact(x.double())
    for parameter in exact.parameters():
        parameter.abs_()
    scale = exact(x.double().abs()).max().item() if x.numel() else 0.0
    tolerance = KINDS[x.dtype].tolerance
    assert result.dtype == x.dtype
    torch.testing.assert_close(result.double(), expected, rtol=tolerance, atol=tolerance * scale)


def _strided(x: torch.Tensor) -> torch.Tensor:
    """The same numbers with others between them that would show."""
    return torch.stack([x, torch.full_like(x, 255 if x.dtype == torch.uint8 else torch.nan)], -1)[..., 0]


def _unaligned(x: torch.Tensor) -> torch.Tensor:
    """The same numbers side by side, at an address that is a multiple of their size and of no more."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x)


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "strided": _strided,
    "unaligned": _unaligned,
    "expanded": lambda x: x[:1].expand_as(x),
}
CHANNELS_LAST = {"channels last": lambda x: x.to(memory_format=torch.channels_last)}


class LinearCase(NamedTuple):
    dtype: torch.dtype
    pattern: str
    inputs: int
    outputs: int
    bias: bool
    leading: tuple[int, ...]
    layout: str
    seed: int

    def make(self) -> tuple[nn.Linear, torch.Tensor]:
        """The folded layer and its input."""
        torch.manual_seed(self.seed)
        layer = sparse(nn.Linear(self.inputs, self.outputs, self.bias), self.pattern).to(self.dtype)
        return layer, LAYOUTS[self.layout](torch.randn(*self.leading, self.inputs, dtype=self.dtype))


class ConvolutionCase(NamedTuple):
    dtype: torch.dtype
    pattern: str
    channels: int
    outputs: int
    bias: bool
    kernel: tuple[int, int]
    stride: int
    padding: int
    size: tuple[int, int, int]
    layout: str
    seed: int

    def make(self) -> tuple[nn.Conv2d, torch.Tensor]:
        """The folded layer and its input."""
        torch.manual_seed(self.seed)
        layer = nn.Conv2d(self.channels, self.outputs, self.kernel, self.stride, self.padding, bias=self.bias)
        images, height, width = self.size
        x = torch.randn(images, self.channels, height, width, dtype=self.dtype)
        return sparse(layer, self.pattern).to(self.dtype), (LAYOUTS | CHANNELS_LAST)[self.layout](x)


@st.composite
def linear_cases(draw, most_tokens: int = 300) -> LinearCase:
    dtype = draw(DTYPES)
    pattern, tokens = draw(st.sampled_from(KINDS[dtype].patterns)), st.integers(0, most_tokens)
    leading = draw(st.one_of(tokens.map(lambda n: (n,)), st.lists(st.integers(1, 5), max_size=3).map(tuple)))
    outputs = KINDS[dtype].rounded(draw(st.one_of(st.sampled_from([1, 3, 17, 40, 256, 257]), st.integers(1, 70))))
    inputs = draw(st.sampled_from([64, 128])) if draw(st.booleans()) else _channels(draw, pattern, 1, 208)
    layout = draw(st.sampled_from([*LAYOUTS]))
    return LinearCase(dtype, pattern, inputs, outputs, draw(st.booleans()), leading, layout, draw(SEEDS))


@st.composite
def convolution_cases(draw, most: int = 19) -> ConvolutionCase:
    dtype, kernel = draw(DTYPES), draw(st.sampled_from([(1, 1), (3, 3), (1, 3), (5, 5), (2, 2)]))
    pattern, stride, padding = draw(st.sampled_from(KINDS[dtype].patterns)), draw(st.integers(1, 3)), draw(st.integers(0, 2))
    height, width = (draw(st.integers(max(1, k - 2 * padding), most)) for k in kernel)
    channels = _channels(draw, pattern, kernel[0] * kernel[1], 80 if kernel == (1, 1) else 24)
    outputs = KINDS[dtype].rounded(draw(st.one_of(st.sampled_from([1, 3, 8, 17, 40]), st.integers(1, 70))))
    size, layout = (draw(st.integers(1, 3)), height, width), draw(st.sampled_from([*LAYOUTS, *CHANNELS_LAST]))
    bias, seed = draw(st.booleans()), draw(SEEDS)
    return ConvolutionCase(dtype, pattern, channels, outputs, bias, kernel, stride, padding, size, layout, seed)


def _channels(draw, pattern: str, positions: int, most: int) -> int:
    """A number of channels that the kernels take with so many kernel positions: rows of packed values in fours."""
    kept = nm.NMPattern.parse(pattern).n
    return draw(st.sampled_from([n for n in range(4, most + 1, 4) if n * positions * kept % 16 == 0]))


@examples
@given(case=linear_cases(), threads=THREADS)
def test_linear_equals_the_folded_layer(case, threads):
    with speed.with_threads(threads):
        assert_same(*case.make(), case.pattern)


@examples
@given(case=convolution_cases(), threads=THREADS)
def test_convolution_equals_the_folded_layer(case, threads):
    with speed.with_threads(threads):
        assert_same(*case.make(), case.pattern)


@per_dtype_and_pattern
@pytest.mark.parametrize("tokens", [0, 1, 15, 16, 17, 127, 128, 129, 264, 1028])
def test_linear_at_the_edges_of_blocks(dtype, pattern, tokens):
    for inputs, outputs, bias in [(16, 1, True), (48, 33, False), (128, 300, True), (80, 16, False)]:
        layer = sparse(nn.Linear(inputs, KINDS[dtype].rounded(outputs), bias), pattern).to(dtype)
        assert_same(layer, torch.randn(tokens, inputs, dtype=dtype), pattern)


@per_dtype_and_pattern
@pytest.mark.parametrize("size", [(1, 1, 1), (1, 3, 3), (2, 8, 8), (5, 7, 4), (1, 33, 19)], ids=str)
def test_convolution_at_the_edges_of_blocks_and_images(dtype, pattern, size):
    images, height, width = size
    for kernel, stride, padding in [(1, 1, 0), (1, 2, 0), (3, 1, 1), (3, 2, 1), (3, 3, 2), (5, 1, 2), ((1, 3), 1, 1)]:
        layer = sparse(nn.Conv2d(16, KINDS[dtype].rounded(37), kernel, stride, padding), pattern).to(dtype)
        assert_same(layer, torch.randn(images, 16, height, width, dtype=dtype), pattern)


@pytest.mark.parametrize("images", [1, 2, 3])
@pytest.mark.parametrize("size", [(1, 1), (2, 2), (4, 4), (8, 8), (8, 4), (16, 16), (3, 20), (9, 40), (17, 33)], ids=str)
def test_convolution_at_the_edges_of_strips(images, size):
    for channels, kernel, padding in [(32, 3, 1), (8, 3, 2), (16, 3, 1), (64, 1, 0), (64, 1, 1)]:
        layer, x = sparse(nn.Conv2d(channels, 24, kernel, padding=padding)), torch.randn(images, channels, *size)
        assert_same(layer, x)


@per_dtype
def test_sliced_weights_with_more_outputs_than_a_block(dtype):
    for layer, size in [(nn.Linear(128, 600), (130,)), (nn.Conv2d(16, 600, 3, padding=1), (2, 16, 5, 5))]:
        x = torch.randn(*size, 128) if isinstance(layer, nn.Linear) else torch.randn(size)
        assert_same(sparse(layer).to(dtype), x.to(dtype))


@per_dtype_and_pattern
def test_convolution_with_more_outputs_than_a_block(dtype, pattern):
    layer = sparse(nn.Conv2d(16, 600, 3, padding=1), pattern).to(dtype)
    assert_same(layer, torch.randn(2, 16, 5, 5, dtype=dtype), pattern)


@pytest.mark.skipif(torch.bfloat16 not in KINDS, reason="no AVX512-BF16")
@torch.no_grad()
def test_bfloat16_results_are_rounded_to_the_nearest():
    linear, conv = (sparse(layer).bfloat16() for layer in (nn.Linear(64, 32), nn.Conv2d(16, 8, 3)))
    for layer, x in ((linear, torch.randn(257, 64)), (conv, torch.randn(4, 16, 12, 12))):
        x = x.bfloat16()
        expected = copy.deepcopy(layer).double()(x.double()).bfloat16()
        assert (pack(layer)(x) == expected).float().mean() > 0.98


def test_convolution_of_no_images_has_none():
    layer = pack(sparse(nn.Conv2d(16, 8, 3)))
    assert layer(torch.randn(0, 16, 5, 7)).shape == (0, 8, 3, 5)


def operate(packed_layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The operator of the layer, called without it."""
    m = packed_layer
    if isinstance(m, packed.PackedLinear):
        return torch.ops.sparsedm.nm4_linear(x, m.values, m.positions, m.bias, m.order)
    kernel, stride, padding = list(m.kernel_size), m.stride[0], m.padding[0]
    return torch.ops.sparsedm.nm4_conv2d(x, m.values, m.positions, m.bias, kernel, stride, padding, m.order)


def weight_of(m: nn.Module) -> torch.Tensor:
    """The dense weight that `values` and `positions` stand for: two bits a position, repeated ones added up."""
    state = m.state_dict()
    positions = (state["positions"][:, None].long() >> torch.arange(0, 8, 2)) & 3
    outputs, inputs, *rest = m.weight_shape
    values = state["values"].double().reshape(outputs, -1, m.pattern.n)
    groups = values.new_zeros(*values.shape[:2], 4).scatter_add_(-1, positions.reshape(values.shape), values)
    return groups.view(outputs, *rest, inputs).movedim(-1, 1)


CASES = st.one_of(linear_cases(), convolution_cases())
FILLS = {"zeros": lambda p: p.zero_(), "ones": lambda p: p.fill_(255), "random": lambda p: p.random_()}


@examples
@given(case=CASES, fill=st.sampled_from([*FILLS]), layout=st.sampled_from([*LAYOUTS]))
def test_operators_read_any_bytes_as_two_bit_positions_within_the_group(case, fill, layout):
    layer, x = case.make()
    m = pack(layer, case.pattern)
    FILLS[fill](m.positions)
    m.values.data, m.positions = LAYOUTS[layout](m.values.data), LAYOUTS[layout](m.positions)
    m.bias = None if m.bias is None else LAYOUTS[layout](m.bias)
    layer.double().weight.data = weight_of(m)
    if m.bias is not None:
        layer.bias.data = m.bias.double()
    assert_same(layer, x, result=operate(m, x))


# Layers that have kernels of every order, and the shapes of their inputs.
ORDERED = {
    "linear": (lambda: nn.Linear(128, 16), (5, 128)),
    "3x3": (lambda: nn.Conv2d(32, 16, 3, padding=1), (2, 32, 4, 4)),
    "1x1": (lambda: nn.Conv2d(64, 8, 1), (2, 64, 4, 4)),
}


@pytest.fixture(params=ORDERED)
def ordered(request):
    """A folded 2:4 layer and its input, in float32."""
    make, shape = ORDERED[request.param]
    return sparse(make()), torch.randn(shape)


@per_dtype
def test_state_dicts_hold_rows_and_survive_changes_of_the_order(ordered, dtype):
    layer, x = (part.to(dtype) for part in ordered)
    m, (values, positions) = pack(layer), tensors.pack(layer.weight, "2:4")
    state = m.state_dict()
    assert torch.equal(state["values"], values) and torch.equal(state["positions"], positions)
    assert torch.equal(m.dense_weight(), layer.weight)
    for assign in (False, True):
        other = pack(sparse(copy.deepcopy(layer).float()).to(dtype))
        other.values.data.zero_()
        other.load_state_dict(state, assign=assign)
        assert torch.equal(other.dense_weight(), layer.weight)
    other = copy.deepcopy(m)
    other.load_state_dict({"values": 2 * values}, strict=False)
    assert torch.equal(other.dense_weight(), 2 * layer.weight)
    there_and_back = copy.deepcopy(m).bfloat16().float()  # other kernels in between
    assert torch.equal(there_and_back.dense_weight(), layer.weight.bfloat16().float())
    assert torch.equal(pickle.loads(pickle.dumps(m))(x), m(x))


@per_dtype
@torch.no_grad()
def test_operators_take_every_order(ordered, dtype):
    layer, x = (part.to(dtype) for part in ordered)
    m, spots = pack(layer), layer.weight[0, 0].numel()
    rows = tensors.pack(layer.weight, "2:4")
    for order in (orders.ROWS, orders.PAIRS, 8, 16, 32, m.order):
        m.order, (m.values.data, m.positions) = order, orders.arranged(*rows, spots, 2, order)
        assert all(map(torch.equal, orders.rows(m.values, m.positions, spots, 2, order), rows))
        assert_same(layer, x, result=operate(m, x))


@pytest.mark.skipif(torch.bfloat16 not in KINDS, reason="no AVX512-BF16")
@torch.no_grad()
def test_float32_layers_in_slices_compute_in_bfloat16_under_autocast(ordered):
    layer, x = ordered
    m = pack(layer)
    with torch.autocast("cpu", torch.bfloat16):
        result = m(x)
    assert_same(layer.bfloat16(), x.bfloat16(), result=result)


@pytest.mark.parametrize("order", [-2, 3, 4, 12, 24, 64])
def test_orders_that_do_not_fit_are_refused(order):
    values, positions = tensors.pack(sparse(nn.Linear(32, 8)).weight, "2:4")
    with pytest.raises(ValueError, match=f"32 inputs have no packed kernel of order {order}"):
        torch.ops.sparsedm.nm4_linear(torch.randn(2, 32), values, positions, None, order)


def test_the_c_interface_refuses_kernels_larger_than_the_map():
    m = pack(sparse(nn.Conv2d(16, 8, 3, 2)))
    x, y = torch.randn(1, 16, 2, 2), torch.full((1, 8, 1, 1), 7.0)
    pointers = x.data_ptr(), m.values.data_ptr(), m.positions.data_ptr(), None, y.data_ptr()
    refused = [
        build.library().sparsedm_nm4_conv2d(*pointers, 0, 1, 16, 2, 2, 8, 3, 3, 2, 0, 2, orders.ROWS),
        build.library().sparsedm_sliced_conv2d(*pointers, 1, 16, 2, 2, 8, 3, 0, 2),
    ]
    assert 0 not in refused and (y == 7).all()


def _poisoned(x: torch.Tensor, where: torch.Tensor | bool = True) -> torch.Tensor:
    """x with a few NaN and infinities, at random and only where told."""
    values = torch.tensor([torch.nan, torch.inf, -torch.inf], dtype=x.dtype)[torch.randint(3, x.shape)]
    return torch.where((torch.rand(x.shape) < 0.03) & where, values, x)


def _inputs_last(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What every output is computed from, in the order of `weight.flatten(1)`: [tokens or pixels, inputs]."""
    if isinstance(layer, nn.Linear):
        return x.reshape(-1, layer.in_features)
    columns = functional.unfold(x, layer.kernel_size, padding=layer.padding, stride=layer.stride)
    return columns.transpose(1, 2).flatten(0, 1)


def _outputs_last(layer: nn.Module, y: torch.Tensor) -> torch.Tensor:
    return (y if isinstance(layer, nn.Linear) else y.movedim(1, -1)).reshape(-1, len(layer.weight)).double()


SMALL_CASES = st.one_of(linear_cases(most_tokens=20), convolution_cases(most=5))


@examples
@given(case=SMALL_CASES, in_weight=st.booleans())
@torch.no_grad()
def test_nan_and_infinity_pass_kept_weights_as_in_dense_and_stop_at_skipped_ones(case, in_weight):
    layer, x = case.make()
    layer.weight.mul_(torch.rand(layer.weight.shape) > 0.1)  # so that zeros are kept too: times infinity they are NaN
    kept = nm.mask(layer.weight, case.pattern)
    if in_weight:
        layer.weight.copy_(_poisoned(layer.weight, kept & (layer.weight != 0)))
    else:
        x = _poisoned(x)
    result, exact = pack(layer, case.pattern)(x), copy.deepcopy(layer).double()
    result, dense = _outputs_last(layer, result), _outputs_last(layer, exact(x.double()))
    inputs, weight = _inputs_last(layer, x.double()), exact.weight.flatten(1)
    expected = torch.stack([inputs[:, k] @ w[k] for w, k in zip(weight, kept.flatten(1))], -1)
    if exact.bias is not None:
        expected += exact.bias
    close = {"rtol": KINDS[case.dtype].tolerance, "atol": 10 * KINDS[case.dtype].tolerance, "equal_nan": True}
    torch.testing.assert_close(result, expected, **close)
    differs = (~inputs.isfinite()).double() @ (weight == 0).double().T > 0  # dense multiplies what is not finite by a zero
    torch.testing.assert_close(result[~differs], dense[~differs], **close)


@examples
@given(case=CASES)
@torch.no_grad()
def test_results_are_the_same_bits_with_any_number_of_threads(case):
    layer, x = case.make()
    m, results = pack(layer, case.pattern), []
    for threads in (1, 2, 3):
        with speed.with_threads(threads):
            results.append(m(x))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@per_dtype
@torch.no_grad()
def test_concurrent_calls_give_the_same_bits_as_lone_ones(dtype):
    linear, conv = sparse(nn.Linear(64, 300)).to(dtype), sparse(nn.Conv2d(16, 40, 3, padding=1)).to(dtype)
    jobs = [(pack(linear), torch.randn(200, 64, dtype=dtype)), (pack(conv), torch.randn(2, 16, 12, 12, dtype=dtype))]
    expected, same, barrier = [m(x) for m, x in jobs], [], threading.Barrier(4)

    def work():
        barrier.wait()
        with torch.no_grad():
            same.extend(torch.equal(m(x), y) for _ in range(20) for (m, x), y in zip(jobs, expected))

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(same) == 4 * 20 * len(jobs) and all(same)


@pytest.fixture(params=["linear", "convolution"])
def layer(request):
    """A folded 2:4 layer of either kind."""
    return sparse(nn.Linear(32, 8) if request.param == "linear" else nn.Conv2d(16, 8, 3, 2, 1))


@pytest.fixture
def x(layer):
    """An input of `layer`."""
    return torch.randn((3, 32) if isinstance(layer, nn.Linear) else (2, 16, 6, 5))


def test_gradients_are_refused(layer, x):
    with pytest.raises(RuntimeError, match="packed layers have no gradient: sample under torch.no_grad()"):
        pack(layer)(x.requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.complex64], ids=str)
def test_inputs_of_other_dtypes_are_refused(layer, x, dtype):
    with pytest.raises(ValueError, match="takes float32, bfloat16 or float16"):
        pack(layer)(x.to(dtype))


def test_tracing_keeps_the_operators(layer, x):
    fast = pack(layer)
    torch.testing.assert_close(torch.jit.trace(fast, x)(x + 1), fast(x + 1))


def test_layers_survive_pickling(layer, x):
    fast = pack(layer)
    assert torch.equal(pickle.loads(pickle.dumps(fast))(x), fast(x))


@pytest.mark.parametrize("cast", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_half_precision_inputs_are_computed_in_float32(layer, x, cast):
    torch.testing.assert_close(pack(layer)(x.to(cast)), layer(x.to(cast).float()).to(cast))


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m.values, "data", m.values[:, :-2]),
        lambda m: setattr(m.values, "data", m.values[:-1]),
        lambda m: setattr(m, "positions", m.positions[:-1]),
        lambda m: setattr(m, "positions", m.positions.int()),
        lambda m: setattr(m, "bias", m.bias[:-1]),
    ],
    ids=["short rows", "too few rows", "too few positions", "positions of another type", "short bias"],
)
@torch.no_grad()
def test_buffers_that_do_not_fit_are_refused_before_the_kernel_runs(layer, x, change):
    m = pack(layer)
    change(m)
    with pytest.raises(ValueError, match="do not fit|packed kernel"):
        m(x)
    with pytest.raises(ValueError, match="do not fit|packed kernel"):
        operate(m, x)


@pytest.mark.parametrize("name", ["values", "bias", "x"])
def test_operators_refuse_float64(layer, x, name):
    m = pack(layer)
    if name == "x":
        x = x.double()
    else:
        getattr(m, name).data = getattr(m, name).double()
    with pytest.raises(ValueError, match="packed kernel"):
        operate(m, x)


@torch.no_grad()
def test_inputs_that_are_no_pictures_or_too_small_are_refused():
    conv = pack(sparse(nn.Conv2d(16, 8, 3)))
    with pytest.raises(ValueError, match="x is .B, C, H, W. with C a multiple of 4, not .16, 6, 6."):
        conv(torch.randn(16, 6, 6))
    with pytest.raises(ValueError, match="smaller than the kernel"):
        conv(torch.randn(1, 16, 2, 6))


@pytest.mark.parametrize("shape", [(3, 64), (3, 16), (), (0,)], ids=str)
def test_linear_inputs_of_another_width_are_refused(shape):
    with pytest.raises(ValueError, match="takes 32 inputs"):
        pack(sparse(nn.Linear(32, 8)))(torch.zeros(shape))


@pytest.mark.parametrize("channels", [8, 32])
def test_pictures_with_other_channels_are_refused(channels):
    with pytest.raises(ValueError, match="takes 16 inputs"):
        pack(sparse(nn.Conv2d(16, 8, 3)))(torch.randn(1, channels, 5, 5))


@pytest.mark.parametrize(
    ("kernel", "stride", "padding"), [([3, 3], 0, 0), ([3, 3], 1, -1), ([3], 1, 0), ([-3, -3], 1, 0), ([0, 3], 1, 0)], ids=str
)
def test_what_is_no_convolution_is_refused(kernel, stride, padding):
    m = pack(sparse(nn.Conv2d(16, 8, 3)))
    with pytest.raises(ValueError, match="no convolution"):
        torch.ops.sparsedm.nm4_conv2d(torch.randn(1, 16, 5, 5), m.values, m.positions, m.bias, kernel, stride, padding)


@per_dtype
@torch.no_grad()
def test_strides_beyond_the_picture_read_the_first_pixels(dtype):
    for stride, padding in [(7, 1), (1000, 1), (2**27, 0), (2**27, 3)]:
        assert_same(sparse(nn.Conv2d(16, 8, 3, stride, padding)).to(dtype), torch.randn(2, 16, 6, 5, dtype=dtype))


@per_dtype
@pytest.mark.parametrize(
    ("stride", "padding"), [(2**62, 0), (2**63 - 1, 0), (2**41, 2**40), (2**62, 2**61), (2**30, 2**29), (2**28, 2**27)], ids=str
)
def test_sizes_that_overflow_are_refused_by_the_kernel(dtype, stride, padding):
    m = pack(sparse(nn.Conv2d(16, 8, 3)).to(dtype))
    with pytest.raises(ValueError, match=f"no kernel for the sizes .*{stride}, {padding}, .*too large"):
        torch.ops.sparsedm.nm4_conv2d(
            torch.randn(1, 16, 5, 5, dtype=dtype), m.values, m.positions, m.bias, [3, 3], stride, padding
        )


def test_small_stacks_are_enough():
    """Python threads may have less stack than a block of sums needs (the sanitizer needs more, so it skips this)."""
    conv, x, results = pack(sparse(nn.Conv2d(64, 256, 3, padding=1))), torch.randn(1, 64, 16, 16), []
    before = threading.stack_size(131072)
    try:
        thread = threading.Thread(target=lambda: results.append(conv(x)))
        thread.start()
    finally:
        threading.stack_size(before)
    thread.join()
    assert torch.equal(results[0], conv(x))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_operators_pass_torchs_own_checks(bias):
    linear, conv = pack(sparse(nn.Linear(32, 7, bias))), pack(sparse(nn.Conv2d(16, 3, (1, 3), 2, 2, bias=bias)))
    arguments = (linear.values, linear.positions, linear.bias)
    for shape in [(5, 32), (0, 32), (32,), (2, 1, 32)]:
        torch.library.opcheck(torch.ops.sparsedm.nm4_linear.default, (torch.randn(shape), *arguments))
    arguments = (conv.values, conv.positions, conv.bias, [1, 3], 2, 2)
    for size in [(1, 1), (6, 5)]:
        torch.library.opcheck(torch.ops.sparsedm.nm4_conv2d.default, (torch.randn(2, 16, *size), *arguments))


@torch.no_grad()
def test_compile_and_export_keep_the_operators():
    model = nn.Sequential(pack(sparse(nn.Conv2d(16, 8, 3, padding=1))), nn.Flatten(2), pack(sparse(nn.Linear(24, 5)))).eval()
    x = torch.randn(2, 16, 4, 6)
    expected = model(x)
    assert torch.equal(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected)
    exported = torch.export.export(model, (x,))
    called = {str(node.target) for node in exported.graph.nodes}
    assert {"sparsedm.nm4_linear.default", "sparsedm.nm4_conv2d.default"} <= called
    assert torch.equal(exported.module()(x), expected)


# Without optimisation, which takes three times as long as all the rest and hides what is read for nothing.
SANITIZER = "-fsanitize=address,undefined -fno-sanitize-recover=all -g1 -O0"
# Tests, and then a tensor that has lost its end: proof that the sanitizer sees what kernels read, whatever their interface.
_READ_TOO_FAR = """
import sys, pytest
if pytest.main(sys.argv[1:]):
    sys.exit("tests failed")
import torch, sparsedm.packing.kernels
x, values, positions = torch.randn(3, 32), torch.randn(8, 16), torch.zeros(32, dtype=torch.uint8)
torch.ops.sparsedm.nm4_linear(x, values, positions, None)
print("within bounds", flush=True)
x.untyped_storage().resize_(64)
torch.ops.sparsedm.nm4_linear(x, values, positions, None)
"""


_PYTEST = ("-o", "addopts=", "-p", "no:cacheprovider", "-q", "-s", __file__, "-k")
_FEW = {"OMP_NUM_THREADS": "2", EXAMPLES: "10"}
_NARROWER = """
import os, pytest, sys, torch
os.environ |= changes
torch.set_num_threads(2)
sys.exit(pytest.main(arguments))
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="another processor")
@pytest.mark.parametrize("flags", ["-march=x86-64", "-march=x86-64-v3"])
def test_narrower_vectors_compute_the_same(flags, tmp_path):
    import ranks  # here, since the sanitizer's process imports this file and not this

    changes = {**_FEW, build.EXTRA_FLAGS: f"{flags} -O1", "XDG_CACHE_HOME": str(tmp_path)}
    code, printed = ranks.execute(tmp_path / "told", _NARROWER, changes=changes, arguments=[*_PYTEST, "equals or edges"])
    assert code == 0 and "passed" in printed and list(tmp_path.rglob("*.so")), printed[-4000:]


def test_address_sanitizer_finds_nothing_in_this_file(tmp_path):
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ to build the kernels with an address sanitizer")
    names = ["libasan.so", "libstdc++.so"]
    found = [subprocess.check_output([compiler, f"-print-file-name={name}"], text=True).strip() for name in names]
    if not all(map(os.path.isabs, found)):
        pytest.skip(f"g++ comes without {' or '.join(names)}")
    # The sanitizer has to be loaded first, with libstdc++ to catch exceptions.
    changes = {"CXX": compiler, "LD_PRELOAD": " ".join(found), "ASAN_OPTIONS": "detect_leaks=0"}
    changes |= {**_FEW, build.EXTRA_FLAGS: SANITIZER, "XDG_CACHE_HOME": str(tmp_path)}
    # Left out are tests of Python alone, and what has a process of its own.
    rest = "not sanitizer and not compile and not torchs and not narrower and not stacks and not memory"
    rest += " and not touch and not library and not somebody_else and not cache_folder"
    command = [sys.executable, "-c", _READ_TOO_FAR, *_PYTEST, rest]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | changes, cwd=Path(__file__).parents[1])
    said = (done.stdout + done.stderr)[-8000:]
    assert done.returncode and "within bounds" in done.stdout and "skipped" not in done.stdout, said
    assert done.stderr.count("ERROR: AddressSanitizer") == 1 and "heap-buffer-overflow" in done.stderr, said
    assert build.SOURCES[0].name in done.stderr


_SHORT_OF_MEMORY = """
import resource, torch
from sparsedm.masking import nm
from sparsedm.packing import packed
conv = torch.nn.Conv2d(64, 4, 3, padding=1).requires_grad_(False)  # a form that pads its maps
conv.weight.copy_(nm.masked(conv.weight, nm.mask(conv.weight, "2:4")))
fast = packed.packed_layer(conv.eval(), "2:4")
small, large = torch.randn(1, 64, 8, 8), torch.zeros(1, 64, 1600, 1600)
expected = fast(small)
pages = int(open("/proc/self/statm").read().split()[0])
used, output, padded = pages * resource.getpagesize(), 4 * 1600**2 * 4, 64 * 1602**2 * 4
limits = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (used + output + padded // 2, limits[1]))
try:
    fast(large)
except MemoryError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_AS, limits)
print(torch.equal(fast(small), expected))
print(fast(large).shape)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc and RLIMIT_AS")
def test_too_little_memory_is_an_error_and_not_the_end(tmp_path):
    import ranks

    code, printed = ranks.execute(tmp_path, _SHORT_OF_MEMORY)
    assert code == 0, printed
    first, same, whole = printed.splitlines()
    assert "could not allocate its panels for x [1, 64, 1600, 1600]" in first
    assert same == "True" and whole == "torch.Size([1, 4, 1600, 1600])"


# Tensors with no memory before their start or after their end: a sanitizer does not see what masked vector loads touch.
_FENCED = """
import ctypes, itertools, mmap, torch
from sparsedm.masking import nm
from sparsedm.packing import packed
from sparsedm.packing.kernels import build, orders

libc, page, kept = ctypes.CDLL(None), mmap.PAGESIZE, []

def fenced(x, at_end):
    size = x.numel() * x.element_size()
    room = -(-size // page) * page
    memory = mmap.mmap(-1, room + 2 * page)
    kept.append(memory)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert not any(libc.mprotect(ctypes.c_void_p(at), page, 0) for at in (start, start + page + room))
    offset = page + (room - size if at_end else 0)
    return torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=offset).view(x.shape).copy_(x)

def check(layer, x, name, *sizes):
    layer.weight.data = nm.masked(layer.weight, nm.mask(layer.weight, "2:4")).detach()
    m = packed.packed_layer(layer, "2:4")
    assert m.order != orders.ROWS
    expected = m(x)
    for at_end in (False, True):
        parts = [fenced(part, at_end) for part in (x, m.values.data, m.positions, m.bias, torch.zeros_like(expected))]
        assert getattr(build.library(), name)(*(part.data_ptr() for part in parts), *sizes, 2) == 0
        assert torch.equal(parts[-1], expected), (layer, x.shape)

torch.manual_seed(0)
with torch.no_grad():
    for tokens, (inputs, outputs) in itertools.product((1, 15, 33, 120, 260), ((64, 8), (128, 264))):
        sizes = tokens, inputs, outputs
        check(torch.nn.Linear(inputs, outputs), torch.randn(tokens, inputs), "sparsedm_sliced_linear", *sizes)
    maps = [(1, 1), (2, 2), (4, 4), (8, 8), (5, 7), (3, 20), (16, 16), (9, 40), (17, 33)]
    for (height, width), images, (channels, kernel, padding) in itertools.product(
        maps, (1, 3), ((8, 3, 1), (16, 3, 2), (32, 3, 1), (64, 1, 0), (64, 1, 1))
    ):
        conv, x = torch.nn.Conv2d(channels, 16, kernel, padding=padding), torch.randn(images, channels, height, width)
        check(conv, x, "sparsedm_sliced_conv2d", *x.shape, 16, kernel, padding)
print("within bounds")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs mprotect")
@pytest.mark.skipif(not orders.best((16, 16, 3, 3), 1, 2, torch.float32), reason="no AVX-512")
def test_sliced_kernels_touch_nothing_beyond_their_tensors(tmp_path):
    import ranks

    assert ranks.execute(tmp_path, _FENCED) == (0, "within bounds\n")


# --- the compiled library ---------------------------------------------------------------------------------------------


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """`cached()`: the kernels' loader as a new process finds it, with a compiler that notes each call in `cached.compiled`."""
    source, compiler, compiled = build.library()._name, tmp_path / "compiler", tmp_path / "compiled"
    compiler.write_text(f"""#!/bin/sh
[ "$1" = --version ] && exit
case " $* " in *" -c "*) ;; *) echo >> {compiled} ;; esac
while [ "$1" != -o ]; do shift; done
cp {source} "$2"
""")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def fresh():
        spec = importlib.util.spec_from_file_location("sparsedm.packing.kernels.fresh", build.__file__)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    fresh.compiled = lambda: compiled.read_text().count("\n")
    assert fresh().library() is not None and fresh.compiled() == 1
    assert fresh().library() is not None and fresh.compiled() == 1  # kept
    (fresh.library,) = (tmp_path / "sparsedm").glob("*.so")
    return fresh


DAMAGE = {
    "empty": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "one bit": lambda content: content[:5000] + bytes([content[5000] ^ 1]) + content[5001:],
    "no library": lambda content: b"nothing" * 100,
    "longer": lambda content: content + b"\0",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_library_is_compiled_again(cached, damage):
    other = cached.library.with_name("other")  # in its own place: that of the library is mapped into this process
    other.write_bytes(DAMAGE[damage](cached.library.read_bytes()))
    other.chmod(0o755)
    os.replace(other, cached.library)
    assert cached().library().sparsedm_has_bfloat() in (0, 1) and cached.compiled() == 2
    assert cached().library() is not None and cached.compiled() == 2


@pytest.mark.parametrize("loose", ["the library", "its folder"])
@pytest.mark.parametrize("mode", [0o775, 0o757])
def test_a_library_that_others_may_write_is_compiled_again(cached, loose, mode):
    path = cached.library if loose == "the library" else cached.library.parent
    path.chmod(mode)
    assert cached().library() is not None and cached.compiled() == 2
    assert path.stat().st_mode & 0o777 == 0o755
    assert cached().library() is not None and cached.compiled() == 2


@pytest.mark.skipif(os.getuid() != 0, reason="only root may give files away")
def test_what_belongs_to_somebody_else_is_not_loaded(cached):
    os.chown(cached.library, 65534, 65534)
    assert cached().library() is not None and cached.compiled() == 2 and cached.library.stat().st_uid == 0
    os.chown(cached.library.parent, 65534, 65534)
    module = cached()
    with pytest.warns(UserWarning, match="kernels are off.*sparsedm belongs to another user; remove it, or set XDG_CACHE_HOME"):
        assert module.library() is None
    assert "belongs to another user" in module.why_off() and cached.compiled() == 2


def test_a_cache_folder_is_closed_to_others(cached):
    assert cached.library.parent.stat().st_mode & 0o777 == 0o700 and cached.library.stat().st_mode & 0o777 == 0o755


def test_prebuilt_libraries_need_no_compiler(cached, tmp_path, monkeypatch):
    folder = tmp_path / "prebuilt"
    cached().prebuild(folder)
    assert {path.name for path in folder.iterdir()} == {f"nm-{level}.so" for level in build.LEVELS}
    monkeypatch.setenv(build.PREBUILT, str(folder))
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))

    def loaded(features):
        module = cached()
        module._features = lambda: features
        return module.library()

    for level, features in build.LEVELS.items():
        assert loaded(features)._name == str(folder / f"nm-{level}.so")
    (folder / "nm-x86-64-v4.so").chmod(0o777)
    assert loaded(build.LEVELS["x86-64-v4"] | build.LEVELS["x86-64-v3"])._name == str(folder / "nm-x86-64-v3.so")
    with pytest.warns(UserWarning, match="kernels are off.*no C.. compiler"):
        assert loaded({"sse2"}) is None
