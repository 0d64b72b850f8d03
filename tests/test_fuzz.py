"""Damaged model folders: 2,800 of them, each refused with a clear error or read as what was saved."""

import json
import random

import pytest
import torch

from sparsedm.checkpoints import folders
from sparsedm.masking import layers
from sparsedm.models.uvit import UViTModel
from sparsedm.pruning import diffpruning

COUNT = 700
CONFIG = {"sample_size": 8, "in_channels": 1, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 3}
REFUSED = (ValueError, OSError)


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


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    model = layers.fold(layers.sparsify(UViTModel(**CONFIG), "2:4"))
    return model, tmp_path / "model"


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_damaged_weights_are_refused_or_read_whole(folder, packed):
    model, path = folder
    folders.save(model, path, packed=packed)
    file = folders.weights_of(path)
    whole, draw, refused = file.read_bytes(), random.Random(1), 0
    for _ in range(COUNT):
        file.write_bytes(damaged(whole, draw))
        try:
            back = folders.load(path)
        except REFUSED as error:
            refused += 1
            assert str(error)
            continue
        for key, value in model.state_dict().items():
            assert torch.equal(value, back.state_dict()[key]), f"{key} was read changed"
    assert refused > 0.9 * COUNT


def test_damaged_indexes_are_refused_or_read_whole(tmp_path):
    torch.manual_seed(0)
    model = UViTModel(**CONFIG)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    file = tmp_path / folders.INDEX
    whole, draw, refused = file.read_bytes(), random.Random(3), 0
    for _ in range(COUNT):
        file.write_bytes(damaged(whole, draw))
        try:
            back = folders.load(tmp_path)
        except REFUSED as error:
            refused += 1
            assert str(error)
            continue
        assert all(torch.equal(value, back.state_dict()[key]) for key, value in model.state_dict().items())
    assert refused > 0.9 * COUNT


def test_damaged_configs_and_records_are_refused_or_give_a_model_of_these_weights(tmp_path):
    torch.manual_seed(0)
    pruned = diffpruning.prune(UViTModel(**CONFIG), 0.5, score="random")
    folders.save(pruned, tmp_path / "model")
    file = tmp_path / "model" / folders.CONFIG
    whole, draw, refused = file.read_bytes(), random.Random(2), 0
    assert "pruning" in json.loads(whole)
    for _ in range(COUNT):
        file.write_bytes(damaged(whole, draw))
        try:
            back = folders.load(tmp_path / "model")
        except REFUSED as error:
            refused += 1
            assert str(error)
            continue
        for key, value in pruned.state_dict().items():
            assert torch.equal(value, back.state_dict()[key])
    assert refused > 0.5 * COUNT
