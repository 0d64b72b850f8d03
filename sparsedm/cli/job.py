"""A training job: one run per folder, stoppable, logged, on one process or several."""

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from .. import files, layers, processes, runlog
from ..distill import TrainState
from ..models import zoo
from ..training import CHECKPOINT
from .common import Stopped, bars, outcome, stoppable


@dataclass(frozen=True)
class Job:
    """How a training is carried out: its folder, what to do in it, and `told`, the settings for the tracker."""

    out: Path
    resume: bool
    dtype: str
    json: bool
    track: str
    samples_every: int
    told: dict

    def run(self, states: Iterator[TrainState], model: nn.Module) -> None:
        """Train, and save the averaged model in `out`/model. Of several processes the first one claims, logs and saves.

        Raises:
            ValueError: the folder holds a run and `resume` was not asked for, or the other way round.
            Stopped: by Ctrl-C; a checkpoint was left.
        """
        began, main, line = time.perf_counter(), processes.is_main(), {}
        with processes.claimed(self.out), stoppable() as pressed:
            self._check()
            if main:
                files.sweep(self.out)
            log = runlog.RunLog(self.out / "log.jsonl", tracker=self._tracker()) if main else None
            first = next(states, None)
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
            self._finish(log, model, line, time.perf_counter() - began)

    def _check(self) -> None:
        there = (self.out / "train" / CHECKPOINT).exists()
        if there and not self.resume:
            raise ValueError(f"{self.out} holds a run; go on with it by --resume, or choose another folder")
        if self.resume and not there:
            raise ValueError(f"{self.out} holds no run to resume")

    def _tracker(self):
        return runlog.start_tracker(self.track, self.out, self.told)

    def _note(self, log: runlog.RunLog, state: TrainState) -> dict | None:
        line = log.add(state)
        if self.samples_every and state.step % self.samples_every == 0:
            log.draw(state)
        return line

    def _finish(self, log: runlog.RunLog, model: nn.Module, line: dict, seconds: float) -> None:
        if log.tracker:
            log.tracker.finish()
        path = self.out / "model"
        zoo.save(layers.fold(model), path, getattr(torch, self.dtype))
        found = {"model": str(path), "loss": line.get("loss"), "seconds": round(seconds, 1)}
        outcome(found, self.json, f"{path} written" + (f"; its loss was {line['loss']:.4f}" if line else ""))
