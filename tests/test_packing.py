"""The packed checkpoint: exact, small, and refused when anything in it is wrong."""

import json
import random

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import sparsedm
from sparsedm.checkpoints import folders
from sparsedm.masking import layers, nm
from sparsedm.packing import tensors
from sparsedm.support import tensorfiles

PATTERNS = ["1:2", "1:4", "2:4", "3:4", "4:8", "3:5", "7:8", "5:16", "15:16", "5:64"]


def sparse(pattern: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    weight = torch.randn(shape).to(dtype)
    return nm.masked(weight, nm.mask(weight, pattern))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("rest", [(), (1, 1), (3, 3)], ids=["linear", "1x1", "3x3"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_round_trip_is_exact(pattern, rest, dtype):
    weight = sparse(pattern, (7, 3 * nm.NMPattern.parse(pattern).m, *rest), dtype)
    values, positions = tensors.pack(weight, pattern)
    again = tensors.unpack(values, positions, pattern, weight.shape)
    assert again.dtype == dtype and torch.equal(again, weight)
    assert values.numel() == weight.numel() * nm.NMPattern.parse(pattern).density


def test_layout_by_hand():
    weight = torch.tensor([[0.0, 5.0, 0.0, -6.0, 7.0, 0.0, 0.0, 0.0]])
    values, positions = tensors.pack(weight, "2:4")
    assert values.tolist() == [[5.0, -6.0, 7.0, 0.0]]
    assert positions.tolist() == [0b01_00_11_01]  # 1, 3, then 0 and the first zero, 1


def test_negative_zeros_become_positive_ones():
    weight = torch.tensor([[-0.0, 1.0, -0.0, 2.0]])
    again = tensors.unpack(*tensors.pack(weight, "2:4"), "2:4", weight.shape)
    assert torch.equal(again, weight) and not torch.signbit(again).any()


def test_weight_that_is_not_sparse_is_refused_not_cut():
    with pytest.raises(ValueError, match="is not 2:4: 2 groups"):
        tensors.pack(torch.ones(2, 4), "2:4")


def test_bundled_students_take_nine_sixteenths_and_load_equal(tmp_path):
    for name in (n for n in folders.bundled() if n.endswith("-2x4")):
        model = sparsedm.load(name)
        sparsedm.save_packed(model, tmp_path / name, torch.float16)
        dense = (folders.ASSETS / name / folders.WEIGHTS).stat().st_size
        assert (tmp_path / name / folders.WEIGHTS).stat().st_size < 0.6 * dense
        loaded = sparsedm.load(tmp_path / name)
        assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())
        assert loaded.config.noise_schedule == model.config.noise_schedule


def test_sparse_training_model_is_folded_when_packed(make_model, tmp_path):
    model = layers.sparsify(make_model("unet"))
    sparsedm.save_packed(model, tmp_path / "packed")
    loaded, expected = sparsedm.load(tmp_path / "packed").state_dict(), layers.folded(model).state_dict()
    assert all(torch.equal(value, loaded[key]) for key, value in expected.items())
    assert layers.is_sparse(model)


def test_patterns_that_would_grow_stay_dense(make_model, tmp_path):
    sparsedm.save_packed(layers.sparsify(make_model("uvit"), "7:8"), tmp_path / "packed", torch.float16)
    with safe_open(tmp_path / "packed" / folders.WEIGHTS, "pt") as file:
        assert not any(name.endswith(tensors.VALUES) for name in file.keys())  # noqa: SIM118


def test_folders_of_the_first_version_are_read_and_were_no_smaller(make_model, tmp_path):
    student = layers.fold(layers.sparsify(make_model("unet")))
    sparsedm.save_packed(student, tmp_path)
    new, old, config = (tmp_path / name for name in (folders.WEIGHTS, folders.PACKED, folders.CONFIG))
    weights, metadata = load_file(new), {"format": tensors.FORMAT, "version": "1"}
    listed = {
        f"{name}.weight": {"pattern": str(pattern), "axis": 1, "shape": list(weight.shape), "dtype": str(weight.dtype)}
        for name, pattern in layers.patterns(student).items()
        for weight in [student.get_submodule(name).weight]
    }
    tensorfiles.save(old, weights, metadata | {"layers": json.dumps(listed)})
    assert old.stat().st_size >= new.stat().st_size
    new.unlink()
    config.write_text(json.dumps({k: v for k, v in folders.read_json(config).items() if k != "quantization_config"}))
    state = sparsedm.load(tmp_path).state_dict()
    assert all(torch.equal(value, state[name]) for name, value in student.state_dict().items())


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "packed.safetensors"
    state = {"a.weight": sparse("2:4", (8, 16)), "a.bias": torch.randn(8), "steps": torch.tensor(3)}
    tensors.write(path, state, {"a.weight": nm.NMPattern(2, 4)})
    return path


def rewrite(path, change) -> None:
    """Apply `change(tensors, metadata)` to a file, leaving its checksums as they were."""
    with safe_open(path, "pt") as f:
        tensors, metadata = {name: f.get_tensor(name) for name in f.keys()}, f.metadata()  # noqa: SIM118
    change(tensors, metadata)
    save_file(tensors, path, metadata=metadata)


def _edit_layer(metadata, **changes):
    content = json.loads(metadata[tensors.LAYERS])
    content["layers"]["a"] |= changes
    metadata[tensors.LAYERS] = json.dumps(content)


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        (lambda t, m: t["a.values"].view(-1)[3].neg_(), "a.values is damaged"),
        (lambda t, m: t["a.positions"].bitwise_xor_(1), "a.positions is damaged"),
        (lambda t, m: t.update({"a.bias": torch.zeros(9)}), "a.bias is damaged"),
        (lambda t, m: t.pop("a.bias"), "not those that its metadata lists"),
        (lambda t, m: m.update(version="3"), "format version '3'"),
        (lambda t, m: m.update(format="other"), "not a packed checkpoint"),
        (lambda t, m: m.pop(tensors.LAYERS), "not a readable packed checkpoint"),
        (lambda t, m: _edit_layer(m, pattern="1:4"), "a.weight cannot be unpacked"),
        (lambda t, m: _edit_layer(m, pattern="2-4"), "a.weight cannot be unpacked"),
        (lambda t, m: _edit_layer(m, shape=[16, 8]), "a.weight cannot be unpacked"),
        (lambda t, m: _edit_layer(m, shape="wide"), "a.weight cannot be unpacked"),
    ],
)
def test_damage_is_refused_by_name(file, change, fragment):
    rewrite(file, change)
    with pytest.raises(ValueError, match=fragment):
        tensors.read(file)


def test_any_flipped_or_missing_byte_is_refused_or_harmless(file):
    whole, expected, random_ = file.read_bytes(), tensors.read(file), random.Random(0)
    for _ in range(400):
        damaged = bytearray(whole)
        if random_.random() < 0.2:
            del damaged[random_.randrange(len(damaged)) :]
        else:
            damaged[random_.randrange(len(damaged))] ^= 1 << random_.randrange(8)
        file.write_bytes(damaged)
        try:
            state = tensors.read(file)
        except ValueError:
            continue
        assert all(torch.equal(value, expected[name]) for name, value in state.items() if name in expected)
        assert state.keys() == expected.keys()


def test_positions_that_do_not_increase_are_refused():
    values, positions = tensors.pack(sparse("2:4", (4, 8)), "2:4")
    with pytest.raises(ValueError, match="increasing"):
        tensors.unpack(values, torch.zeros_like(positions), "2:4", (4, 8))
