"""A training job: one run per folder, stoppable, logged, on one process or several."""

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator

import torch
from torch import nn

from ..checkpoints import folders
from ..masking import layers
from ..support import files, processes
from ..training import runlog
from ..training.checkpoint import CHECKPOINT, TrainConfig
from ..training.distill import TrainState
from .common import bars, on, outcome, stoppable
from .options import JobOptions, Stopped, settings


@dataclasses.dataclass(frozen=True)
class Job(JobOptions):
    """How a training is carried out."""

    def __post_init__(self):
        TrainConfig.of(self._settings())  # before a model is loaded

    def _settings(self) -> dict:
        return {"steps": self.steps, "batch_size": self.batch_size, "seed": self.seed, **settings(self.set_)}

    @property
    def options(self) -> dict:
        """Keyword arguments of `distill.train` and `finetune`."""
        return {"data": self.data, **self._settings()}

    def run(self, train: Callable[..., Iterator[TrainState]], trained: nn.Module, **tracked) -> None:
        """Train with `train(trained, out=..., **options)`, and save the averaged model in `out`/model.

        Of several processes the main one logs and saves. The tracker gets the options and `tracked`.

        Raises:
            ValueError: the folder holds a run without `resume`, or no run with `resume`.
            Stopped: by Ctrl-C or SIGTERM, after a checkpoint.
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
                log.tracker = runlog.start_tracker(tracker, self.out, {**tracked, **self.options})
            with bars(self.json or first is None) as tell:
                for state in itertools.chain([first] if first else [], states):
                    if main:
                        line = self._note(log, state) or line
                    loss = f"loss {line.get('loss', state.loss):.4f}"
                    tell("train", state.step, state.steps, loss, self.options["batch_size"])
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
        result = {"model": str(path), "loss": line.get("loss"), "seconds": round(seconds, 1)}
        outcome(result, self.json, f"{path} written" + (f"; its loss was {line['loss']:.4f}" if line else ""))
