"""Runs that are killed, twice started or short of disk: nothing is lost, and what comes out is what would have come out."""

import json
import os
import random
import time

import pytest
import ranks
import torch
from safetensors.torch import load_file

import sparsedm
from sparsedm.models.uvit import UViTModel
from sparsedm.training import checkpoint, distill

KILLS = 20
STEPS = 200


def tiny() -> UViTModel:
    torch.manual_seed(0)
    return UViTModel(sample_size=8, in_channels=1, embed_dim=16, depth=2, num_heads=2, num_classes=11)


@pytest.fixture
def finetune(tmp_path):
    """`finetune(folder)`: the arguments of a small run in a folder, of its resumption if there is something to resume."""
    sparsedm.save(tiny(), tmp_path / "teacher")
    options = ("--data", "digits", "--batch-size", 8, "--steps", STEPS, "--dtype", "float32", "--set", "checkpoint_every=3")

    def arguments(folder):
        resume = ["--resume"] if (folder / "train" / "checkpoint.pt").exists() else []
        return "finetune", tmp_path / "teacher", folder, *options, *resume

    return arguments


@pytest.mark.alone
def test_a_run_of_two_processes_killed_at_random_moments_ends_with_the_same_weights(finetune, tmp_path):
    told, draw, whole = tmp_path / "told", random.Random(0), tmp_path / "whole"
    ranks.ended(ranks.start(1, told, os.getpid), told)  # the process that the others are forked from is there
    began, running = time.monotonic(), ranks.start(2, told, ranks.command, *finetune(whole))
    while not (whole / "train" / "checkpoint.pt").exists() and running[0].is_alive():
        time.sleep(0.01)
    prelude = time.monotonic() - began
    assert [code for code, _ in ranks.ended(running, told)] == [0, 0]
    latest = prelude + (time.monotonic() - began - prelude) / 10
    kills = resumed = saving = runs = 0
    unfinished = False
    while kills < KILLS or unfinished:
        folder = tmp_path / f"run{runs}"
        arguments, unfinished = finetune(folder), True
        running, resumed = ranks.start(2, told, ranks.command, *arguments), resumed + ("--resume" in arguments)
        if kills < KILLS:
            time.sleep(draw.uniform(0.4 * prelude, latest))  # they meet, read a checkpoint, train, or save one
            draw.shuffle(running)
            if all(process.is_alive() for process in running):
                kills += 1
                for process in running:  # the launcher kills the other when it has lost one
                    process.kill()
        ended = ranks.ended(running, told)
        saving += bool(list(folder.rglob("*.tmp")))
        if -9 not in [code for code, _ in ended]:
            assert [code for code, _ in ended] == [0, 0], ended
            log = [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()]
            assert equal(folder, whole) and log == [50, 100, 150, STEPS] and not list(folder.rglob("*.tmp"))
            runs, unfinished = runs + 1, False
    print(f"{kills} kills, {resumed} resumed, {saving} while saving, {runs} runs")
    assert resumed > KILLS / 2


def equal(*folders) -> bool:
    """Whether the models that two runs made have the same weights, bit for bit."""
    a, b = (load_file(folder / "model" / "diffusion_pytorch_model.safetensors") for folder in folders)
    return a.keys() == b.keys() and all(torch.equal(value, b[key]) for key, value in a.items())


def train(folder, steps):
    """Train in a folder, saving after every step."""
    return distill.train(tiny(), "digits", out=folder, steps=steps, batch_size=4, checkpoint_every=1)


def train_long(folder):
    list(train(folder, 100_000))


def test_a_folder_has_one_run_at_a_time(tmp_path):
    (first,) = ranks.start(1, tmp_path / "told", train_long, tmp_path)
    while not (tmp_path / checkpoint.CHECKPOINT).exists() and first.is_alive():
        time.sleep(0.01)
    with pytest.raises(BlockingIOError, match="is in use by another run"):
        next(train(tmp_path, 100_000))
    first.kill()
    first.join()
    (tmp_path / f".{checkpoint.CHECKPOINT}.1.tmp").write_text("half")  # as it might have left it
    again = train(tmp_path, 100_000)
    state = next(again)
    assert state.step > 1 and not list(tmp_path.glob("*.tmp"))
    assert next(train(tmp_path, 100_000)).step > 1  # the same process may, beside a run that hangs in a traceback
