"""Parts that running commands share: progress, stopping, devices, models, and the result."""

import contextlib
import datetime
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from ..checkpoints import folders
from ..models import papers
from ..support import processes
from .options import Stopped

EVERY = 30  # seconds between two lines where there is no terminal
Tell = Callable[..., None]  # tell(title, done, total, note="", pictures=0), as the fields of `evaluation.Progress`


@contextlib.contextmanager
def stoppable() -> Iterator[list]:
    """In its block, Ctrl-C and SIGTERM only fill the list, so that a loop ends after a whole step; a second one stops at once."""
    pressed = []

    def note(signum, frame) -> None:
        pressed.append(signum)
        restore()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield pressed
    finally:
        restore()


@contextlib.contextmanager
def bars(quiet: bool = False) -> Iterator[Tell]:
    """The main process's progress on standard error: a bar for every title, or plain lines where there is no terminal."""
    if quiet or not processes.is_main():
        yield lambda *progress, **more: None
    elif sys.stderr.isatty():
        with _bars() as tell:
            yield tell
    else:
        lines = _Lines()
        yield lines
        lines.end()


@contextlib.contextmanager
def _bars() -> Iterator[Tell]:
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as bar:
        tasks = {}

        def tell(title: str, done: int, total: int, note: str = "", pictures: float = 0) -> None:
            if title not in tasks:
                tasks[title] = bar.add_task(title, total=total, note="")
            bar.update(tasks[title], completed=done, total=total, note=note)

        yield tell


class _Lines:
    """Plain lines: the first and the last of every title, and one every `EVERY` seconds at most."""

    def __init__(self):
        self.title = self.line = self.printed = ""

    def __call__(self, title: str, done: int, total: int, note: str = "", pictures: float = 0) -> None:
        now, first = time.monotonic(), title != self.title
        if first:
            self.end()
            self.title, self.began, self.before = title, now, done  # a resumed run does not begin at 0
        self.line = ", ".join(filter(None, (f"{title}: {done} of {total}", note, *self._speed(now, done, total, pictures))))
        if first or done == total or now - self.shown >= EVERY:
            self.shown = now
            self.end()

    def _speed(self, now: float, done: int, total: int, pictures: float) -> Iterator[str]:
        steps, seconds = done - self.before, now - self.began
        if steps > 0 and seconds > 0:
            if pictures:
                yield f"{steps * pictures / seconds:.3g} pictures/s"
            yield f"{datetime.timedelta(seconds=round((total - done) * seconds / steps))} left"

    def end(self) -> None:
        """Print the last line, unless that was done."""
        if self.line != self.printed:
            print(self.line, file=sys.stderr, flush=True)
            self.printed = self.line


def show(title: str, states: Iterator, quiet: bool = False, remedy: str = "go on with the same command"):
    """Show the stages of a generator of `Progress`; returns the generator's return value.

    Raises:
        Stopped: by Ctrl-C or SIGTERM, after a whole step, with the `remedy`; the generator is closed then.
    """
    try:
        state = next(states)  # errors in the input come before there is a bar
        with stoppable() as pressed, bars(quiet) as tell:
            while not pressed:
                tell(": ".join(filter(None, (title, state.stage))), state.done, state.total, state.note, state.pictures)
                state = next(states)
        states.close()
        at = ": ".join(filter(None, (title, state.stage)))
        raise Stopped(f"stopped ({at}, {state.done} of {state.total}); {remedy}")
    except StopIteration as end:
        return end.value


def on(device: str) -> torch.device:
    """The device of this name, for "" the fastest one of this process; accelerate trains on the same device.

    Raises:
        ValueError: the device is not there.
    """
    if device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    own = processes.state().device
    if not device:
        return own
    chosen = processes.device(device)
    if chosen.type == "cuda" and chosen.index is not None:
        torch.cuda.set_device(chosen)
    return chosen


def load_or_build(name: str, seed: int = 0) -> nn.Module:
    """A bundled model, a model folder, or a paper's configuration with fresh weights."""
    if name in papers.PAPER_MODELS:
        torch.manual_seed(seed)
        return papers.build(name)
    return folders.load(name)


def outcome(result: dict, as_json: bool, text: str) -> None:
    """Print a command's result, as JSON for programs or as text for people, in the main process."""
    if processes.is_main():
        print(json.dumps(result) if as_json else text)
