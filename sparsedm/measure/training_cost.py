"""The cost of masks in training, as ratios of interleaved runs (`python -m sparsedm bench`)."""

import copy
from collections.abc import Iterator

from torch import nn

from .. import data
from ..checkpoints import folders
from ..masking import layers
from ..support import latency
from ..training import distill
from .speed import machine

BATCH = 64


def train_step(models: tuple[str, ...] = ("glyphs-uvit", "glyphs-unet"), rounds: int = 15) -> dict:
    """Time of one SR-STE training step over one dense training step, batch 64, both without teacher."""
    return {"batch_size": BATCH, **machine(), **{name: _train_step_ratio(folders.load(name), rounds) for name in models}}


def _train_step_ratio(dense: nn.Module, rounds: int) -> dict:
    sparse = layers.sparsify(copy.deepcopy(dense), "2:4")
    dataset = data.load("glyphs", n=BATCH)
    steppers = {"dense": _steps(dense, dataset), "sparse": _steps(sparse, dataset)}
    timings = latency.interleaved({name: lambda run=run: next(run) for name, run in steppers.items()}, rounds=rounds)
    return {
        "dense_ms": round(timings["dense"].median * 1e3, 1),
        "sparse_ms": round(timings["sparse"].median * 1e3, 1),
        "sparse_over_dense": round(latency.ratio(timings, "sparse", "dense"), 3),
    }


def _threads(result: dict) -> str:
    return f"{result['threads']} thread{'s' if result['threads'] > 1 else ''}"


def train_step_words(result: dict) -> str:
    """The result of `train_step` in a sentence."""
    parts = [f"{value['sparse_over_dense']:.2f} ({name})" for name, value in result.items() if isinstance(value, dict)]
    return (
        f"Masks cost little in training: a sparse step takes {' and '.join(parts)} times as long as a dense one"
        f" (batch {result['batch_size']}, {_threads(result)}, median of interleaved steps)."
    )


def _steps(model: nn.Module, dataset) -> Iterator[distill.TrainState]:
    return distill.train(model, dataset, steps=10_000, batch_size=BATCH, lr=1e-5)
