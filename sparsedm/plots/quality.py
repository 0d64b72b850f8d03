"""Quality against cost, against training, and speed."""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from .base import INK, PRUNED_INK, SPARSE_INK, figure, open_frame, plain_numbers
from .charts import bars

FAMILIES = {"dense": INK, "N:M": SPARSE_INK, "pruned": PRUNED_INK, "pruned + N:M": "#8a4fa3"}
FONT = 8
# Where a label may begin (or end, on the left) beside its point, in points right and up; the nearest places first.
OFFSETS = sorted(
    itertools.product((14, -14, 45, -45, 90), range(-220, 221, 11)), key=lambda at: abs(at[1]) + abs(at[0]) + 8 * (at[0] < 0)
)


def speed(result: Mapping):
    """A matplotlib figure of rows of `speed.measure_layers` or `measure_steps`: how many times faster packed (or pruned) is."""
    rows = {}
    for row in result["rows"]:
        threads = f"{row['threads']} thread{'s' if row['threads'] > 1 else ''}"
        gains = {"packed, over PyTorch": row["speedup"], "packed, over oneDNN": row["speedup_over_onednn"]}
        if row.get("fastest_pruned"):
            gains["pruned, over PyTorch"] = row["speedup_pruned"]
        rows[f"{row['what']} ({row['dtype']}, {threads})"] = gains
    return bars(rows, xlabel="times faster than dense, each as it runs fastest", mark=1)


def tradeoff(
    points: Sequence[tuple[str, str, float, float]],
    *,
    xlabel: str,
    ylabel: str = "FD-glyph (lower is better)",
    ceiling: float = float("inf"),
):
    """A matplotlib figure of quality against cost: points are (label, one of `FAMILIES`, cost, FD), the FD on a log scale.

    A point above the `ceiling` is drawn there as a triangle, and its label gives the FD.
    """
    plot, axes = figure(8, 6)
    shown = [(f"{p[0]}: {p[3]:.0f}" if p[3] > ceiling else p[0], p[1], p[2], min(p[3], ceiling)) for p in points]
    for family, color in FAMILIES.items():
        for marker, above in (("o", False), ("^", True)):
            chosen = [p for p, (*_, fd) in zip(shown, points) if p[1] == family and (fd > ceiling) == above]
            name = None if above and any(p[1] == family and p[3] <= ceiling for p in points) else family
            if chosen:
                axes.scatter([p[2] for p in chosen], [p[3] for p in chosen], c=color, marker=marker, label=name, zorder=3)
    axes.set(xlabel=xlabel, ylabel=ylabel, yscale="log")
    axes.margins(x=0.05, y=0.08)
    left, right = axes.get_xlim()
    axes.set_xlim(left, right + 0.4 * (right - left))  # room for labels
    plain_numbers(axes)
    axes.legend(frameon=False, loc="upper right")
    open_frame(axes)
    _label(axes, shown)
    return plot


def _label(axes, points: Sequence[tuple[str, str, float, float]]) -> None:
    """Names beside the points, as near as they fit without covering a point, the legend, another name or its line."""
    axes.figure.draw_without_rendering()  # the layout decides where the points are
    unit = axes.figure.dpi / 72
    marks = axes.transData.transform([point[2:] for point in points])
    dots = [*np.hstack([marks - 4 * unit, marks + 4 * unit])]
    names, lines = [axes.get_legend().get_window_extent().extents], []
    for index in np.argsort(marks[:, 1]):
        label, family, *place = points[index]
        size, choices = _size(axes, label), []
        for offset in OFFSETS:
            x, y = end = marks[index] + unit * np.array(offset)
            left = offset[0] < 0
            box = np.array([x - left * size[0], y - size[1] / 2, x + (not left) * size[0], y + size[1] / 2])
            line = np.linspace(marks[index], end, 20)
            cost = 10 * sum(_overlap(box, other) for other in (*dots, *names)) + 100 * (not _within(box, axes.bbox.extents))
            cost += sum(_crosses(line, name) for name in names) + sum(_crosses(other, box) for other in lines)
            choices.append((cost, len(choices), offset, box, line))
            if not cost:
                break
        *_, offset, box, line = min(choices, key=lambda choice: choice[:2])
        names.append(box)
        lines.append(line)
        left, beside = offset[0] < 0, offset in ((14, 0), (-14, 0))
        arrow = {
            "arrowstyle": "-",
            "color": FAMILIES[family],
            "linewidth": 0.4,
            "shrinkA": 1,
            "shrinkB": 3,
            "relpos": (left, 0.5),
        }
        style = {"textcoords": "offset points", "fontsize": FONT, "va": "center", "ha": "right" if left else "left"}
        axes.annotate(label, place, offset, color=FAMILIES[family], arrowprops=None if beside else arrow, **style)


def _size(axes, label: str) -> np.ndarray:
    """Width and height of a label in pixels, with a little air."""
    text = axes.text(0, 0, label, fontsize=FONT)
    size = text.get_window_extent().size + 2
    text.remove()
    return size


# Boxes are (x0, y0, x1, y1), lines are points [n, 2].
def _within(box: np.ndarray, frame: np.ndarray) -> bool:
    return bool((box[:2] >= frame[:2]).all() and (box[2:] <= frame[2:]).all())


def _overlap(box: np.ndarray, other: np.ndarray) -> bool:
    return bool((box[:2] < other[2:]).all() and (box[2:] > other[:2]).all())


def _crosses(line: np.ndarray, box: np.ndarray) -> bool:
    return bool(((line > box[:2]) & (line < box[2:])).all(axis=1).any())


def training(lines: Mapping[str, Sequence[tuple[int, float]]], *, teacher: float | None = None):
    """A matplotlib figure of quality over training: (step, FD) points by name; `teacher` draws a line at its FD."""
    plot, axes = figure(8, 4)
    for name, points in lines.items():
        axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=name)
    if teacher:
        axes.axhline(teacher, color="grey", linestyle="--", linewidth=1, label="teacher")
    axes.set(xlabel="training step", ylabel="FD-glyph (lower is better)", yscale="log")
    plain_numbers(axes)
    axes.legend(frameon=False)
    open_frame(axes)
    return plot
