"""GPU layers: with a stand-in for torch's compression where there is no GPU, and for real where there is one."""

import copy

import pytest
import torch
from torch import nn

import sparsedm
from sparsedm.masking import layers, nm
from sparsedm.measure import macs, speed
from sparsedm.models import dryrun
from sparsedm.packing import gpu, packed

GPU = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


def sparse(layer: nn.Module) -> nn.Module:
    with torch.no_grad():
        layer.weight.copy_(nm.masked(layer.weight, nm.mask(layer.weight, "2:4")))
    return layer.bfloat16()


@pytest.fixture
def stand_in(monkeypatch):
    """A GPU of capability 8.0 whose compressed weight is the dense one; yields what was compressed."""
    seen = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    monkeypatch.setattr(gpu, "to_sparse_semi_structured", lambda weight: seen.append(weight) or weight.clone())
    return seen


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [(lambda b: nn.Linear(64, 32, bias=b), (2, 5, 64)), (lambda b: nn.Conv2d(64, 32, 1, bias=b), (2, 64, 3, 5))],
    ids=["linear", "conv"],
)
@torch.no_grad()
def test_computes_as_the_plain_layer_and_unpacks_to_it(stand_in, layer, shape, bias):
    plain, x = sparse(layer(bias)), torch.randn(shape).bfloat16()
    fast = gpu.SemiStructuredLayer(plain, "2:4")
    assert [tuple(weight.shape) for weight in stand_in] == [(32, 64)]
    torch.testing.assert_close(fast(x), plain(x), rtol=2**-7, atol=2**-7)
    assert fast(x.to("meta")).shape == plain(x).shape and torch.equal(fast(input=x), fast(x))
    asked = fast.weight, next(fast.parameters())
    assert all((each.dtype, each.device) == (torch.bfloat16, x.device) for each in asked) and asked[0].shape == plain.weight.shape
    for back in (fast.plain(), copy.deepcopy(fast).plain()):
        assert type(back) is type(plain) and all(torch.equal(v, back.state_dict()[k]) for k, v in plain.state_dict().items())


def test_macs_of_compressed_linear_layers_are_those_of_the_plain_ones(stand_in):
    plain = sparse(nn.Linear(64, 32))
    inputs = {"input": torch.zeros(1, 5, 64, dtype=torch.bfloat16)}
    fast = nn.Sequential(gpu.SemiStructuredLayer(plain, "2:4"))
    assert macs.count(fast, inputs).dense == macs.count(nn.Sequential(plain), inputs).dense == 5 * 64 * 32


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Linear(64, 32).bfloat16(), "not 2:4"),
        (sparse(nn.Linear(64, 32)).float(), "float32"),
        (sparse(nn.Linear(64, 20)), "20"),
        (sparse(nn.Conv2d(64, 32, 3)), "larger than 1x1"),
        (sparse(nn.Conv2d(64, 32, 1, stride=2)), "strided"),
        (sparse(nn.Conv2d(64, 32, 1, padding=1)), "padded"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_torch_would_cut_down_or_cannot_do_is_refused(stand_in, layer, reason):
    with pytest.raises(ValueError, match=reason):
        gpu.SemiStructuredLayer(layer, "2:4")
    assert not stand_in


def test_old_gpus_and_gradients_are_refused(stand_in, monkeypatch):
    fast = gpu.SemiStructuredLayer(sparse(nn.Linear(64, 32)), "2:4")
    with pytest.raises(RuntimeError, match="no gradient"):
        fast(torch.randn(2, 64, dtype=torch.bfloat16, requires_grad=True))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    with pytest.raises(ValueError, match=r"capability 8\.0"):
        gpu.SemiStructuredLayer(sparse(nn.Linear(64, 32)), "2:4")


@pytest.mark.skipif(not GPU, reason="no NVIDIA GPU of compute capability 8.0")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_a_model_on_the_gpu_packs_runs_and_unpacks(dtype):
    student = layers.fold(sparsedm.sparsify(sparsedm.build("uvit-s2-cifar10"), "2:4")).to("cuda", dtype)
    fast = sparsedm.pack(copy.deepcopy(student), backend="kernel")
    assert packed.has_packed(fast)
    inputs = {k: torch.randn_like(v) if v.is_floating_point() else v for k, v in dryrun.example_inputs(student, 4).items()}
    expected = student(**inputs).sample
    assert (fast(**inputs).sample - expected).abs().max() < 0.03 * expected.abs().max()
    assert all(torch.equal(v, sparsedm.unpack(fast).state_dict()[k]) for k, v in student.state_dict().items())


@pytest.mark.skipif(not GPU, reason="no NVIDIA GPU of compute capability 8.0")
def test_gpu_benchmarks_have_the_layers_that_have_kernels():
    linear, one_by_one, larger = speed.LINEAR[0], (64, 64, 1, 8), (64, 64, 3, 8)
    rows = speed.measure_layers(("bfloat16",), rounds=2, shapes=(linear, one_by_one, larger), tokens=1024, device="cuda")
    assert [row["what"].split(",")[0] for row in rows] == ["linear 512x2048", "conv 1x1 64x64"]
    (step,) = speed.measure_steps(("uvit-s2-cifar10",), (2,), ("bfloat16",), compiled=False, rounds=2, device="cuda")
    assert step["speedup"] > 0 and step["speedup_over_onednn"] is None and "gpu" in speed.machine("cuda")
