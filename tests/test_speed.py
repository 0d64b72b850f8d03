"""Speed measurements: the rows say what was measured."""

import dataclasses

import pytest
import torch

import sparsedm
from sparsedm.checkpoints import folders
from sparsedm.experiments import bench, timing
from sparsedm.masking import layers
from sparsedm.measure import large as measure_large
from sparsedm.measure import speed
from sparsedm.models import large
from sparsedm.packing import kernels, packed

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


def test_compiled_models_run_with_frozen_weights_too(make_model, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model, options=None: compiled.append((model, options)) or model)
    models = {name: make_model("unet").eval() for name in ("dense", "packed")}
    row = speed.compare("step", models, batch=1, compiled=True, rounds=1)
    assert {"dense, compiled", "dense, frozen", "packed, frozen"} < set(row["ms"])
    frozen = [model for model, options in compiled if options == {"freezing": True}]
    assert len(frozen) == 2 and not any(isinstance(model, type(models["dense"])) for model in frozen)  # else torch reuses graphs


def test_a_benchmarks_rows_are_told_as_they_are_measured():
    told = []

    def rows(options):
        for count in options.threads:
            assert len(told) == count - 1
            yield {"threads": count}

    made = bench.Benchmark(rows, line=lambda row: f"{row['threads']} threads")
    result = bench.run(made, bench.Options(threads=(1, 2)), told.append)
    assert told == ["1 threads", "2 threads"] and [row["threads"] for row in result["rows"]] == [1, 2]
    assert set(speed.machine()) < set(result)


def test_a_benchmark_without_rows_is_told_at_the_end():
    told = []
    assert bench.run(bench.Benchmark(lambda options: {"ratio": 1.0}), bench.Options(), told.append) == {"ratio": 1.0}
    assert told == []


def test_benchmarks_of_the_cpu_are_refused_elsewhere():
    for name, chosen in bench.BENCHMARKS.items():
        assert bench.benchmark(name, torch.device("cpu")) is chosen
        if not chosen.anywhere:
            with pytest.raises(ValueError, match=f"{name} is measured on the CPU, not on meta"):
                bench.benchmark(name, torch.device("meta"))


def test_the_student_of_a_users_model_keeps_layers_dense_whose_weight_is_read_elsewhere(make_model, monkeypatch):
    class Reader(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = torch.nn.Linear(16, 16)

        def forward(self, x):
            return self.lin(x) + torch.nn.functional.linear(x, self.lin.weight)

    model = make_model("uvit").eval()
    model.mid_block.mlp = Reader()
    monkeypatch.setattr(speed.folders, "load", lambda name: model)
    monkeypatch.setattr(speed.packed, "pack", lambda sparse, batch: sparse)
    dense, sparse = speed.pair("own", torch.float32, 1)
    assert torch.equal(sparse.mid_block.mlp.lin.weight, dense.mid_block.mlp.lin.weight)
    assert "mid_block.attn.qkv" in layers.patterns(sparse)


def test_large_models_are_timed_and_weighed(monkeypatch):
    known = large.LARGE["dit-256"]
    tiny = {**known.config, "num_layers": 1, "num_attention_heads": 1, "sample_size": 8}
    monkeypatch.setitem(large.LARGE, "tiny", dataclasses.replace(known, config=tiny))
    (row,) = bench.BENCHMARKS["large"].measure(bench.Options(models=("tiny",), dtypes=("bfloat16",)))
    assert row["files"]["packed"]["bytes"] < row["files"]["dense"]["bytes"] and row["memory"]["packed"] <= row["memory"]["dense"]
    assert row["sparse_layers"] >= row["packed_layers"] and row["sparse_layers"] > 0 and row["speedup"] > 0
    assert measure_large.line(row).startswith("| DiT-XL/2, 256 | bfloat16 | ")
    with pytest.raises(ValueError, match="unknown large model 'sd9'; known: sd15-256, "):
        next(measure_large.measure(("sd9",)))


def test_large_models_have_their_published_sizes():
    with torch.device("meta"):
        millions = {
            name: sum(p.numel() for p in model.cls(**model.config).parameters()) / 1e6 for name, model in large.LARGE.items()
        }
    assert millions["sd15-512"] == pytest.approx(859.5, abs=0.1)  # the model cards'
    assert millions["sdxl-512"] == pytest.approx(2567.5, abs=0.1)
    assert millions["pixart-512"] == pytest.approx(610.9, abs=0.1)


@needs_kernels
def test_methods_are_timed_without_their_training(monkeypatch, tmp_path):
    timed = {}
    monkeypatch.setattr(timing, "compare", lambda what, models, *rest: timed.update({what: models["packed"]}) or {})
    names = ["glyphs-unet-short-diffpruned", "glyphs-unet-short-diffpruned-2x4", "glyphs-unet-short-1x4"]
    assert [row["name"] for row in timing.measure_methods(tmp_path, names, batch=1)] == names
    pruned, both, quarter = timed.values()
    bundled = folders.load("glyphs-unet-diffpruned")
    assert sparsedm.count(pruned).dense == sparsedm.count(bundled).dense == sparsedm.count(both).dense
    assert not packed.has_packed(pruned) and sparsedm.count(both).sparse < 0.6 * sparsedm.count(bundled).sparse
    assert 0.25 < sparsedm.count(quarter).sparse / sparsedm.count(folders.load("glyphs-unet")).dense < 0.3
