"""Packed layers: equal to the folded ones, honest about what they skip, and refused where they cannot work."""

import copy
import os

import pytest
import ranks
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

import sparsedm
from sparsedm.checkpoints import folders
from sparsedm.masking import layers, nm
from sparsedm.measure import macs
from sparsedm.models import dryrun
from sparsedm.packing import kernels, packed, tuning

pytestmark = pytest.mark.skipif(not kernels.available(), reason="no C++ compiler for the packed kernels")


def sparse(layer: nn.Module, pattern: str = "2:4") -> nn.Module:
    with torch.no_grad():
        layer.weight.copy_(nm.masked(layer.weight, nm.mask(layer.weight, pattern)))
    return layer


@torch.no_grad()
def test_whole_models_pack_run_and_unpack_exactly(model, call):
    student = layers.fold(layers.sparsify(model, "2:4"))
    fast = sparsedm.pack(copy.deepcopy(student), backend="kernel")
    assert packed.has_packed(fast)
    torch.testing.assert_close(call(fast), call(student), rtol=1e-4, atol=1e-5)
    back = sparsedm.unpack(fast)
    assert all(torch.equal(v, back.state_dict()[k]) for k, v in student.state_dict().items())
    torch.testing.assert_close(call(back), call(student), rtol=1e-5, atol=1e-6)  # threads may sum in another order


def test_macs_executed_are_those_of_the_packed_layers():
    student = sparsedm.load("glyphs-uvit-2x4")
    folded = macs.count(student)
    fast = macs.count(sparsedm.pack(student, backend="kernel"))
    assert folded.executed == folded.dense == fast.dense and fast.executed == fast.sparse == folded.sparse


@torch.no_grad()
def test_saving_a_packed_model_keeps_every_weight(tmp_path):
    student = sparsedm.load("glyphs-unet-2x4")
    expected = copy.deepcopy(student).state_dict()
    fast = sparsedm.pack(student, backend="kernel")
    sparsedm.save(fast, tmp_path / "plain")
    sparsedm.save_packed(fast, tmp_path / "packed")
    fast.save_pretrained(tmp_path / "diffusers")
    for back in (
        sparsedm.load(tmp_path / "plain"),
        sparsedm.load(tmp_path / "packed"),
        type(fast).from_pretrained(tmp_path / "diffusers"),
    ):
        assert all(torch.equal(v, back.state_dict()[k]) for k, v in expected.items())
    assert packed.has_packed(fast)  # untouched


def test_the_packed_file_holds_the_state_dict_of_the_packed_model(tmp_path):
    student = sparsedm.load("glyphs-unet-2x4")
    sparsedm.save_packed(student, tmp_path / "packed")
    state, stored = sparsedm.pack(student, backend="kernel").state_dict(), load_file(tmp_path / "packed" / folders.WEIGHTS)
    assert state.keys() == stored.keys() and all(torch.equal(value, stored[key]) for key, value in state.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_half_precision_models_pack_in_their_dtype(dtype):
    student = sparsedm.load("glyphs-uvit-2x4").to(dtype)
    fast = sparsedm.pack(copy.deepcopy(student), backend="kernel")
    layer = next(m for m in fast.modules() if packed.is_packed(m))
    assert layer.values.dtype == dtype
    x = dryrun.example_inputs(student, 2) | {"sample": torch.randn(2, 1, 16, 16).to(dtype)}
    result, expected = fast(**x).sample, student(**x).sample
    assert result.dtype == dtype and (result - expected).abs().max() < 0.03 * expected.abs().max()


@pytest.mark.skipif(not kernels.available(torch.bfloat16), reason="no AVX512-BF16")
@torch.no_grad()
def test_under_autocast_layers_compute_in_bfloat16():
    layer = packed.packed_layer(sparse(nn.Linear(64, 32)), "2:4")
    x = torch.randn(7, 64)
    with torch.autocast("cpu", torch.bfloat16):
        fast = layer(x)
        expected = layer.plain()(x)
    assert fast.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(fast, expected, rtol=2**-7, atol=2**-7)
    assert layer(x).dtype == torch.float32


def test_a_packed_model_survives_pickling_and_copies_save_themselves(tmp_path):
    fast = sparsedm.pack(sparsedm.load("glyphs-uvit-2x4"), backend="kernel")
    torch.save(fast, tmp_path / "model.pt")
    back = torch.load(tmp_path / "model.pt", weights_only=False)
    assert all(torch.equal(value, back.state_dict()[key]) for key, value in fast.state_dict().items())
    copied = copy.deepcopy(fast)
    with torch.no_grad():
        copied.pos_embed.zero_()
    copied.save_pretrained(tmp_path / "copy")
    assert not sparsedm.load(tmp_path / "copy").pos_embed.any() and fast.pos_embed.any()


def test_patterns_are_timed_apart_and_leave_the_random_numbers_alone(monkeypatch):
    keys = []

    def record(key, variants, **options):
        variants()
        keys.append(key)
        return tuning.Times(2.0, 1.0, 2.0)

    monkeypatch.setattr(tuning, "times", record)
    state = torch.get_rng_state()
    for pattern in ("1:4", "3:4"):
        model = layers.fold(sparsedm.sparsify(sparsedm.load("glyphs-uvit"), pattern))
        torch.set_rng_state(state)
        sparsedm.pack(model, batch=3, inputs=dryrun.example_inputs(model, 1))
        assert torch.equal(torch.get_rng_state(), state)
    whole = [key for key in keys if key[0] == "UViTModel"]
    assert len(set(map(str, whole))) == 2 and all("(3, 1, 16, 16)" in str(key) for key in whole)


@torch.no_grad()
def test_packed_weights_take_little_memory():
    student = sparsedm.load("glyphs-uvit-2x4")
    dense = sum(p.numel() * p.element_size() for p in student.parameters())
    fast = sparsedm.pack(student, backend="kernel")
    assert sum(t.numel() * t.element_size() for t in (*fast.parameters(), *fast.buffers())) < 0.6 * dense


def test_auto_packs_what_is_faster_and_says_why_not(monkeypatch):
    times = {"Linear": tuning.Times(2e-3, 1e-3, 2.0), "Conv2d": tuning.Times(1e-3, 2e-3, 0.5)}
    monkeypatch.setattr(tuning, "times", lambda key, *rest, **options: times.get(key[0], times["Linear"]))
    student = sparsedm.pack(sparsedm.load("glyphs-unet-2x4"))
    states = {row.name: (row.state, row.note) for row in sparsedm.report(student).rows}
    assert states["mid_block.attentions.0.to_q"] == ("packed", "1.00 ms, dense 2.00 ms")
    assert states["mid_block.resnets.0.conv1"] == ("folded", "its packed kernel is no faster here (2.00 ms, dense 1.00 ms)")


def test_auto_leaves_a_model_plain_that_is_no_faster_as_a_whole(monkeypatch):
    times = {"UViTModel": tuning.Times(1.0, 1.0, 1.0)}
    monkeypatch.setattr(tuning, "times", lambda key, *rest, **options: times.get(key[0], tuning.Times(2.0, 1.0, 2.0)))
    student = sparsedm.pack(sparsedm.load("glyphs-uvit-2x4"), batch=2)
    assert not packed.has_packed(student)
    assert all("whole model" in row.note for row in sparsedm.report(student).rows if row.state == "folded")


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


def test_what_cannot_be_timed_is_refused_before_anything_changes():
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 8))  # its class and config tell no inputs
    layers.sparsify(model)
    weights = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=r"Sequential is none of the classes .*pass inputs="):
        sparsedm.pack(model)
    with pytest.raises(TypeError, match="wrong"):
        sparsedm.pack(model, inputs={"wrong": torch.zeros(1, 16)})
    assert model.training and [type(layer) for layer in model] == [layers.NMLinear] * 2
    assert all(map(torch.equal, model.parameters(), weights))
    inputs = {"input": torch.zeros(1, 16)}
    assert not sparsedm.pack(model, inputs=inputs).training and not layers.is_sparse(model)


class Asking(nn.Module):
    """Asks its layers what Wan, ZImage, IP adapters and UNetMotionModel ask theirs."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(64, 32, bias=False), nn.Linear(32, 64)

    def forward(self, x):
        x = x.to(next(iter(self.first.parameters())).dtype)
        x = self.first(input=x.to(self.first.weight.data.device, self.first.weight.data.dtype))
        assert self.second.weight.shape == (64, 32) and self.second.weight.dim() == 2
        return self.second(x.to(self.second.weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@torch.no_grad()
def test_packed_layers_tell_the_dtype_device_and_shape_of_their_weight(dtype):
    model, x = layers.fold(layers.sparsify(Asking())).to(dtype), torch.randn(5, 64, dtype=torch.float64)
    expected = model(x)
    assert packed.is_packed(sparsedm.pack(model, backend="kernel").first)
    torch.testing.assert_close(model(x), expected, rtol=1e-2 if dtype == torch.float16 else 1e-4, atol=1e-3)
    assert (model.first.weight.dtype, model.first.weight.device) == (dtype, torch.device("cpu"))
    assert {p.dtype for p in model.parameters()} == {dtype} and not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    "use",
    [
        lambda weight: weight @ torch.zeros(64, 2),
        lambda weight: F.linear(torch.zeros(1, 64), weight),
        lambda weight: torch.cat([weight.data, weight.data]),
        lambda weight: weight.float().sum(),
        lambda weight: weight.data.copy_(torch.zeros(32, 64)),
        torch.clone,
    ],
)
def test_computing_with_the_weight_of_a_packed_layer_is_refused(use):
    layer = packed.packed_layer(sparse(nn.Linear(64, 32)), "2:4")
    with pytest.raises(RuntimeError, match=r"packed layer.*dense_weight\(\).*unpack"):
        use(layer.weight)


def test_packed_layers_refuse_gradients_to_input_and_parameters():
    layer, x = packed.packed_layer(sparse(nn.Linear(64, 32)), "2:4"), torch.randn(2, 64)
    with pytest.raises(RuntimeError, match="no gradient"):
        layer(x.clone().requires_grad_())
    layer.requires_grad_(True)
    with pytest.raises(RuntimeError, match="no gradient"):
        layer(x)


class Choosy(Asking):
    """Fails in its packed form, or with several pictures."""

    def __init__(self, error):
        super().__init__()
        self.error, self.norm = error, nn.BatchNorm1d(64)

    def forward(self, x):
        if self.error == "packed" and packed.is_packed(self.second):
            raise StopIteration
        if self.error == "batch" and len(x) > 1:
            raise AssertionError("one by one")
        return super().forward(self.norm(x.view(-1, 16).view(len(x), 64)))  # an expanded batch has no such view


@pytest.mark.parametrize(("error", "raised"), [("packed", StopIteration), ("batch", AssertionError), (None, None)])
@pytest.mark.parametrize("state", ["sparse-training", "folded"])
def test_pack_changes_all_or_nothing(error, raised, state, monkeypatch):
    def times(key, variants, **options):
        for run in variants().values():
            run()
        return tuning.Times(2.0, 1.0, 2.0)

    monkeypatch.setattr(tuning, "times", torch.no_grad()(times))
    model, inputs = layers.sparsify(Choosy(error)), {"x": torch.randn(1, 4, 16)}
    if state == "folded":
        layers.fold(model)
    tensors = {id(t): t.clone() for t in (*model.parameters(), *model.buffers())}
    before = [(id(m), type(m), m.training, vars(m).get("dense_reason")) for m in model.modules()]
    if raised is None:
        assert packed.has_packed(sparsedm.pack(model, inputs=inputs)) and not model.training
        return
    with pytest.raises(raised):
        sparsedm.pack(model, inputs=inputs)
    assert [(id(m), type(m), m.training, vars(m).get("dense_reason")) for m in model.modules()] == before
    assert all(torch.equal(t, tensors[id(t)]) for t in (*model.parameters(), *model.buffers()))


@torch.no_grad()
def test_auto_leaves_layers_plain_whose_weight_is_only_read(monkeypatch):
    class Reading(nn.Module):
        def __init__(self):
            super().__init__()
            self.called, self.read = sparse(nn.Linear(64, 64)), sparse(nn.Linear(64, 64))

        def forward(self, x):
            return self.called(F.linear(x, self.read.weight))

    monkeypatch.setattr(tuning, "times", lambda key, *rest, **options: tuning.Times(2.0, 1.0, 2.0))
    model, inputs = Reading(), {"x": torch.randn(1, 64)}
    expected = model(**inputs)
    fast = sparsedm.pack(model, inputs=inputs)
    assert packed.is_packed(fast.called) and "never called" in sparsedm.report(fast, inputs).rows[1].note
    torch.testing.assert_close(fast(**inputs), expected, rtol=1e-4, atol=1e-5)


_WITHOUT = """
import os, pwd, sparsedm
def nobody(_):
    raise KeyError("uid not found")
pwd.getpwuid = nobody
os.environ.clear()
os.environ.update(environment)
model = sparsedm.pack(sparsedm.load("glyphs-uvit-2x4"))
print(sum(reason in row.note for row in sparsedm.report(model).rows), "layers")
"""


@pytest.mark.parametrize(
    ("reason", "environment"),
    [
        ("no C++ compiler found", {"PATH": "", "XDG_CACHE_HOME": "{}"}),
        ("there is no home folder to keep them in; set HOME or XDG_CACHE_HOME", {"PATH": os.environ["PATH"]}),
    ],
    ids=["compiler", "home"],
)
def test_without_kernels_layers_stay_plain_with_one_warning(tmp_path, reason, environment):
    environment = {key: value.format(tmp_path) for key, value in environment.items()}
    code, printed = ranks.execute(tmp_path / "told", _WITHOUT, reason=reason, environment=environment)
    assert code == 0 and "31 layers" in printed.splitlines(), printed
    assert printed.count(f"sparse CPU kernels are off, sparse layers run dense: {reason}") == 1
