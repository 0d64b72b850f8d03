"""Several processes: the same weights and pictures as one process."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import ranks
import torch
from safetensors.torch import load_file

import sparsedm
from sparsedm.experiments import recipes
from sparsedm.masking import layers
from sparsedm.measure import evaluation
from sparsedm.models.uvit import UViTModel
from sparsedm.support import processes

TINY = {"sample_size": 8, "in_channels": 1, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 11}


def train(out, stop=0, batch_size=8):
    """What every process does: fine-tune, to the end or to some step."""
    torch.manual_seed(0)
    teacher, student = UViTModel(**TINY), UViTModel(**TINY)
    student.load_state_dict(teacher.state_dict())
    layers.sparsify(student, "2:4")
    options = {"steps": 6, "lr": 1e-3, "teacher_weight": 0.5, "checkpoint_every": 2, "clip": 0.1, "batch_size": batch_size}
    for state in sparsedm.finetune(student, teacher, "digits", out=out / "train", **options):
        if state.step == stop:
            return
    sparsedm.save(sparsedm.fold(student), out / f"model{os.environ.get('RANK', 0)}")


def launch(count, out, *arguments) -> list[tuple[int, str]]:
    return ranks.ended(ranks.start(count, out / "told", train, out, *arguments), out / "told")


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    out = tmp_path_factory.mktemp("alone")
    ((code, printed),) = launch(1, out)
    assert code == 0, printed
    return weights(out / "model0")


@pytest.fixture
def teacher(tmp_path):
    torch.manual_seed(0)
    model = UViTModel(**TINY)
    torch.nn.init.normal_(model.final_layer.weight)
    sparsedm.save(model, tmp_path / "teacher")
    return tmp_path / "teacher"


@pytest.mark.parametrize("stopped", [False, True], ids=["through", "resumed"])
def test_two_processes_end_with_the_weights_of_one(alone, tmp_path, stopped):
    for stop in (4, 0) if stopped else (0,):
        for code, printed in launch(2, tmp_path, stop):
            assert code == 0, printed
    first, second = weights(tmp_path / "model0"), weights(tmp_path / "model1")
    assert all(torch.equal(first[key], second[key]) for key in first)  # masks, too: zeros are where zeros are
    for key, value in alone.items():
        torch.testing.assert_close(first[key], value, rtol=1e-5, atol=1e-5)


def test_a_batch_that_cannot_be_shared_is_refused(tmp_path):
    assert all(code and "batch_size 8 cannot be shared by 3 processes" in printed for code, printed in launch(3, tmp_path))


def test_the_command_line_stops_and_resumes_two_processes_together(teacher, tmp_path):
    options = ("--data", "digits", "--batch-size", 8, "--steps", 120, "--set", "checkpoint_every=100000", "--dtype", "float32")

    def finetune(out, *more):
        return "finetune", teacher, tmp_path / out, *options, *more

    told = tmp_path / "told"
    ranks.succeed(2, told, *finetune("whole"))
    running, log = ranks.start(2, told, ranks.command, *finetune("broken")), tmp_path / "broken" / "log.jsonl"
    while not (log.exists() and log.stat().st_size) and running[0].is_alive():
        time.sleep(0.02)
    os.kill(running[0].pid, signal.SIGINT)  # the other one hears of it
    assert all(code == 130 and "stopped at step" in printed for code, printed in ranks.ended(running, told))
    ranks.succeed(2, told, *finetune("broken", "--resume"))
    whole, broken = (weights(tmp_path / run / "model") for run in ("whole", "broken"))
    assert all(torch.equal(whole[key], broken[key]) for key in whole)


def test_accelerate_launches_the_command_line(teacher, tmp_path):
    launcher = (sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "-m", "sparsedm")
    options = ("--data", "digits", "--batch-size", "8", "--steps", "50", "--json")
    command = (*launcher, "finetune", str(teacher), str(tmp_path / "out"), *options)
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["model"] == str(tmp_path / "out" / "model")  # one of the two tells it
    (line,) = (tmp_path / "out" / "log.jsonl").read_text().splitlines()
    assert json.loads(line)["step"] == 50
    assert set(map(str, layers.patterns(sparsedm.load(tmp_path / "out" / "model")).values())) == {"2:4"}


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_processes_share_the_pictures_and_draw_those_of_one(teacher, tmp_path, sampler):
    options = ("--data", "digits", "--n", 22, "--batch-size", 4, "--sampler", sampler, "--steps", 3)
    for count in (1, 2, 3):
        ranks.succeed(count, tmp_path / "told", "evaluate", teacher, tmp_path / f"scores{count}", *options, "--base", teacher)
    files = [tmp_path / f"scores{count}" / f"samples-{sampler}3-1234.safetensors" for count in (1, 2, 3)]
    pictures = [load_file(file)["images"] for file in files]
    assert pictures[0].shape == (22, 1, 8, 8) and pictures[0].float().std() > 10
    assert all(torch.equal(pictures[0], other) for other in pictures[1:])
    assert all((tmp_path / f"scores{count}" / "scores.json").exists() for count in (1, 2, 3))


def sample(folder, teacher, stop):
    """What every process does: draw pictures, all or as many batches, saving often."""
    evaluation.CHUNK = 8
    states = evaluation.sample(sparsedm.load(teacher), folder, recipes.Protocol(n=40, sampler="ddpm", steps=3, batch_size=4))
    for count, _ in enumerate(states, 1):
        if count == stop:
            return


def test_pictures_are_taken_up_by_another_number_of_processes(teacher, tmp_path):
    for out, counts in ({"whole": (1,), "broken": (2, 3)}).items():
        for count in counts:
            told = tmp_path / "told"
            ended = ranks.ended(ranks.start(count, told, sample, tmp_path / out, teacher, 3 if count == 2 else 0), told)
            assert all(code == 0 for code, _ in ended), ended
            if count == 2:  # of its third round the first batch was drawn, and two rounds were saved
                parts = sorted((tmp_path / out / "samples-ddpm3-1234.parts").iterdir())
                assert [(part.stem, len(load_file(part)["images"])) for part in parts] == [("00000000", 8), ("00000008", 8)]
    files = [list((tmp_path / out).iterdir()) for out in ("whole", "broken")]
    assert [[file.name for file in each] for each in files] == [["samples-ddpm3-1234.safetensors"]] * 2  # the parts are gone
    whole, broken = (load_file(file)["images"] for (file,) in files)
    assert torch.equal(whole, broken) and len(whole) == 40


def take_part(out):
    """What every process does: tell what it is given."""
    rank = processes.state().process_index
    mine = list(processes.share(range(7)))
    found = [mine, processes.collect({i: -i for i in mine}), processes.from_main(rank), processes.anywhere(rank == 2)]
    (out / f"{rank}.json").write_text(json.dumps(found))


def test_items_are_shared_and_collected_in_order(tmp_path):
    assert all(code == 0 for code, _ in ranks.ended(ranks.start(3, tmp_path, take_part, tmp_path), tmp_path))
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)]
    assert [mine for mine, *_ in found] == [[0, 3, 6], [1, 4], [2, 5]]
    assert list(found[0][1].items()) == [(str(i), -i) for i in range(7)] and found[1][1] == found[2][1] == {}
    assert all(rest == [0, True] for _, _, *rest in found)


def test_the_main_process_writes_the_picture_and_tells_it(teacher, tmp_path):
    images = []
    for count in (1, 2):
        out = tmp_path / f"{count}.png"
        told = ranks.run(count, tmp_path / "told", "generate", teacher, out, "--n", 10, "--batch-size", 4, "--steps", 2)
        assert all(code == 0 for code, _ in told), told
        assert [f"{out} written: 10 pictures" in printed for _, printed in told] == [True, False][:count]
        images.append(out.read_bytes())
    assert images[0] == images[1]
