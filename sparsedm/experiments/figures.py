"""The figures of the comparison, drawn from the stored results and the pictures in the folder of `reproduce`."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from .. import plots
from ..measure import evaluation
from . import claims, results
from .results import Row
from .significance import chance

OFF_THE_SCALE = 10  # times the teacher's FD-glyph
GRID = 18  # pictures in a row of the consistency grid
FEW = ("teacher", "more", "more-gentle", "3x4", "2x4", "diffpruned-most", "diffpruned", "1x4", "diffpruned-quarter")  # roles


def draw(base: str, folder: Path, runs: Path | None = None) -> Iterator[Path]:
    """Draw the figures of one teacher and its students into `folder` as PNG files, yielding their paths.

    Args:
        runs: the folder that `reproduce` wrote, for the consistency grid: the pictures of every method from the same noise.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = results.load("short", base)
    figures = {"macs": against_macs(rows), "latency": against_latency(rows), "training": over_training(rows)}
    if runs:
        figures["grid"] = plots.rows(pictures(base, runs))
    for name, figure in figures.items():
        path = folder / f"{base}-{name}.png"
        figure.savefig(path, dpi=150)
        yield path


def against_macs(rows: list[Row]):
    """Quality against the share of the teacher's MACs."""
    teacher = _teacher(rows)
    points = [(row.recipe.method, family(row), row.macs / teacher.macs, row.fd) for row in rows]
    xlabel = "MACs per picture and step, as a share of the dense model's"
    return plots.tradeoff(points, xlabel=xlabel, ceiling=OFF_THE_SCALE * teacher.fd)


def few(rows: list[Row]) -> list[Row]:
    """The rows that a figure with labels has room for: both methods and the baselines, at three costs."""
    return [row for row in rows if row.recipe.role in FEW]


def verdicts(bases: Sequence[str] = ("glyphs-uvit", "glyphs-unet")):
    """The words of all verdicts, a column for each teacher; `claims.table` has the figures behind them."""
    found = {results.load("headline", base)[0].recipe.backbone: claims.verdicts(base) for base in bases}
    table, paper = {}, ""
    for index, (source, claim, _) in enumerate(claims.CLAIMS):
        name = claim if source == paper else f"{source}: {claim}"
        table[name], paper = {backbone: judged[index].word for backbone, judged in found.items()}, source
    return plots.verdicts(table, (claims.HOLDS, claims.OPEN, claims.FAILS))


def every_method(rows: list[Row]):
    """Each seed of each method a dot, the best methods first; the bars are 95 % intervals of the mean.

    The intervals take the deviation of all methods together (`significance`).
    """
    teacher, spread = _teacher(rows), chance()
    rows = sorted(rows, key=lambda row: (-round(row.macs / teacher.macs, 1), row.fd))
    points = []
    for row in rows:
        factor = math.exp(spread.reach(len(row.runs), math.inf))
        values = [run["scores"]["fd_glyph"] for run in row.runs]
        group = f"about {round(row.macs / teacher.macs, 1):.0%} of the MACs"
        points.append(plots.Dots(row.recipe.method, family(row), values, (row.fd / factor, row.fd * factor), group))
    return plots.dots(points, ceiling=OFF_THE_SCALE * teacher.fd)


def against_latency(rows: list[Row]):
    """Quality against the measured time of a step, as a share of the teacher's."""
    points = [(row.recipe.method, family(row), 1 / row.speedup, row.fd) for row in rows if row.speedup]
    points += [(row.recipe.method, "dense", 1.0, row.fd) for row in rows if family(row) == "dense"]
    xlabel = "measured time of a step, as a share of the dense model's"
    return plots.tradeoff(points, xlabel=xlabel, ceiling=OFF_THE_SCALE * _teacher(rows).fd)


def over_training(rows: list[Row]):
    """Quality over training, of the runs that were watched."""
    watched = [row for row in rows if row.runs[0].get("curve")]
    curves = {row.recipe.role: [(point["step"], point["fd_glyph"]) for point in row.runs[0]["curve"]] for row in watched}
    teacher = curves["more"][0][1] if "more" in curves else None  # before training, of as many pictures as the points
    return plots.training({row.recipe.method: curves[row.recipe.role] for row in watched}, teacher=teacher)


def pictures(base: str, runs: Path) -> dict[str, torch.Tensor]:
    """The first pictures [n, C, H, W] of every method, in [-1, 1], all from the same noise, by method."""
    images = {}
    for row in results.load("short", base):
        if evaluation.samples_file(runs / row.name, row.recipe.protocol).exists():
            images[row.recipe.method] = evaluation.sampled(runs / row.name, row.recipe.protocol, GRID)
    return images


def _teacher(rows: list[Row]) -> Row:
    return next(row for row in rows if row.name in results.teachers())


def family(row: Row) -> str:
    """The kind of sparsity, one of `plots.FAMILIES`."""
    if row.recipe.prune:
        return "pruned + N:M" if row.recipe.pattern else "pruned"
    return "N:M" if row.recipe.pattern else "dense"
