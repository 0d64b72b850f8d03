"""The benchmarks that `python -m sparsedm bench` offers, by name."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..measure import large, shares, speed, training_cost
from ..models.large import LARGE
from . import results, timing


@dataclass(frozen=True)
class Options:
    """What a benchmark measures.

    Attributes:
        models: bundled models, model folders, the papers' configurations or large ones; () for the benchmark's own choice.
        batches: batch sizes, in pictures.
        dtypes: names of torch's dtypes.
        threads: numbers of threads; () for the benchmark's own choice.
        device: the device that computes.
        compiled: whether the models also run compiled.
        runs: the folder that `reproduce` wrote.
    """

    models: Sequence[str] = ()
    batches: Sequence[int] = (1, 4, 16)
    dtypes: Sequence[str] = ("float32",)
    threads: Sequence[int] = ()
    device: torch.device = torch.device("cpu")
    compiled: bool = True
    runs: Path = Path("runs")


@dataclass(frozen=True)
class Benchmark:
    """One of the benchmarks.

    Attributes:
        measure: the result for some options: a generator of rows, or one dict.
        line: one row as text; None for a benchmark without rows.
        anywhere: whether the benchmark also runs on other devices than the CPU.
        drawn: whether `plots.speed` draws the rows.
    """

    measure: Callable[[Options], Iterator[dict] | dict]
    line: Callable[[Mapping], str] | None = None
    anywhere: bool = False
    drawn: bool = False


LETTERS = ("glyphs-uvit", "glyphs-unet")


def _steps(o: Options) -> Iterator[dict]:
    return speed.measure_steps(o.models or LETTERS, o.batches, o.dtypes, o.threads, o.compiled, device=o.device)


def _layers(o: Options) -> Iterator[dict]:
    return speed.measure_layers(o.dtypes, o.threads, device=o.device)


def _methods(o: Options) -> Iterator[dict]:
    return timing.measure_methods(o.runs, results.timed_recipes(), dtypes=o.dtypes, threads=o.threads, device=o.device)


def _rivals(o: Options) -> Iterator[dict]:
    return timing.measure_rivals(o.models or LETTERS, dtypes=o.dtypes, threads=o.threads)


def _shares(o: Options) -> Iterator[dict]:
    return shares.measure(o.models or LETTERS, dtypes=o.dtypes, threads=o.threads)


def _large(o: Options) -> Iterator[dict]:
    return large.measure(o.models or tuple(LARGE), o.dtypes, o.threads)


BENCHMARKS = {
    "step": Benchmark(_steps, speed.line, anywhere=True, drawn=True),
    "layers": Benchmark(_layers, speed.line, anywhere=True, drawn=True),
    "methods": Benchmark(_methods, speed.line, anywhere=True, drawn=True),
    "rivals": Benchmark(_rivals, speed.line),
    "shares": Benchmark(_shares, shares.line),
    "large": Benchmark(_large, large.line),
    "train-step": Benchmark(lambda options: training_cost.train_step()),
}


def benchmark(name: str, device: torch.device) -> Benchmark:
    """The benchmark called `name`. Raises ValueError for an unknown name or device."""
    if name not in BENCHMARKS:
        raise ValueError(f"unknown benchmark {name!r}; known: {', '.join(BENCHMARKS)}")
    if device.type != "cpu" and not BENCHMARKS[name].anywhere:
        raise ValueError(f"{name} is measured on the CPU, not on {device}; leave out --device")
    return BENCHMARKS[name]


def run(chosen: Benchmark, options: Options, tell: Callable[[str], None]) -> dict:
    """The result of a benchmark; `tell` gets every row as a line of text as soon as the row is measured."""
    if chosen.line is None:
        return chosen.measure(options)
    result = {**speed.machine(options.device), "rows": []}
    for row in chosen.measure(options):
        result["rows"].append(row)
        tell(chosen.line(row))
    return result
