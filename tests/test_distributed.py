"""Several processes: the same weights as one process with the same global batch."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

import sparsedm
from sparsedm.models.uvit import UViTModel

_TRAIN = """
import sys, torch, sparsedm
from accelerate import PartialState
from sparsedm import layers
from sparsedm.models.uvit import UViTModel
torch.manual_seed(0)
config = dict(sample_size=8, in_channels=1, embed_dim=16, depth=2, num_heads=2, num_classes=11)
teacher, student = UViTModel(**config), UViTModel(**config)
student.load_state_dict(teacher.state_dict())
sparsedm.sparsify(student, "2:4")
options = dict(steps=6, batch_size=8, lr=1e-3, teacher_weight=0.5, checkpoint_every=2, clip=0.1)
for state in sparsedm.finetune(student, teacher, "digits", out=sys.argv[1] + "/train", **options):
    if len(sys.argv) > 2 and state.step == int(sys.argv[2]):
        break
else:
    sparsedm.save(sparsedm.fold(student), f"{sys.argv[1]}/model{PartialState().process_index}")
PartialState().destroy_process_group()
"""


def start(processes: int, *arguments: str) -> list[subprocess.Popen]:
    """Run Python in so many processes, as `accelerate launch` does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    if processes > 1:
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {} for rank in range(processes)]
    return [subprocess.Popen([sys.executable, *arguments], env=env | rank, stderr=subprocess.PIPE, text=True) for rank in ranks]


def ended(running: list[subprocess.Popen]) -> list[tuple[int, str]]:
    """Exit codes and standard errors."""
    errors = [process.communicate(timeout=300)[1] for process in running]
    return [(process.returncode, error) for process, error in zip(running, errors, strict=True)]


def launch(processes: int, *arguments) -> list[tuple[int, str]]:
    return ended(start(processes, "-c", _TRAIN, *map(str, arguments)))


def succeed(*arguments) -> None:
    for code, errors in launch(*arguments):
        assert code == 0, errors


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    out = tmp_path_factory.mktemp("alone")
    succeed(1, out)
    return weights(out / "model0")


@pytest.mark.parametrize("stopped", [False, True], ids=["through", "resumed"])
def test_two_processes_end_with_the_weights_of_one(alone, tmp_path, stopped):
    if stopped:
        succeed(2, tmp_path, 4)
    succeed(2, tmp_path)
    first, second = weights(tmp_path / "model0"), weights(tmp_path / "model1")
    assert all(torch.equal(first[key], second[key]) for key in first)  # masks, too: zeros are where zeros are
    for key, value in alone.items():
        torch.testing.assert_close(first[key], value, rtol=1e-5, atol=1e-5)


def test_a_batch_that_cannot_be_shared_is_refused(tmp_path):
    assert all(code and "batch_size 8 cannot be shared by 3 processes" in errors for code, errors in launch(3, tmp_path))


def test_the_command_line_stops_and_resumes_two_processes_together(tmp_path):
    teacher = UViTModel(sample_size=8, in_channels=1, embed_dim=16, depth=2, num_heads=2, num_classes=11)
    sparsedm.save(teacher, tmp_path / "teacher")
    options = (
        "--data",
        "digits",
        "--batch-size",
        "8",
        "--steps",
        "300",
        "--set",
        "checkpoint_every=100000",
        "--dtype",
        "float32",
    )

    def finetune(out, *more):
        return "-m", "sparsedm", "finetune", str(tmp_path / "teacher"), str(tmp_path / out), *options, *more

    for code, errors in ended(start(2, *finetune("whole"))):
        assert code == 0, errors
    running, log = start(2, *finetune("broken")), tmp_path / "broken" / "log.jsonl"
    while not (log.exists() and log.stat().st_size) and running[0].poll() is None:
        time.sleep(0.02)
    running[0].send_signal(signal.SIGINT)  # the other one hears of it
    assert all(code == 130 and "stopped at step" in errors for code, errors in ended(running))
    for code, errors in ended(start(2, *finetune("broken", "--resume"))):
        assert code == 0, errors
    whole, broken = (weights(tmp_path / run / "model") for run in ("whole", "broken"))
    assert all(torch.equal(whole[key], broken[key]) for key in whole)
