"""Packed layers: equal to the folded ones, honest about what they skip, and refused where they cannot work."""

import copy
import subprocess
import sys
import threading

import pytest
import torch
from torch import nn

import sparsedm
from sparsedm import kernels, layers, macs, nm, packed

pytestmark = pytest.mark.skipif(not kernels.available(), reason="no C++ compiler for the packed kernels")


def sparse(layer: nn.Module, pattern: str = "2:4") -> nn.Module:
    with torch.no_grad():
        layer.weight.copy_(nm.masked(layer.weight, nm.mask(layer.weight, pattern)))
    return layer


def assert_same(layer: nn.Module, x: torch.Tensor, pattern: str = "2:4") -> None:
    twin = packed.PackedLinear if isinstance(layer, nn.Linear) else packed.PackedConv2d
    with torch.no_grad():
        expected, result = layer(x), twin(layer, pattern)(x)
    assert result.shape == expected.shape and result.dtype == expected.dtype
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item() if expected.numel() else 0)


@pytest.mark.parametrize("pattern", ["1:4", "2:4", "3:4"])
@pytest.mark.parametrize("rows", [0, 1, 15, 16, 17, 129, 300, 1028])
@pytest.mark.parametrize(("inputs", "outputs"), [(16, 1), (48, 33), (128, 300), (80, 16)])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_linear_equals_the_folded_layer(pattern, rows, inputs, outputs, bias):
    assert_same(sparse(nn.Linear(inputs, outputs, bias), pattern), torch.randn(rows, inputs), pattern)


@pytest.mark.parametrize("pattern", ["1:4", "2:4", "3:4"])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding"), [(1, 1, 0), (1, 2, 0), (3, 1, 1), (3, 2, 1), (3, 1, 0), (3, 2, 0), (5, 1, 2), ((1, 3), 1, 1)]
)
@pytest.mark.parametrize("size", [(1, 3, 3), (2, 8, 8), (5, 7, 4), (1, 33, 19)])
def test_convolution_equals_the_folded_layer(pattern, kernel, stride, padding, size):
    images, height, width = size
    assert_same(sparse(nn.Conv2d(16, 37, kernel, stride, padding), pattern), torch.randn(images, 16, height, width), pattern)


def test_other_layouts_and_leading_axes():
    linear, conv = sparse(nn.Linear(32, 24)), sparse(nn.Conv2d(16, 8, 3, padding=1))
    assert_same(linear, torch.randn(32, 5, 7).permute(1, 2, 0))
    assert_same(linear, torch.randn(2, 3, 4, 32))
    assert_same(conv, torch.randn(2, 16, 9, 9).to(memory_format=torch.channels_last))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_same(sparse(nn.Linear(64, 520)), torch.randn(700, 64))
        assert_same(sparse(nn.Conv2d(32, 48, 3, padding=1)), torch.randn(2, 32, 4, 4))
    finally:
        torch.set_num_threads(before)


def test_not_a_number_and_infinity_pass_through():
    linear, x = sparse(nn.Linear(16, 8)), torch.randn(3, 16)
    x[1, nm.mask(linear.weight, "2:4")[0].nonzero()[0, 0]] = float("nan")
    x[2] = float("inf")
    with torch.no_grad():
        result = packed.PackedLinear(linear, "2:4")(x)
    assert result[1].isnan().any() and result[0].isfinite().all() and not result[2].isfinite().any()


def test_concurrent_calls_are_safe():
    layer, x = packed.PackedLinear(sparse(nn.Linear(64, 64)), "2:4"), torch.randn(200, 64)
    with torch.no_grad():
        expected, results = layer(x), []
    workers = [threading.Thread(target=lambda: results.extend(layer(x) for _ in range(20))) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 80 and all(torch.equal(result, expected) for result in results)


def test_gradients_are_refused():
    layer = packed.PackedLinear(sparse(nn.Linear(16, 4)), "2:4")
    with pytest.raises(RuntimeError, match="no gradient"):
        layer(torch.randn(2, 16, requires_grad=True))


@pytest.mark.parametrize("cast", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_are_computed_in_float32(cast):
    linear = sparse(nn.Linear(32, 8))
    x = torch.randn(5, 32).to(cast)
    with torch.no_grad():
        result, expected = packed.PackedLinear(linear, "2:4")(x), linear(x.float()).to(cast)
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m, "values", m.values[:, :-2]),
        lambda m: setattr(m, "positions", m.positions[:-1]),
        lambda m: setattr(m, "values", m.values.double()),
        lambda m: setattr(m, "bias", m.bias[:-1]),
    ],
)
def test_buffers_that_do_not_fit_are_refused_before_the_kernel_runs(change):
    layer = packed.PackedLinear(sparse(nn.Linear(32, 8)), "2:4")
    change(layer)
    with torch.no_grad(), pytest.raises(ValueError, match="do not fit|float32"):
        layer(torch.randn(3, 32))


@torch.no_grad()
def test_whole_models_pack_run_and_unpack_exactly(model, call):
    student = layers.fold(layers.sparsify(model, "2:4"))
    fast = sparsedm.pack(copy.deepcopy(student), backend="kernel")
    assert any(packed.is_packed(m) for m in fast.modules())
    torch.testing.assert_close(call(fast), call(student), rtol=1e-4, atol=1e-5)
    back = sparsedm.unpack(fast)
    assert all(torch.equal(v, back.state_dict()[k]) for k, v in student.state_dict().items())
    torch.testing.assert_close(call(back), call(student), rtol=1e-5, atol=1e-6)  # threads may sum in another order


def test_macs_executed_are_those_of_the_packed_layers():
    student = sparsedm.load("glyphs-uvit-2x4")
    folded = macs.count(student)
    fast = macs.count(sparsedm.pack(student, backend="kernel"))
    assert folded.executed == folded.dense == fast.dense and fast.executed == fast.sparse == folded.sparse


def test_auto_packs_what_is_faster_and_says_why_not(monkeypatch):
    monkeypatch.setattr(packed, "_measured_gain", lambda key, *rest: 2.0 if key[0] is nn.Linear else 0.5)
    monkeypatch.setattr(packed, "WHOLE_FASTER", 0.0)
    student = sparsedm.pack(sparsedm.load("glyphs-unet-2x4"))
    states = {row.name: (row.state, row.note) for row in sparsedm.report(student).rows}
    assert states["mid_block.attentions.0.to_q"][0] == "packed"
    assert states["mid_block.resnets.0.conv1"] == ("folded", "its packed kernel is no faster here (0.50x)")


def test_auto_leaves_a_model_plain_that_is_no_faster_as_a_whole(monkeypatch):
    monkeypatch.setattr(packed, "_measured_gain", lambda *key: 2.0)
    monkeypatch.setattr(packed, "WHOLE_FASTER", 1e9)
    student = sparsedm.pack(sparsedm.load("glyphs-uvit-2x4"), batch=2)
    assert not any(map(packed.is_packed, student.modules()))
    assert all("whole model" in row.note for row in sparsedm.report(student).rows if row.state == "folded")


def test_gain_is_really_measured():
    packed._measured_gain.cache_clear()
    gain = packed._measured_gain((nn.Linear, 512, 512), nm.NMPattern(2, 4), (512, 512), torch.get_num_threads())
    assert 0.1 < gain < 20


@pytest.mark.parametrize(
    ("layer", "pattern", "reason"),
    [
        (nn.Linear(64, 8), "2:8", "2:8"),
        (nn.Linear(36, 8), "2:4", "36 inputs"),
        (nn.Conv2d(16, 8, 3, dilation=2), "2:4", "dilated"),
        (nn.Conv2d(16, 8, 3, padding="same"), "2:4", "padded"),
        (nn.Linear(64, 8).double(), "2:4", "float64"),
        (nn.Bilinear(4, 4, 4), "2:4", "Bilinear"),
    ],
)
def test_layers_without_a_kernel_say_why(layer, pattern, reason):
    assert reason in packed.why_not(layer, nm.NMPattern.parse(pattern))


def test_dense_models_and_unknown_backends_are_refused(model):
    with pytest.raises(ValueError, match="no N:M sparse layer to pack"):
        sparsedm.pack(model)
    with pytest.raises(ValueError, match="unknown backend 'gpu'; known: auto, kernel"):
        sparsedm.pack(model, backend="gpu")


def test_operators_pass_torchs_own_checks():
    layer = packed.PackedLinear(sparse(nn.Linear(32, 8)), "2:4")
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.sparsedm.nm4_linear.default, (torch.randn(3, 32), *layer.buffers()), test_utils=tests)
    conv = packed.PackedConv2d(sparse(nn.Conv2d(16, 8, 3)), "2:4")
    arguments = (torch.randn(2, 16, 6, 6), *conv.buffers(), [3, 3], 1, 0)
    torch.library.opcheck(torch.ops.sparsedm.nm4_conv2d.default, arguments, test_utils=tests)


_WITHOUT = """
import warnings, torch, sparsedm
model = sparsedm.pack(sparsedm.load("glyphs-uvit-2x4"))
print(sum("no C++ compiler" in row.note for row in sparsedm.report(model).rows))
"""


def test_without_a_compiler_layers_stay_plain_with_one_warning(tmp_path):
    environment = {"PATH": "", "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", _WITHOUT], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "31"
    assert done.stderr.count("sparse CPU kernels are off, sparse layers run dense: no C++ compiler found") == 1
