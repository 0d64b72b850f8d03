"""A training job: one run per folder, stoppable, logged, on one process or several."""

import dataclasses
import functools
import inspect
import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import nn

from ..checkpoints import folders
from ..masking import layers
from ..support import files, processes
from ..training import runlog
from ..training.checkpoint import CHECKPOINT
from ..training.distill import TrainState
from .common import Data, Device, Half, Json, Seed, Set, Stopped, bars, on, outcome, settings, stoppable


@dataclasses.dataclass(frozen=True)
class Job:
    """The options that the commands for training share, and how a training is carried out."""

    out: Annotated[Path, typer.Argument(help="A folder for checkpoints, log and, in OUT/model, the model.")]
    data: Data = "glyphs"
    steps: Annotated[int, typer.Option(help="Training steps in all.")] = 1000
    batch_size: Annotated[int, typer.Option(help="Pictures per step, over all processes.")] = 64
    set_: Set = None
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in OUT.")] = False
    track: Annotated[str, typer.Option(help="tensorboard, wandb, ... or none; TensorBoard by default, if it is installed.")] = ""
    samples_every: Annotated[int, typer.Option(help="Draw a grid of pictures every so many steps; 0 never does.")] = 0
    dtype: Half = "float16"
    device: Device = ""
    seed: Seed = 0
    json: Json = False

    @property
    def options(self) -> dict:
        """Keyword arguments of `distill.train` and `finetune`."""
        options = {"steps": self.steps, "batch_size": self.batch_size, "seed": self.seed}
        return {"data": self.data, **options, **settings(self.set_)}

    def run(self, train: Callable[..., Iterator[TrainState]], trained: nn.Module, **told) -> None:
        """Train with `train(trained, out=..., **options)`, and save the averaged model in `out`/model.

        Of several processes the first one claims, logs and saves. The tracker gets the options and what else is `told`.

        Raises:
            ValueError: the folder holds a run and `resume` was not asked for, or the other way round.
            Stopped: by Ctrl-C or SIGTERM; a checkpoint was left.
        """
        dtype, tracker = folders.dtype_of(self.dtype), runlog.tracker_class(self.track)
        on(self.device)
        states = train(trained, out=self.out / "train", **self.options)
        began, main, line = time.perf_counter(), processes.is_main(), {}
        with processes.claimed(self.out), stoppable() as pressed:
            self._check()
            if main:
                files.sweep(self.out)
            log, first = runlog.RunLog(self.out / "log.jsonl") if main else None, next(states, None)
            if main and tracker:
                log.tracker = runlog.start_tracker(tracker, self.out, {**told, **self.options})
            with bars(self.json or first is None) as bar:
                task = bar.add_task("train", total=first.steps if first else 0, note="")
                for state in itertools.chain([first] if first else [], states):
                    if main:
                        line = self._note(log, state) or line
                    bar.update(task, completed=state.step, note=f"loss {line.get('loss', state.loss):.4f}")
                    # all must stop at the same step
                    if state.step < state.steps and processes.anywhere(bool(pressed)):
                        states.close()
                        raise Stopped(f"stopped at step {state.step} of {state.steps}; go on with the same command and --resume")
        if main:
            self._finish(log, trained, dtype, line, time.perf_counter() - began)

    def _check(self) -> None:
        there = (self.out / "train" / CHECKPOINT).exists()
        if there and not self.resume:
            raise ValueError(f"{self.out} holds a run; go on with it by --resume, or choose another folder")
        if self.resume and not there:
            raise ValueError(f"{self.out} holds no run to resume")

    def _note(self, log: runlog.RunLog, state: TrainState) -> dict | None:
        line = log.add(state)
        if self.samples_every and state.step % self.samples_every == 0:
            log.draw(state)
        return line

    def _finish(self, log: runlog.RunLog, model: nn.Module, dtype: torch.dtype, line: dict, seconds: float) -> None:
        if log.tracker:
            log.tracker.finish()
        path = self.out / "model"
        folders.save(layers.fold(model), path, dtype)
        found = {"model": str(path), "loss": line.get("loss"), "seconds": round(seconds, 1)}
        outcome(found, self.json, f"{path} written" + (f"; its loss was {line['loss']:.4f}" if line else ""))


def with_job(command: Callable) -> Callable:
    """`command` for typer: its parameter `job` replaced by the fields of `Job`."""

    @functools.wraps(command)
    def run(**given):
        job = Job(**{field.name: given.pop(field.name) for field in dataclasses.fields(Job)})
        return command(job=job, **given)

    own = [parameter for name, parameter in inspect.signature(command).parameters.items() if name != "job"]
    parameters = [*own, *inspect.signature(Job).parameters.values()]
    run.__signature__ = inspect.Signature(sorted(parameters, key=lambda parameter: parameter.default is not parameter.empty))
    return run
