"""The log of a training run: JSON lines of means over a number of steps, previews, and a tracker such as TensorBoard."""

import json
import warnings
from pathlib import Path

import numpy as np
import torch
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, WandBTracker, get_available_trackers

from .. import diffusion, plots
from ..masking import layers
from ..models import denoisers
from ..support import processes
from ..support.files import replacing, writing
from . import distill

NO_TRACKER, BEST_TRACKER = "none", ""
GRID = 16  # pictures in a preview
PREVIEW_SAMPLERS = ("dpm++", "ddim", "ddpm")  # a preview takes the first that keeps the model's noise schedule


class RunLog:
    """Means over `every` training steps (and mask flips), appended to a JSON-lines file."""

    def __init__(self, path: Path, every: int = 50, tracker: GeneralTracker | None = None):
        self.path, self.every, self.tracker = path, every, tracker
        self.sums, self.count, self.masks = {}, 0, None

    def add(self, state: distill.TrainState) -> dict | None:
        """Take in one step; returns the line of the log if this step ends one."""
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
        with writing(self.path, "its earlier lines and the last checkpoint are kept"), open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")
        if self.tracker:
            self.tracker.log({name: value for name, value in line.items() if name != "step"}, step=state.step)
        return line

    def draw(self, state: distill.TrainState) -> Path:
        """Draw a preview, a grid of the averaged model's pictures from ever the same noise, into samples/ beside the log.

        Raises:
            ValueError: no sampler keeps the model's noise schedule (the setting is named).
        """
        model = state.ema_model()
        null = denoisers.null_label(model)
        labels = None if null is None else torch.arange(GRID) % null
        noise, generators = diffusion.start_noise(model, GRID), diffusion.step_generators(GRID)
        sampler = next(diffusion.possible_samplers(model, PREVIEW_SAMPLERS))
        images = diffusion.generate(model, noise, sampler=sampler, steps=20, class_labels=labels, generator=generators)
        grid, path = plots.picture(images, columns=4, scale=scale(images)), self.path.parent / "samples" / f"{state.step:08d}.png"
        plots.save(grid, path)
        if self.tracker:
            layout = {"dataformats": "NHWC"} if self.tracker.name == "tensorboard" else {}
            self.tracker.log_images({"samples": np.asarray(grid)[None]}, step=state.step, **layout)
        return path

    def _drop_from(self, step: int) -> None:
        """Drop what a killed run logged after its last checkpoint."""
        kept = [line for line in read(self.path) if line["step"] < step]
        with replacing(self.path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))


def scale(images: torch.Tensor) -> int:
    """The factor that enlarges pictures [n, C, H, W] for a grid to about 128 pixels."""
    return max(1, 128 // images.shape[-1])


def tracker_class(name: str) -> type[GeneralTracker] | None:
    """A tracker of accelerate's by name ("tensorboard", "wandb", ...); "" is TensorBoard if installed, "none" is no tracker.

    Raises:
        ValueError: the tracker is unknown or not installed.
    """
    available = [str(getattr(tracker, "value", tracker)) for tracker in get_available_trackers()]
    if name == NO_TRACKER or (name == BEST_TRACKER and "tensorboard" not in available):
        return None
    name = name or "tensorboard"
    if name not in available:
        known = ", ".join(LOGGER_TYPE_TO_CLASS)
        raise ValueError(f"tracker {name!r} is not installed; installed: {', '.join(available) or 'none'}; known: {known}")
    return LOGGER_TYPE_TO_CLASS[name]


def start_tracker(cls: type[GeneralTracker], folder: Path, settings: dict) -> GeneralTracker:
    """Begin a run named as its folder, with its settings; the tracker writes into the folder's tracker/."""
    processes.state()  # trackers ask in which process they are
    place = folder / "tracker"
    if cls is WandBTracker:  # its first name is the project's, which holds many runs
        place.mkdir(exist_ok=True)
        tracker = cls("sparsedm", name=folder.name, dir=place)
    else:
        tracker = cls(folder.name, logging_dir=place) if cls.requires_logging_directory else cls(folder.name)
    tracker.start()
    tracker.store_init_configuration({k: v if isinstance(v, (int, float, bool, str)) else str(v) for k, v in settings.items()})
    return tracker


def read(path: Path) -> list[dict]:
    """The records in a log, none if there is no file. A last line that a killed run has cut is left out, with a warning.

    Raises:
        ValueError: another line is damaged; the message gives its number.
    """
    lines, records = path.read_bytes().splitlines() if path.exists() else [], []
    for number, line in enumerate(lines, 1):
        try:
            records.append(_parsed(line))
        except ValueError as error:
            if number < len(lines):
                raise ValueError(f"line {number} of {path} is damaged ({error}); remove the line") from error
            warnings.warn(f"the last line of {path} was cut; it is left out", stacklevel=2)
    return records


def _parsed(line: bytes) -> dict:
    record = json.loads(line)
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        raise ValueError("it names no step")
    return record
