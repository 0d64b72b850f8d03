"""The model that a recipe's training begins with: fresh, or the base; without channels, calibrated, or with masks."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from .. import data
from ..checkpoints import folders
from ..measure import fingerprint
from ..measure.evaluation import Progress
from ..models import denoisers, students
from ..models.uvit import UViTModel
from ..pruning import diffpruning, structure
from ..support import processes, tensorfiles
from ..support.files import replacing
from ..training.calibrate import calibrate
from .plan import base_of, model_of
from .recipes import Recipe

IMPORTANCE_PICTURES = 128  # as many as the Diff-Pruning code takes of CIFAR-10


def start(chosen: Recipe, out: Path, seed: int) -> Iterator[Progress]:
    """The model to train and its teacher (a generator that returns both)."""
    if not chosen.base:
        cls, config = chosen.model
        torch.manual_seed(seed)
        model = cls(**config)
        model.register_to_config(noise_schedule=chosen.schedule)
        if chosen.context_tokens:
            model.register_to_config(context_tokens=chosen.context_tokens)
        return model, None
    if chosen.draws:
        return load(model_of(chosen.draws, out)[0]), None
    source, _ = base_of(chosen, out)
    model, teacher = load(source), load(source)
    if chosen.prune:
        model = yield from pruned(model, chosen, out / chosen.base, seed)
    if chosen.calibrate:
        yield from _calibrated(model, chosen, seed)
    weights_train = chosen.train and "train_only" not in chosen.train
    if chosen.pattern and (weights_train or not chosen.calibrate):
        students.sparsify(model, chosen.pattern, **chosen.sparsify)
    return model, teacher


def _calibrated(model: nn.Module, chosen: Recipe, seed: int) -> Iterator[Progress]:
    """Make the model N:M by calibration."""
    options = {"data": chosen.data, "pattern": chosen.pattern, "seed": seed, **chosen.calibrate}
    for state in calibrate(model, **options):
        yield Progress("calibrate", state.layer, state.layers, f"{state.name} {state.before:.3f} -> {state.after:.3f}")


def pruned(model: nn.Module, chosen: Recipe, folder: Path, seed: int) -> Iterator[Progress]:
    """The base without channels, by the recipe's score, or this shape with fresh weights (a generator that returns a model)."""
    options = dict(chosen.prune)
    threshold, reinit = options.pop("threshold", None), options.pop("reinit", False)
    if threshold is not None:
        yield from _importance(model, chosen.data, threshold, seed, folder)
    narrow = diffpruning.prune(model, seed=seed, **options)
    if not reinit:
        return narrow
    torch.manual_seed(seed)
    fresh = type(model).from_config({k: v for k, v in model.config.items() if k != "noise_schedule"})
    fresh.register_to_config(noise_schedule=model.config.noise_schedule)
    fresh = structure.apply(fresh, narrow.config.pruning)
    if not isinstance(fresh, UViTModel):  # which draws all weights alike; others by their layers' widths, now fewer
        for module in fresh.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
    return fresh


def _importance(model: nn.Module, dataset: str, threshold: float, seed: int, folder: Path) -> Iterator[Progress]:
    """Give the model the gradients of Diff-Pruning's importance; `folder` keeps them for other recipes of these weights."""
    path = folder / f"importance-{threshold:g}-{seed}-{fingerprint.of_model(model)}.safetensors"
    if processes.is_main() and not path.exists():
        pictures = data.load(dataset, n=IMPORTANCE_PICTURES, size=denoisers.picture_size(model))
        images, labels = data.stack(pictures, IMPORTANCE_PICTURES)
        for state in diffpruning.importance(model, images, labels, threshold=threshold, seed=seed):
            yield Progress("importance", state.timestep + 1, state.timesteps, f"loss {state.loss:.4f}")
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            gradients = {k: p.grad.cpu().contiguous() for k, p in model.named_parameters() if p.grad is not None}
            tensorfiles.save(temporary, gradients)
    processes.wait()
    gradients, _ = tensorfiles.read(path, "remove it, and the importance is computed again")
    for name, parameter in model.named_parameters():
        parameter.grad = gradients[name].to(parameter.device) if name in gradients else None


def load(source: str | Path) -> nn.Module:
    """A model on the device of this process."""
    return folders.load(source).to(processes.state().device)
