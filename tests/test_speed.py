"""Speed measurements: the rows say what was measured."""

import json

import pytest
import torch

import sparsedm
from sparsedm.experiments import blocks
from sparsedm.measure import speed
from sparsedm.packing import kernels

needs_kernels = pytest.mark.skipif(not kernels.available(), reason="no C++ compiler for the packed kernels")


@needs_kernels
def test_layers_can_be_chosen_and_so_can_their_tokens():
    rows = list(speed.measure_layers(("float32",), (1,), 1, shapes=((16, 32), (16, 8, 3, 4)), tokens=5))
    assert [row["what"] for row in rows] == ["linear 16x32, 5 tokens", "conv 3x3 16x8, 4 maps of 4x4"]


@needs_kernels
def test_whoever_takes_the_rows_keeps_his_own_number_of_threads():
    before, seen = torch.get_num_threads(), []
    for _ in speed.measure_layers(("float32",), (before + 1,), 1, shapes=((16, 32),) * 2, tokens=5):
        seen.append(torch.get_num_threads())
    for _ in speed.measure_steps(("glyphs-unet",), (1,), threads=(before + 1,), compiled=False, rounds=1):
        seen.append(torch.get_num_threads())
    assert seen == [before] * 3


def test_another_device_computes_and_onednn_is_left_out():
    shapes = (("float32",), (1,), 1)
    with pytest.raises(ValueError, match="no packed kernel on meta"):
        list(speed.measure_layers(*shapes, shapes=((16, 32),), device="meta"))
    models = {name: speed.cast(sparsedm.load("glyphs-uvit"), torch.float32, "meta") for name in ("dense", "packed")}
    row = speed.compare("step", models, batch=1, compiled=False, rounds=1)
    assert {"dense", "packed"} < set(row["ms"]) and speed.ONEDNN not in row["ms"] and row["speedup_over_onednn"] is None
    assert speed.all_threads("meta") == (torch.get_num_threads(),)


def test_the_grid_has_a_row_for_each_patch_size_and_mlp_ratio():
    rows = list(blocks.measure(32, patch_sizes=(4, 8), mlp_ratios=(1, 2), rounds=1))
    cells = [(row["mlp_ratio"], row["patch_size"], row["tokens"]) for row in rows]
    assert cells == [(1, 4, 65), (1, 8, 17), (2, 4, 65), (2, 8, 17)]
    assert all(row["speedup"] > 0 and row["threads"] == 1 for row in json.loads(json.dumps(rows)))


@needs_kernels
def test_every_masked_layer_of_the_grid_is_packed():
    (row,) = blocks.measure(32, patch_sizes=(4,), mlp_ratios=(2,), rounds=1)
    linear, attention, ends = 8 * 32**2 * 65, 2 * 65**2 * 32, 48 * 32 * 64 + 32 * 48 * 65 + 9 * 9 * 1024
    assert row["macs_skipped"] == pytest.approx(linear / 2 / (linear + attention + ends))


def test_the_papers_times_make_its_grid():
    gains = {cell: dense / sparse for cell, (dense, sparse) in blocks.PAPER_SECONDS.items()}
    assert set(gains) == {(ratio, patch) for ratio in blocks.MLP_RATIOS for patch in blocks.PATCH_SIZES}
    assert round(gains[4, 1], 2) == max(round(gain, 2) for gain in gains.values()) == 1.23
