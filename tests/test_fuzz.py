"""Damaged model folders, hundreds of each kind: each is refused at once, by the file's name, or read as what was saved."""

import json
import random
import time

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from safetensors import safe_open
from safetensors.torch import save_file

from sparsedm import diffusion
from sparsedm.checkpoints import folders
from sparsedm.masking import layers
from sparsedm.models import denoisers
from sparsedm.models.uvit import UViTModel
from sparsedm.packing import tensors
from sparsedm.pruning import diffpruning

COUNT = 300
SECONDS = 5.0  # of computing, on a busy machine, for any damaged folder
CONFIG = {"sample_size": 8, "in_channels": 1, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 3}
SCHEDULE = {
    "num_train_timesteps": 1000, "prediction_type": "v_prediction", "beta_start": 1e-4, "beta_end": 0.02,
    "beta_schedule": "linear", "clip_sample": True, "trained_betas": None,
}  # fmt: skip
DEEP = json.loads("[" * 200 + "]" * 200)
VALUES = (
    None, "x", "", "8", [], {}, [1, 2], -1, 0, 1.5, True, 4096, 65536, 10**9, 10**30, float("nan"), float("inf"), DEEP,
    {"a": {"b": [1]}}, {"mid_block.mlp.fc1": {"out": "0-999999999"}},
)  # fmt: skip


def load(folder, *files):
    """The model in a folder, or None if it was refused as a damaged one must be."""
    began = time.process_time()
    try:
        return folders.load(folder)
    except (ValueError, OSError) as error:
        assert any(file in str(error) for file in files), error
        return None
    finally:
        assert time.process_time() - began < SECONDS


def same(model, back) -> bool:
    stored = back.state_dict()
    return all(torch.equal(value, stored[key]) for key, value in model.state_dict().items())


def damaged(content: bytes, draw: random.Random) -> bytes:
    """The bytes with one to three of: a bit flipped, a byte changed, a piece cut out, doubled or moved, the end lost."""
    data = bytearray(content)
    for _ in range(draw.randint(1, 3)):
        at, length = draw.randrange(len(data)), draw.randint(1, 40)
        kind = draw.randrange(6)
        if kind == 0:
            data[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            data[at] = draw.randrange(256)
        elif kind == 2:
            del data[at : at + length]
        elif kind == 3:
            data[at:at] = data[at : at + length]
        elif kind == 4:
            piece = data[at : at + length]
            del data[at : at + length]
            to = draw.randrange(len(data) + 1)
            data[to:to] = piece
        else:
            del data[max(at, 1) :]
        data = data or bytearray(b"\0")
    return bytes(data)


def uvit() -> UViTModel:
    torch.manual_seed(0)
    model = UViTModel(**CONFIG)
    model.register_to_config(noise_schedule=SCHEDULE)
    return model


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_damaged_weights_are_refused_or_read_whole(packed, tmp_path):
    model = layers.fold(layers.sparsify(uvit(), "2:4"))
    folders.save(model, tmp_path, packed=packed)
    file, draw, refused = folders.weights_of(tmp_path), random.Random(1), 0
    whole = file.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for i in range(COUNT):
        file.write_bytes(damaged(whole[:header], draw) + whole[header:] if i % 2 else damaged(whole, draw))
        back = load(tmp_path, file.name)
        refused += back is None
        assert back is None or same(model, back)
    assert refused > 0.8 * COUNT


@pytest.mark.parametrize("key", ["checksums", tensors.LAYERS, "format", "version"])
def test_any_metadata_of_a_packed_file_is_read_or_refused(key, tmp_path):
    model = layers.fold(layers.sparsify(uvit(), "2:4"))
    folders.save_packed(model, tmp_path)
    file = folders.weights_of(tmp_path)
    with safe_open(file, "pt") as opened:
        weights, metadata = {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata()  # noqa: SIM118
    values = [json.dumps(value) for value in VALUES] + ["[" * 100_000, "²", "\0", ""]
    if key == tensors.LAYERS:
        first, *_ = known = json.loads(metadata[key])["layers"]
        for part in (None, *known[first]):
            listed = [known | {first: value if part is None else known[first] | {part: value}} for value in VALUES]
            values += [json.dumps({"layers": layers}) for layers in (*listed, *VALUES)]
    for value in values:
        save_file(weights, file, metadata | {key: value})
        back = load(tmp_path, file.name)
        assert back is None or same(model, back)


def test_damaged_indexes_are_refused_or_read_whole(tmp_path):
    model = uvit()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    file = tmp_path / folders.INDEX
    whole, draw, refused = file.read_bytes(), random.Random(3), 0
    for _ in range(COUNT):
        file.write_bytes(damaged(whole, draw))
        back = load(tmp_path, file.name, ".safetensors")
        refused += back is None
        assert back is None or same(model, back)
    assert refused > 0.9 * COUNT


def test_damaged_configs_and_records_are_refused_or_give_a_model_of_these_weights(tmp_path):
    pruned = diffpruning.prune(uvit(), 0.5, score="random")
    folders.save(pruned, tmp_path)
    file = tmp_path / folders.CONFIG
    whole, draw, refused = file.read_bytes(), random.Random(2), 0
    assert "pruning" in json.loads(whole)
    for _ in range(COUNT):
        file.write_bytes(damaged(whole, draw))
        back = load(tmp_path, file.name)
        refused += back is None
        assert back is None or same(pruned, back)
    assert refused > 0.5 * COUNT


def unet() -> UNet2DModel:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    sizes = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (8, 16), "layers_per_block": 1}
    return UNet2DModel(**blocks, **sizes, norm_num_groups=4, attention_head_dim=8)


@pytest.mark.parametrize("make", [uvit, unet])
def test_any_value_in_a_config_is_refused_or_gives_a_model_of_these_weights(make, tmp_path):
    model, refused, read = make(), 0, 0
    folders.save(model, tmp_path)
    file = tmp_path / folders.CONFIG
    config = json.loads(file.read_text()) | {"pruning": None, "noise_schedule": None}
    changes = [{key: value} for key in config for value in VALUES] + [{key: ...} for key in config]
    for change in random.Random(4).sample(changes, 150):
        other = {name: value for name, value in {**config, **change}.items() if value is not ...}
        file.write_text(json.dumps(other))
        back = load(tmp_path, file.name)
        refused, read = refused + (back is None), read + (back is not None)
        assert back is None or same(model, back)
    assert refused > 50 and read > 10


def test_any_value_in_a_noise_schedule_is_refused_or_sampled_with(tmp_path):
    model, refused, drawn = uvit(), 0, 0
    folders.save(model, tmp_path)
    file = tmp_path / folders.CONFIG
    config, labels = json.loads(file.read_text()), torch.zeros(1, dtype=torch.long)
    for key in SCHEDULE:
        for value in VALUES:
            file.write_text(json.dumps(config | {"noise_schedule": SCHEDULE | {key: value}}))
            back = load(tmp_path, file.name)
            refused += back is None
            for sampler in diffusion.SAMPLERS if back else ():
                noise = diffusion.start_noise(back, 1)
                steps = min(2, back.config.noise_schedule["num_train_timesteps"])
                diffusion.generate(back, noise, sampler=sampler, steps=steps, class_labels=labels)
                drawn += 1
    assert refused > 80 and drawn > 50


def text_unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    sizes = {"sample_size": 8, "block_out_channels": (8,), "layers_per_block": 1, "cross_attention_dim": 8}
    return UNet2DConditionModel(**blocks, **sizes, norm_num_groups=4, attention_head_dim=4)


@pytest.mark.parametrize("make", [unet, text_unet])
def test_a_negative_size_is_refused_at_load_and_not_by_the_first_call(make, tmp_path):
    model, refused = make(), set()
    folders.save(model, tmp_path)
    file = tmp_path / folders.CONFIG
    config = json.loads(file.read_text())
    numbers = [key for key, value in config.items() if type(value) is int]
    for key in {*numbers, "attention_head_dim", "norm_num_groups", "attn_norm_num_groups"}:
        file.write_text(json.dumps(config | {key: -1}))
        try:
            back = folders.load(tmp_path)
        except ValueError as error:
            assert folders.CONFIG in str(error) and key in str(error)
            refused.add(key)
            continue
        back(**denoisers.example_inputs(back))
    assert refused >= {"attention_head_dim", "norm_num_groups", "layers_per_block"}


WRONG = [
    *(("norm_eps", value) for value in (None, "x", [], {}, True, float("nan"))),
    *(("downsample_padding", value) for value in (None, "1", [1], 1.5, True)),
    *(("sample_size", value) for value in ("8", {}, 1.5, True)),
    *(("mid_block_scale_factor", value) for value in ("1", [1], float("inf"))),
    *(("center_input_sample", value) for value in ("no", [], 2)),
    ("act_fn", 8), ("freq_shift", "0"), ("down_block_types", "DownBlock2D"),
]  # fmt: skip
RIGHT = {
    "center_input_sample": None, "norm_eps": 1, "num_train_timesteps": False, "sample_size": [8, 8], "freq_shift": 0.0,
    "flip_sin_to_cos": 1, "class_embed_type": None,
}  # fmt: skip


def test_a_setting_of_a_type_that_the_class_does_not_take_is_refused_by_name(tmp_path):
    folders.save(unet(), tmp_path)
    file = tmp_path / folders.CONFIG
    config = json.loads(file.read_text())
    for key, value in WRONG:
        file.write_text(json.dumps(config | {key: value}))
        with pytest.raises(ValueError, match=rf"{folders.CONFIG}: {key} is .*UNet2DModel takes (a|true|text|null)"):
            folders.load(tmp_path)
    file.write_text(json.dumps(config | RIGHT))
    assert folders.load(tmp_path).config.sample_size == [8, 8]
