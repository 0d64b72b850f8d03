"""Lines and tables of numbers."""

from collections.abc import Mapping, Sequence

import numpy as np

from .base import INK, PRUNED, PRUNED_INK, SPARSE_INK, figure, open_frame, plain_numbers

BARS = (SPARSE_INK, "#c9b8a8", PRUNED_INK, INK, "#e3c26f")  # of the series of a bar chart, in turn


def curves(logs: Mapping[str, Sequence[float]], *, xlabel: str = "step", ylabel: str = "loss", smooth: int = 1):
    """A matplotlib figure of one line per name; `smooth` is the length of a moving average."""
    plot, axes = figure(6, 3)
    for name, values in logs.items():
        line = np.asarray(values, dtype=float)
        if smooth > 1 and len(line) >= smooth:
            line = np.convolve(line, np.ones(smooth) / smooth, mode="valid")
        axes.plot(np.arange(len(values) - len(line), len(values)) + 1, line, label=name, linewidth=1.5)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.legend(frameon=False)
    open_frame(axes)
    return plot


def live(terms: Mapping[str, Sequence[float]], steps: Sequence[int], flips: Sequence[float]):
    """A matplotlib figure of a run so far: loss terms of every step, and the share of mask entries changed up to `steps`."""
    plot, (loss, changed) = figure(9, 2.9, 1, 2)
    for (name, values), color in zip(terms.items(), (INK, SPARSE_INK, PRUNED)):
        loss.plot(range(1, len(values) + 1), values, label=name, color=color, linewidth=1.3)
    loss.set(xlabel="step", ylabel="loss", yscale="log")
    plain_numbers(loss)
    loss.legend(frameon=False)
    changed.plot(steps, flips, color=SPARSE_INK, marker="o", markersize=3, linewidth=1.3)
    changed.set(xlabel="step", ylabel="mask entries changed", ylim=(0, None), xlim=loss.get_xlim())
    changed.yaxis.set_major_formatter("{x:.2%}")
    open_frame(loss, changed)
    return plot


def lines(
    series: Mapping[str, tuple[Sequence, Sequence[float]]],
    *,
    xlabel: str,
    ylabel: str,
    xscale: str = "linear",
    yscale: str = "linear",
    marks: Mapping[str, float] | None = None,
    levels: Mapping[str, float] | None = None,
):
    """A matplotlib figure of one line with points per name: (xs, ys), xs numbers or words.

    `marks` are named vertical lines, `levels` named horizontal ones.
    With `xscale` "symlog" zero has a place on a logarithmic axis, left of the smallest positive x.
    """
    plot, axes = figure(6, 3.2)
    for name, (xs, ys) in series.items():
        axes.plot(xs, ys, marker="o", markersize=4, linewidth=1.5, label=name)
    for name, x in (marks or {}).items():
        axes.axvline(x, color="grey", linestyle="--", linewidth=1, label=name)
    for name, y in (levels or {}).items():
        axes.axhline(y, color="grey", linestyle=":", linewidth=1, label=name)
    if xscale == "symlog":
        positive = [x for xs, _ in series.values() for x in xs if x > 0]
        powers = 10.0 ** np.arange(np.ceil(np.log10(min(positive))), np.log10(max(positive)) + 1e-9)
        axes.set_xscale("symlog", linthresh=min(positive), linscale=0.5)
        axes.set_xticks([0, *powers])
        axes.set_xlim(left=-min(positive) / 4)
    elif xscale != "linear":  # which would put numbers in the place of words
        axes.set_xscale(xscale)
    axes.set(xlabel=xlabel, ylabel=ylabel, yscale=yscale)
    if yscale == "log":
        plain_numbers(axes)
    axes.legend(frameon=False)
    open_frame(axes)
    return plot


def matrix(values: Sequence[Sequence[float]], names: Sequence[str], *, label: str):
    """A matplotlib figure of shares (0 to 1) between every two of `names`, as percentages."""
    values, size = np.asarray(values), 1.6 + 0.75 * len(names)
    plot, axes = figure(size + 0.6, size - 0.6)
    least = values.min() - 0.05
    drawn = axes.imshow(values, cmap="Blues", vmin=least, vmax=1)
    for (y, x), value in np.ndenumerate(values):
        color = "white" if value - least > 0.6 * (1 - least) else "black"
        axes.text(x, y, f"{value:.1%}", ha="center", va="center", fontsize=8, color=color)
    axes.set(xticks=range(len(names)), yticks=range(len(names)), yticklabels=names)
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    plot.colorbar(drawn, label=label, format="{x:.0%}")
    return plot


def bars(
    rows: Mapping[str, Mapping[str, float | None]],
    *,
    xlabel: str,
    stacked: bool = False,
    label: str = "{:.2f}",
    mark: float | None = None,
    colors: Sequence[str] = BARS,
):
    """A matplotlib figure of horizontal bars: by row, the numbers of named series, side by side or stacked.

    Args:
        label: format of the number at each bar; stacked, within it if there is room.
        mark: place of a vertical line.
        colors: of the series, in turn.
    """
    series = list(dict.fromkeys(name for values in rows.values() for name in values))
    places, width = np.arange(len(rows)), 0.7 if stacked else 0.8 / len(series)
    plot, axes = figure(8, 0.9 + len(rows) * (0.36 if stacked else 0.13 + 0.17 * len(series)))
    start = np.zeros(len(rows))
    for number, name in enumerate(series):
        values = np.array([row.get(name) or 0.0 for row in rows.values()])
        at = places if stacked else places + (number - (len(series) - 1) / 2) * width
        color = colors[number % len(colors)]
        drawn = axes.barh(at, values, width, left=start, color=color, label=name)
        least = 0.06 * max(sum(value or 0 for value in row.values()) for row in rows.values()) if stacked else 0
        words = [label.format(value) if value > least else "" for value in values]
        within = {"label_type": "center", "color": "white" if color in (SPARSE_INK, INK, PRUNED_INK) else "black"}
        axes.bar_label(drawn, words, fontsize=8, **(within if stacked else {"padding": 3}))
        start = start + values if stacked else start
    if mark is not None:
        axes.axvline(mark, color=INK, linewidth=1)
    axes.set(yticks=places, yticklabels=rows, xlabel=xlabel, ylim=(len(rows) - 0.4, -0.6))
    axes.margins(x=0 if stacked else 0.08)
    if len(series) > 1:
        plot.legend(*axes.get_legend_handles_labels(), frameon=False, loc="outside upper center", ncols=len(series))
    open_frame(axes)
    return plot


def ratios(tables: Mapping[str, Sequence[Sequence[float]]], rows: Sequence, columns: Sequence, *, ylabel: str, xlabel: str):
    """A matplotlib figure of tables [rows, columns] of ratios side by side, on one scale of colours around 1, which is white.

    The colours end at 2, so that one large ratio does not make the others pale.
    """
    plot, axes = figure(1 + (0.5 + 0.62 * len(columns)) * len(tables), 1.3 + 0.42 * len(rows), 1, len(tables), squeeze=False)
    for ax, (name, table) in zip(axes[0], tables.items(), strict=True):
        ax.imshow(table, cmap="RdBu", vmin=0, vmax=2, aspect="auto")
        for (y, x), value in np.ndenumerate(np.asarray(table)):
            color = "white" if abs(value - 1) > 0.6 else "black"
            ax.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=9, color=color)
        ax.set(xticks=range(len(columns)), xticklabels=columns, yticks=range(len(rows)), yticklabels=rows, xlabel=xlabel)
        ax.set_title(name, fontsize=9)
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
    axes[0, 0].set_ylabel(ylabel)
    return plot
