"""The benchmarks that `python -m sparsedm bench` offers, by name."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..measure import shares, speed, training_cost
from . import results, timing


@dataclass(frozen=True)
class Options:
    """What a benchmark measures.

    Attributes:
        models: bundled models, model folders or the papers' configurations.
        batches: batch sizes, in pictures.
        dtypes: names of torch's dtypes.
        threads: numbers of threads; () for the benchmark's own choice.
        device: the device that computes.
        compiled: whether the models also run compiled.
        runs: the folder that `reproduce` wrote.
    """

    models: Sequence[str] = ("glyphs-uvit", "glyphs-unet")
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


def _steps(o: Options) -> Iterator[dict]:
    return speed.measure_steps(o.models, o.batches, o.dtypes, o.threads, o.compiled, device=o.device)


def _layers(o: Options) -> Iterator[dict]:
    return speed.measure_layers(o.dtypes, o.threads, device=o.device)


def _methods(o: Options) -> Iterator[dict]:
    names = [name for name in results.timed_recipes() if (o.runs / name / "model").is_dir()]
    return timing.measure_methods(o.runs, names, dtypes=o.dtypes, threads=o.threads, device=o.device)


def _shares(o: Options) -> Iterator[dict]:
    return shares.measure(o.models, dtypes=o.dtypes, threads=o.threads)


BENCHMARKS = {
    "step": Benchmark(_steps, speed.line, anywhere=True, drawn=True),
    "layers": Benchmark(_layers, speed.line, anywhere=True, drawn=True),
    "methods": Benchmark(_methods, speed.line, anywhere=True, drawn=True),
    "shares": Benchmark(_shares, shares.line),
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
