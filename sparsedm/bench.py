"""Benchmarks as ratios of interleaved runs: what packing gains, what masks cost (`python -m sparsedm bench`)."""

import copy
import platform
from collections.abc import Iterator

import torch
from torch import nn

from . import data, distill, dryrun, latency, layers, macs, nm, packed
from .models import zoo

BATCH = 64


def train_step(models: tuple[str, ...] = ("glyphs-uvit", "glyphs-unet"), rounds: int = 15) -> dict:
    """Time of one SR-STE training step over one dense training step, batch 64, both without teacher."""
    return {"batch_size": BATCH, **_machine(), **{name: _train_step_ratio(zoo.load(name), rounds) for name in models}}


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


def step(
    models: tuple[str, ...] = ("glyphs-uvit", "glyphs-unet"),
    batches: tuple[int, ...] = (1, 6, 16),
    compiled: bool = True,
    rounds: int = 21,
) -> dict:
    """Milliseconds of one sampling step, float32: the dense model, eager and compiled, and its packed 2:4 student, the same.

    `speedup` is the fastest dense setting over the fastest packed one, round by round.
    """
    table = {}
    for name in models:
        dense, student = zoo.load(name), zoo.load(f"{name}-2x4")
        for batch in batches:
            packed_model = packed.pack(copy.deepcopy(student), batch=batch)
            table[f"{name}, batch {batch}"] = _step_row(
                dense, packed_model, dryrun.example_inputs(dense, batch), compiled, rounds
            )
    return {"unit": "ms", **_machine(), **table}


def _step_row(dense: nn.Module, sparse: nn.Module, inputs: dict, compiled: bool, rounds: int) -> dict:
    variants = {"dense": dense, "packed": sparse}
    if compiled:
        variants |= {f"{name}, compiled": torch.compile(model) for name, model in list(variants.items())}
    with torch.no_grad():
        timings = latency.interleaved({k: lambda m=m: m(**inputs) for k, m in variants.items()}, rounds=rounds)
    fastest = {
        side: min((k for k in timings if k.startswith(side)), key=lambda k: timings[k].median) for side in ("dense", "packed")
    }
    return {
        **{name: round(timing.median * 1e3, 2) for name, timing in timings.items()},
        "speedup": round(latency.ratio(timings, fastest["dense"], fastest["packed"]), 2),
        "macs_skipped": round(1 - macs.count(sparse).executed / macs.count(dense).dense, 3),
    }


def step_words(result: dict) -> str:
    """The outcome of `step` as a Markdown table."""
    rows = {name: row for name, row in result.items() if isinstance(row, dict)}
    columns = [c for c in next(iter(rows.values())) if c not in ("speedup", "macs_skipped")]
    lines = [f"| ms per step | {' | '.join(columns)} | speed-up | MACs skipped |", "|---" * (len(columns) + 3) + "|"]
    for name, row in rows.items():
        cells = [*(f"{row[c]:.1f}" for c in columns), f"**{row['speedup']:.2f}x**", f"{row['macs_skipped']:.0%}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    tail = f"float32, {_threads(result)}, median of interleaved steps; speed-up: fastest dense over fastest packed."
    return "\n".join([*lines, "", tail])


def _threads(result: dict) -> str:
    return f"{result['threads']} thread{'s' if result['threads'] > 1 else ''}"


def train_step_words(result: dict) -> str:
    """The outcome of `train_step` in a sentence."""
    parts = [f"{value['sparse_over_dense']:.2f} ({name})" for name, value in result.items() if isinstance(value, dict)]
    return (
        f"Masks cost little in training: a sparse step takes {' and '.join(parts)} times as long as a dense one"
        f" (batch {result['batch_size']}, {_threads(result)}, median of interleaved steps)."
    )


def _steps(model: nn.Module, dataset) -> Iterator[distill.TrainState]:
    return distill.train(model, dataset, steps=10_000, batch_size=BATCH, lr=1e-5)


def masks(shapes: tuple[tuple[int, ...], ...] = ((2048, 512), (512, 2048), (256, 256, 3, 3)), rounds: int = 7) -> dict:
    """Nanoseconds per weight of the mask, by pattern: comparing pairs, selecting the n-th key, and a stable argsort."""
    table = {}
    for shape in shapes:
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        for pattern in map(nm.NMPattern.parse, ("2:4", "4:8", "15:16", "31:32")):
            timings = latency.interleaved(nm.ways(weight, pattern), rounds=rounds)
            row = {name: round(timing.median * 1e9 / weight.numel(), 2) for name, timing in timings.items()}
            table[f"{'x'.join(map(str, shape))} {pattern}"] = row
    return {"unit": "ns per weight", **_machine(), **table}


def _machine() -> dict:
    return {"machine": platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__}


BENCHES = {"step": step, "train-step": train_step, "masks": masks}
