"""What the commands share: options, progress bars, stopping."""

import contextlib
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from ..checkpoints import folders
from ..models import papers
from ..support import processes

Model = Annotated[str, typer.Argument(help="A bundled model's name or a model folder.")]
Data = Annotated[str, typer.Option(help="glyphs, glyphs-rgb, digits, cifar10, celeba, lsun-..., folder:PATH or latents:PATH.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", help="Another training setting, such as lr=1e-4 or optimizer=muon; may be repeated.")
]
Half = Annotated[str, typer.Option(help="Of the saved weights: float32, float16 or bfloat16.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps; the fastest there is by default.")]
Seed = Annotated[int, typer.Option(help="Of every random draw.")]
Vae = Annotated[str, typer.Option(help="For models that make latents: the folder of the autoencoder (AutoencoderKL).")]
Json = Annotated[bool, typer.Option("--json", help="Print the outcome as one line of JSON, and nothing else.")]


class Stopped(Exception):
    """A run that the user stopped; the message says how to go on."""


@contextlib.contextmanager
def stoppable() -> Iterator[list]:
    """Within it Ctrl-C and SIGTERM only fill the list, so that a loop can end after a whole step; a second one stops at once."""
    pressed = []

    def note(signum, frame) -> None:
        pressed.append(signum)
        restore()

    def restore() -> None:
        for each, handler in before.items():
            signal.signal(each, handler)

    before = {each: signal.signal(each, note) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield pressed
    finally:
        restore()


def settings(given: list[str] | None) -> dict:
    """{"lr": 0.1} of ["lr=0.1"]. Raises ValueError for something else."""
    found = {}
    for setting in given or ():
        key, equals, text = setting.partition("=")
        if not key or not equals:
            raise ValueError(f"--set takes NAME=VALUE, not {setting!r}")
        try:
            found[key] = json.loads(text)
        except json.JSONDecodeError:
            found[key] = text
    return found


def bars(quiet: bool = False) -> Progress:
    """Progress bars on standard error, of the main process."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )  # fmt: skip
    return Progress(*columns, console=Console(stderr=True), disable=quiet or not processes.is_main())


def show(title: str, states: Iterator, quiet: bool = False):
    """A bar for every stage of a generator of `Progress`; returns what the generator returns.

    Raises:
        Stopped: by Ctrl-C or SIGTERM, after a whole step; the generator is closed then.
    """
    try:
        state = next(states)  # what is refused is refused before there is a bar
        with stoppable() as pressed, bars(quiet) as bar:
            tasks = {}
            while not pressed:
                if state.stage not in tasks:
                    tasks[state.stage] = bar.add_task(f"{title}: {state.stage}", total=state.total, note="")
                bar.update(tasks[state.stage], completed=state.done, note=state.note)
                state = next(states)
        states.close()
        raise Stopped(f"stopped ({title}: {state.stage}, {state.done} of {state.total}); go on with the same command")
    except StopIteration as end:
        return end.value


def on(device: str) -> torch.device:
    """The device called so, for "" the fastest there is for this process; accelerate takes it for training, too.

    Raises:
        ValueError: it is not there.
    """
    if device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    own = processes.state().device
    if not device:
        return own
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r} is not there: {str(error).splitlines()[0]}") from error
    if found.type == "cuda" and found.index is not None:
        torch.cuda.set_device(found)
    return found


def autoencoder(folder: str, device: torch.device) -> nn.Module | None:
    """The AutoencoderKL in a folder, None for "". Raises ValueError if there is no such folder."""
    from diffusers import AutoencoderKL

    if folder and not Path(folder).is_dir():
        raise ValueError(f"{folder} is no folder of an autoencoder")
    return AutoencoderKL.from_pretrained(folder).to(device).eval() if folder else None


def load_or_build(name: str, seed: int = 0) -> nn.Module:
    """A bundled model, a model folder, or a paper's configuration with fresh weights."""
    if name in papers.PAPER_MODELS:
        torch.manual_seed(seed)
        return papers.build(name)
    return folders.load(name)


def outcome(found: dict, as_json: bool, text: str) -> None:
    """Print what came out, for programs or for people; only the main process does."""
    if processes.is_main():
        print(json.dumps(found) if as_json else text)


def free(out: Path) -> None:
    """Raise ValueError if something is at `out`."""
    if out.exists():
        raise ValueError(f"{out} is there already; choose another name or remove it")
