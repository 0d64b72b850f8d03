"""Quality against cost, against training, and speed."""

from collections.abc import Mapping, Sequence

from .base import INK, PRUNED_INK, SPARSE_INK, figure, open_frame, plain_numbers
from .charts import bars

FAMILIES = {"dense": INK, "N:M": SPARSE_INK, "pruned": PRUNED_INK, "pruned + N:M": "#8a4fa3"}


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

    What lies above the `ceiling` is drawn at it as a triangle, and its label says where it is.
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
    _label(axes, shown)
    axes.legend(frameon=False)
    open_frame(axes)
    return plot


def _label(axes, points: Sequence[tuple[str, str, float, float]], apart: float = 11, near: float = 190) -> None:
    """Names beside the points, moved up until they are so many points apart from those below that are near."""
    axes.figure.draw_without_rendering()  # the layout decides where the points are
    scale = 72 / axes.figure.dpi
    placed = []
    for label, family, x, y in sorted(points, key=lambda point: point[3]):
        at_x, at_y = axes.transData.transform((x, y)) * scale
        height = at_y
        for other_x, other_height in placed:
            if abs(other_x - at_x) < near:
                height = max(height, other_height + apart)
        placed.append((at_x, height))
        line = {"arrowstyle": "-", "color": FAMILIES[family], "linewidth": 0.4, "shrinkA": 1, "shrinkB": 3, "relpos": (0, 0.5)}
        style = {"textcoords": "offset points", "fontsize": 8, "va": "center", "color": FAMILIES[family]}
        axes.annotate(label, (x, y), (14, height - at_y), **style, arrowprops=line if height > at_y else None)


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
