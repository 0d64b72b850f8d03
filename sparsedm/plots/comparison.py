"""Many methods at a glance: verdicts, and scores with their intervals."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from .base import INK, figure, open_frame
from .quality import FAMILIES

_SHADES = ("#404040", "#c9c9c9", "#ffffff")  # no colour of a family


def verdicts(table: Mapping[str, Mapping[str, str]], words: Sequence[str]):
    """A matplotlib figure of a strip of words: by row (a claim) and column (a model), one of three `words`, dark to white."""
    columns = list(next(iter(table.values())))
    plot, axes = figure(6.4 + 1.2 * len(columns), 0.5 + 0.27 * len(table))
    for y, row in enumerate(table.values()):
        for x, column in enumerate(columns):
            place = words.index(row[column])
            axes.barh(y, 0.96, 0.86, left=x + 0.02, color=_SHADES[place], edgecolor=_SHADES[0], linewidth=0.6)
            axes.text(x + 0.5, y, row[column], ha="center", va="center", fontsize=8, color=_SHADES[2 if place == 0 else 0])
    axes.set(xlim=(0, len(columns)), ylim=(len(table) - 0.5, -0.5))
    axes.set_xticks(np.arange(len(columns)) + 0.5, columns)
    axes.set_yticks(range(len(table)), list(table))
    axes.xaxis.tick_top()
    axes.tick_params(length=0, labelsize=9)
    axes.spines[:].set_visible(False)
    return plot


class Dots(NamedTuple):
    """The scores of a method.

    Attributes:
        name: the row's label.
        family: one of `plots.FAMILIES`.
        values: a score a seed.
        interval: where the mean may lie.
        group: rows of one group stand together, below a line.
    """

    name: str
    family: str
    values: Sequence[float]
    interval: tuple[float, float]
    group: str = ""


def dots(rows: Sequence[Dots], *, xlabel: str = "FD-glyph (lower is better)", ceiling: float = float("inf")):
    """A matplotlib figure of one line a row: a dot for each value, a bar for the interval, on a logarithmic axis.

    A row whose mean is above the `ceiling` is a triangle there, with its number.
    """
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    plot, axes = figure(7.5, 0.8 + 0.22 * len(rows))
    for y, row in enumerate(rows):
        color, mean = FAMILIES[row.family], float(np.exp(np.mean(np.log(row.values))))
        if mean > ceiling:
            axes.plot(ceiling, y, marker=">", color=color, markersize=5)
            axes.annotate(f"{mean:.0f}", (ceiling, y), (-7, 0), textcoords="offset points", ha="right", va="center", fontsize=8)
        else:
            axes.plot(row.interval, (y, y), color=color, linewidth=5, alpha=0.25, solid_capstyle="butt")
            axes.plot(row.values, [y] * len(row.values), linestyle="", marker="o", markersize=4, color=color)
        if y and row.group != rows[y - 1].group:
            axes.axhline(y - 0.5, color="grey", linewidth=0.5)
    for y, row in enumerate(rows):
        if row.group and (not y or row.group != rows[y - 1].group):
            axes.text(1.01, y, row.group, transform=axes.get_yaxis_transform(), fontsize=8, color=INK, va="center")
    axes.set(xscale="log", xlabel=xlabel, ylim=(len(rows) - 0.4, -0.6))
    axes.set_yticks(range(len(rows)), [row.name for row in rows], fontsize=8)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="x", linewidth=0.3)
    open_frame(axes)
    return plot
