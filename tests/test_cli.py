"""The command line, run as a user runs it."""

import functools
import json
import os
import re
import signal
import subprocess
import sys

import pytest
import torch
from diffusers import UNet3DConditionModel
from typer.testing import CliRunner

import sparsedm
from sparsedm import cli
from sparsedm.cli import common
from sparsedm.experiments import claims
from sparsedm.measure import shares, speed, training_cost
from sparsedm.measure.evaluation import Progress
from sparsedm.models.uvit import UViTModel
from sparsedm.packing import kernels


def test_info_shows_layers_patterns_and_macs():
    output = CliRunner().invoke(cli.app, ["info", "glyphs-uvit-2x4"]).stdout
    assert re.search(r"mid_block\.mlp\.fc1 +512x128 +2:4 +folded", output)
    assert "31 of 34 layers are N:M sparse" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("info", "nothing"), "error: unknown model 'nothing'; bundled: face-classifier, faces-unet, "),
        (("reproduce", "nothing"), "error: unknown recipe 'nothing'; `python -m sparsedm reproduce list` shows"),
        (
            ("bench", "--what", "nothing"),
            "error: unknown benchmark 'nothing'; known: step, layers, methods, rivals, shares, large",
        ),
        (("bench", "--device", "abacus"), "error: device 'abacus' is not there: "),
        (
            ("bench", "--what", "train-step", "--device", "meta"),
            "error: train-step is measured on the CPU, not on meta; leave out --device",
        ),
    ],
)
def test_errors_are_one_line_and_exit_code_1(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sparsedm", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    errors = capsys.readouterr().err
    assert stopped.value.code == 1 and errors.startswith(message) and errors.count("\n") == 1


def test_an_error_of_the_program_is_one_line_too():
    command = [sys.executable, "-m", "sparsedm", "bench", "--threads", "many"]  # refused before torch is imported
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: --threads takes") and done.stderr.count("\n") == 1


def test_reproduce_lists_recipes():
    assert "glyphs-unet-2x4" in CliRunner().invoke(cli.app, ["reproduce", "list"]).stdout.split()
    known = json.loads(CliRunner().invoke(cli.app, ["reproduce", "list", "--json"]).stdout)
    assert known["glyphs-unet-2x4"] == "headline: UNet 2:4, SparseDM"


def test_stored_results_are_told_to_programs():
    found = json.loads(CliRunner().invoke(cli.app, ["compare", "--json"]).stdout)
    assert {"summary", "headline", "one-shot", "rivals", "claims", "faces", "glyphs-uvit", "glyphs-unet"} == set(found)
    assert {"glyphs-uvit", "glyphs-unet-2x4"} <= {run["name"] for run in found["headline"]}
    assert all(run["scores"]["n"] == 5000 for run in found["glyphs-uvit"])
    assert {verdict["verdict"] for verdict in found["claims"]["glyphs-unet"]} <= {claims.HOLDS, claims.FAILS, claims.OPEN}


def test_an_official_checkpoint_is_described_as_it_is(tmp_path):
    model = UViTModel(sample_size=8, in_channels=3, embed_dim=64, depth=2, num_heads=1)
    torch.save(model.state_dict(), tmp_path / "nnet_ema.pth")
    command = ["info", str(tmp_path / "nnet_ema.pth"), "--json"]
    assert "num_heads" in str(CliRunner().invoke(cli.app, command).exception)
    found = json.loads(CliRunner().invoke(cli.app, [*command, "--set", "num_heads=1"]).stdout)
    assert (found["class"], found["file"], found["patterns"]) == ("UViTModel", "nnet_ema.pth", {})
    assert found["bytes"] == (tmp_path / "nnet_ema.pth").stat().st_size


def test_a_model_whose_inputs_are_not_told_is_described_without_macs(tmp_path):
    blocks = {"down_block_types": ("DownBlock3D",), "up_block_types": ("UpBlock3D",), "block_out_channels": (32,)}
    sparsedm.save(UNet3DConditionModel(layers_per_block=1, attention_head_dim=8, **blocks), tmp_path / "video")
    found = json.loads(CliRunner().invoke(cli.app, ["info", str(tmp_path / "video"), "--json"]).stdout)
    assert found["class"] == "UNet3DConditionModel" and found["macs"] == {"dense": None, "sparse": None}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_stop_after_a_whole_step(number):
    before, done = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)], []

    def states():
        try:
            for i in range(5):
                if i == 2:
                    os.kill(os.getpid(), number)
                yield Progress("sample", i, 5)
        finally:
            done.append(i)

    with pytest.raises(common.Stopped, match=r"stopped \(model: sample, 2 of 5\); go on with the same command"):
        common.show("model", states())
    assert done == [2]
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before


def test_every_command_has_help_with_an_example():
    commands = [command.name or command.callback.__name__ for command in cli.app.registered_commands]
    expected = "train finetune sparsify prune info generate evaluate export convert reproduce compare bench"
    assert commands == expected.split()
    for command in commands:
        text = CliRunner().invoke(cli.app, [command, "--help"]).stdout
        assert f"python -m sparsedm {command}" in " ".join(text.split())


def test_train_step_benchmark_reports_a_ratio(monkeypatch):
    monkeypatch.setattr(training_cost, "BATCH", 16)
    result = json.loads(json.dumps(training_cost.train_step(models=("glyphs-unet",), rounds=2)))
    measured = result["glyphs-unet"]
    assert measured["sparse_over_dense"] > 0.5 and measured["dense_ms"] > 0


@pytest.mark.skipif(not kernels.available(), reason="no C++ compiler")
def test_step_benchmark_compares_dense_and_packed():
    rows = list(speed.measure_steps(("glyphs-uvit",), (2,), threads=(1,), compiled=False, rounds=3))
    assert [row["what"] for row in rows] == ["glyphs-uvit, batch 2"]
    (row,) = json.loads(json.dumps(rows))
    assert {"dense", "dense, oneDNN", "packed"} <= set(row["ms"]) and all(value > 0 for value in row["ms"].values())
    assert row["ms"][row["fastest_dense"]] == min(row["ms"]["dense"], row["ms"]["dense, channels last"])
    assert 0 <= row["macs_skipped"] < 0.5 and 0.5 < row["weight_bytes"] <= 1
    assert "glyphs-uvit, batch 2" in speed.words({"rows": rows})


def test_shares_of_a_step_add_up():
    (row,) = json.loads(json.dumps(list(shares.measure(("glyphs-unet",), 2, threads=(1,), rounds=2))))
    assert sum(row["shares"].values()) == pytest.approx(1, abs=0.2) and all(0 < share < 1 for share in row["shares"].values())
    assert "glyphs-unet, batch 2" in shares.words({"rows": [row]})


@pytest.fixture
def quick_layers(monkeypatch):
    """The benchmark of layers takes two rounds."""
    monkeypatch.setattr(speed, "measure_layers", functools.partial(speed.measure_layers, rounds=2))


@pytest.mark.skipif(not kernels.available(), reason="no C++ compiler")
def test_layer_benchmark_is_written_and_drawn(quick_layers, tmp_path):
    file = tmp_path / "layers.json"
    done = CliRunner().invoke(cli.app, ["bench", "--what", "layers", "--threads", "1", "--output", str(file)])
    result = json.loads(file.read_text())
    assert done.stdout.count("\n") == len(result["rows"]) == len(speed.LINEAR) + len(speed.CONVOLUTION)
    assert all(row["speedup"] > 0.3 and row["threads"] == 1 for row in result["rows"]) and set(speed.machine()) < set(result)
    assert file.with_suffix(".png").stat().st_size > 10_000


@pytest.mark.skipif(not kernels.available(), reason="no C++ compiler")
def test_a_benchmark_is_told_to_programs(quick_layers, monkeypatch):
    few = functools.partial(speed.measure_layers, shapes=(speed.LINEAR[0], speed.CONVOLUTION[-1]))
    monkeypatch.setattr(speed, "measure_layers", few)
    done = CliRunner().invoke(cli.app, ["bench", "--what", "layers", "--threads", "1", "--json"])
    (line,) = done.stdout.splitlines()
    told = json.loads(line)
    assert set(speed.machine()) < set(told) and all(row["speedup"] > 0 for row in told["rows"]) and len(told["rows"]) == 2


# --- long work without a terminal -----------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    """`clock(seconds)`: so much time passes for the command line."""
    now = [1000.0]
    monkeypatch.setattr(common.time, "monotonic", lambda: now[0])
    return lambda seconds: now.__setitem__(0, now[0] + seconds)


def test_without_a_terminal_there_is_a_line_every_thirty_seconds(clock, capsys):
    def states():
        for step in range(101, 201):  # a run that goes on at step 100
            yield Progress("train", step, 200, f"loss {step / 1000:.4f}", pictures=64)
            clock(2)

    common.show("glyphs-unet", states())
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "glyphs-unet: train: 101 of 200, loss 0.1010"
    assert lines[1] == "glyphs-unet: train: 116 of 200, loss 0.1160, 32 pictures/s, 0:02:48 left"
    assert [int(re.search(r"(\d+) of 200", line)[1]) for line in lines] == [101, 116, 131, 146, 161, 176, 191, 200]


def test_every_stage_has_a_first_and_a_last_line(clock, capsys):
    def states():
        for stage, total in (("sample", 3), ("score", 1)):
            for done in range(1, total + 1):
                yield Progress(stage, done, total)
                clock(1)

    common.show("", states())
    assert capsys.readouterr().err.splitlines() == ["sample: 1 of 3", "sample: 3 of 3, 0:00:00 left", "score: 1 of 1"]


def test_the_last_state_is_shown_when_work_ends_early(clock, capsys):
    with common.bars() as tell:
        tell("train", 1, 9)
        tell("train", 5, 9)
    assert capsys.readouterr().err.splitlines() == ["train: 1 of 9", "train: 5 of 9"]


def test_asked_for_json_nothing_is_shown(capsys):
    common.show("", iter([Progress("sample", 1, 2)]), quiet=True)
    assert capsys.readouterr().err == ""
