"""Processes that share a job, as torchrun starts them; forked from one that has imported everything, so at once."""

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from diffusers import DDPMScheduler

_FORKS = multiprocessing.get_context("forkserver")
_SCHEDULERS = sorted({cls.__module__ for cls in (DDPMScheduler, *DDPMScheduler._get_compatibles())})
_FORKS.set_forkserver_preload(
    ["sparsedm.cli.job", "sparsedm.experiments.experiment", "sparsedm.training.runlog", "sklearn.datasets", *_SCHEDULERS]
)


def start(count: int, told: Path, function: Callable, *arguments) -> list[BaseProcess]:
    """Call a function in so many processes; what they print goes to files in the folder `told`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = {"OMP_NUM_THREADS": "1"} | ({"ACCELERATE_USE_CPU": "true"} if torch.accelerator.is_available() else {})
    if count > 1:
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    told.mkdir(exist_ok=True)
    running = []
    for rank in range(count):
        own = env | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if count > 1 else {})
        running.append(_FORKS.Process(target=_rank, args=(own, told / str(rank), function, arguments), daemon=True))
        running[-1].start()
    return running


def _rank(env: dict[str, str], told: Path, function: Callable, arguments: tuple) -> None:
    os.environ |= env
    torch.set_num_threads(1)
    with open(told, "w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    try:
        function(*arguments)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def ended(running: list[BaseProcess], told: Path) -> list[tuple[int, str]]:
    """Exit codes and what was printed."""
    for process in running:
        process.join(timeout=300)
    return [(process.exitcode, (told / str(rank)).read_text()) for rank, process in enumerate(running)]


def command(*arguments) -> None:
    """Run the command line in this process."""
    from sparsedm import cli

    sys.argv = ["sparsedm", *map(str, arguments)]
    cli.main()


def run(count: int, told: Path, *arguments) -> list[tuple[int, str]]:
    """Run a command in so many processes."""
    return ended(start(count, told, command, *arguments), told)


def succeed(count: int, told: Path, *arguments) -> None:
    """As `run`, for what must not fail."""
    for code, printed in run(count, told, *arguments):
        assert code == 0, printed


def execute(told: Path, code: str, **names) -> tuple[int, str]:
    """Run Python code in a process that has imported the package and done nothing; its exit code and what it printed."""
    return ended(start(1, told, exec, code, names), told)[0]
