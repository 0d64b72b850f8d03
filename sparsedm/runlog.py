"""A training run's log: a file of JSON lines, one for every so many steps."""

import json
from pathlib import Path

from . import distill, layers
from .files import replacing


class RunLog:
    """Means over `every` training steps (and mask flips), appended to a JSON-lines file."""

    def __init__(self, path: Path, every: int = 50):
        self.path, self.every = path, every
        self.sums, self.count, self.masks = {}, 0, None

    def add(self, state: distill.TrainState) -> dict | None:
        """Take in one step; returns the line if one was written."""
        if self.masks is None:
            self._drop_from(state.step)
            self.masks = {}
        self.count += 1
        for term, value in {"loss": state.loss, **state.terms, "seconds": state.seconds}.items():
            self.sums[term] = self.sums.get(term, 0) + value
        if state.step % self.every and state.step < state.steps:
            return None
        line = {"step": state.step, "lr": state.lr, **{k: v / self.count for k, v in self.sums.items()}}
        now = layers.masks(state.model)
        if self.masks:
            line["mask_change"] = layers.mask_change(self.masks, now)
        self.masks, self.sums, self.count = now, {}, 0
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")
        return line

    def _drop_from(self, step: int) -> None:
        """Drop what a killed run logged after its last checkpoint."""
        kept = [line for line in read(self.path) if line["step"] < step]
        with replacing(self.path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))


def read(path: Path) -> list[dict]:
    """The lines of a log, none if there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
