"""Every picture and figure that notebooks, app and README show."""

import base64
import io
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image, ImageColor

from . import nm

INK, SPARSE_INK, PAPER, PRUNED = "#1f3a93", "#b4491f", "#fdfaf3", "#d9cfc3"


def picture(
    images: torch.Tensor, *, scale: int = 8, columns: int | None = None, gap: int = 1, ink: str = INK, paper: str = PAPER
) -> Image.Image:
    """Pictures [n, C, H, W] in [-1, 1] side by side, enlarged with nearest neighbour; one channel is ink on paper.

    Args:
        columns: pictures per row; all in one row by default.
        gap: pixels between pictures, before enlarging.
    """
    pixels = ((images.detach().float().cpu().clamp(-1, 1) + 1) / 2).permute(0, 2, 3, 1).numpy()  # [n, H, W, C]
    pen, ground = (np.array(ImageColor.getrgb(c)) / 255 for c in (ink, paper))
    if pixels.shape[-1] == 1:
        pixels = pixels * pen + (1 - pixels) * ground
    n, height, width, _ = pixels.shape
    columns = columns or n
    rows = -(-n // columns)
    canvas = np.broadcast_to(ground, (rows * (height + gap) + gap, columns * (width + gap) + gap, 3)).copy()
    for i, tile in enumerate(pixels):
        y, x = gap + i // columns * (height + gap), gap + i % columns * (width + gap)
        canvas[y : y + height, x : x + width] = tile
    image = Image.fromarray((canvas * 255).round().astype(np.uint8))
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


def word_card(images: torch.Tensor, *, size: tuple[int, int] = (1200, 280), ink: str = INK, paper: str = PAPER) -> Image.Image:
    """A word's pictures [n, C, H, W] in [-1, 1] centred on paper of a fixed `size` in pixels, as large as a whole scale allows.

    Of one or two rows the one is chosen that gives the larger letters. Words of any length give pictures of one size.
    """
    n, _, height, width = images.shape

    def scale(columns: int) -> int:
        return min(size[0] // (columns * (width + 1) + 1), size[1] // (-(-n // columns) * (height + 1) + 1))

    columns = max((n, -(-n // 2)), key=scale)
    if scale(columns) < 1:
        raise ValueError(f"{n} pictures of {width}x{height} do not fit into {size[0]}x{size[1]} pixels")
    word = picture(images, scale=scale(columns), columns=columns, ink=ink, paper=paper)
    card = Image.new("RGB", size, paper)
    card.paste(word, ((size[0] - word.width) // 2, (size[1] - word.height) // 2))
    return card


def curves(logs: Mapping[str, Sequence[float]], *, xlabel: str = "step", ylabel: str = "loss", smooth: int = 1):
    """A matplotlib figure of one line per name; `smooth` is the length of a moving average."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
    for name, values in logs.items():
        line = np.asarray(values, dtype=float)
        if smooth > 1 and len(line) >= smooth:
            line = np.convolve(line, np.ones(smooth) / smooth, mode="valid")
        axes.plot(np.arange(len(values) - len(line), len(values)) + 1, line, label=name, linewidth=1.5)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    plt.close(figure)  # else a notebook shows it twice
    return figure


def rows(pictures: Mapping[str, torch.Tensor], *, ink: str = INK):
    """A matplotlib figure with one labelled row of pictures [n, C, H, W] per name, for comparing models on the same noise."""
    import matplotlib.pyplot as plt

    count, (n, _, height, width) = len(pictures), next(iter(pictures.values())).shape
    size = (0.4 + 0.085 * max(map(len, pictures)) + 0.42 * n, 0.5 * count * height / width)
    figure, axes = plt.subplots(count, 1, figsize=size, layout="constrained", squeeze=False)
    for ax, (name, images) in zip(axes[:, 0], pictures.items(), strict=True):
        ax.imshow(picture(images, scale=4, ink=ink), interpolation="nearest")
        ax.set(xticks=[], yticks=[])
        ax.set_ylabel(name, rotation=0, ha="right", va="center")
        ax.spines[:].set_visible(False)
    plt.close(figure)
    return figure


def speed(result: Mapping):
    """A matplotlib figure of `speed.measure_layers` or `measure_steps`: how many times faster packed is, bar by bar."""
    import matplotlib.pyplot as plt

    lines = result["rows"]
    figure, axes = plt.subplots(figsize=(8, 0.6 + 0.34 * len(lines)), layout="constrained")
    names = [f"{row['what']} ({row['dtype']}, {row['threads']} thread{'s' if row['threads'] > 1 else ''})" for row in lines]
    places = np.arange(len(lines))
    over = [row["speedup_over_onednn"] or 0 for row in lines]
    bars = axes.barh(places - 0.17, [row["speedup"] for row in lines], 0.3, color=SPARSE_INK, label="over PyTorch's fastest")
    axes.barh(places + 0.17, over, 0.3, color="#c9b8a8", label="over oneDNN's layers")
    axes.bar_label(bars, [f"{row['speedup']:.2f}" for row in lines], padding=3, fontsize=8)
    axes.axvline(1, color=INK, linewidth=1)
    axes.set(yticks=places, yticklabels=names, xlabel="times faster, packed 2:4")
    axes.invert_yaxis()
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.4, 1.0 + 0.5 / len(lines) + 0.06), ncols=2)
    axes.spines[["top", "right"]].set_visible(False)
    plt.close(figure)
    return figure


FAMILIES = {"dense": INK, "N:M": SPARSE_INK, "pruned": "#2e7d4f", "pruned + N:M": "#8a4fa3"}


def tradeoff(points: Sequence[tuple[str, str, float, float]], *, xlabel: str, ylabel: str = "FD-glyph (lower is better)"):
    """A matplotlib figure of quality against cost: points are (label, one of `FAMILIES`, cost, FD), the FD on a log scale."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for family, color in FAMILIES.items():
        chosen = [point for point in points if point[1] == family]
        if chosen:
            axes.scatter([p[2] for p in chosen], [p[3] for p in chosen], color=color, label=family, zorder=3)
    axes.set(xlabel=xlabel, ylabel=ylabel, yscale="log")
    axes.margins(x=0.05)
    left, right = axes.get_xlim()
    axes.set_xlim(left, right + 0.4 * (right - left))  # room for labels
    _plain_numbers(axes)
    _label(axes, points)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    plt.close(figure)
    return figure


def _plain_numbers(axes) -> None:
    """A logarithmic y axis with numbers such as 3 instead of powers of ten."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="y", linewidth=0.3)


def _label(axes, points: Sequence[tuple[str, str, float, float]], apart: float = 11, near: float = 190) -> None:
    """Names beside the points, moved up until they are so many points apart from those below that are near."""
    scale = 72 / axes.figure.dpi
    placed = []
    for label, family, x, y in sorted(points, key=lambda point: point[3]):
        at_x, at_y = axes.transData.transform((x, y)) * scale
        height = at_y
        for other_x, other_height in placed:
            if abs(other_x - at_x) < near:
                height = max(height, other_height + apart)
        placed.append((at_x, height))
        place = {"textcoords": "offset points", "fontsize": 7.5, "va": "center", "color": FAMILIES[family]}
        axes.annotate(label, (x, y), (7, height - at_y), **place)


def training(lines: Mapping[str, Sequence[tuple[int, float]]], *, teacher: float | None = None):
    """A matplotlib figure of quality over training: (step, FD) points by name; `teacher` draws a line at its FD."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    for name, points in lines.items():
        axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=name)
    if teacher:
        axes.axhline(teacher, color="grey", linestyle="--", linewidth=1, label="teacher")
    axes.set(xlabel="training step", ylabel="FD-glyph (lower is better)", yscale="log")
    _plain_numbers(axes)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    plt.close(figure)
    return figure


def lines(
    series: Mapping[str, tuple[Sequence, Sequence[float]]],
    *,
    xlabel: str,
    ylabel: str,
    xscale: str = "linear",
    yscale: str = "linear",
    marks: Mapping[str, float] | None = None,
):
    """A matplotlib figure of one line with points per name: (xs, ys), xs numbers or words; `marks` are named vertical lines.

    With `xscale` "symlog" zero has a place on a logarithmic axis, left of the smallest positive x.
    """
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
    for name, (xs, ys) in series.items():
        axes.plot(xs, ys, marker="o", markersize=4, linewidth=1.5, label=name)
    for name, x in (marks or {}).items():
        axes.axvline(x, color="grey", linestyle="--", linewidth=1, label=name)
    if xscale == "symlog":
        positive = [x for xs, _ in series.values() for x in xs if x > 0]
        powers = 10.0 ** np.arange(np.ceil(np.log10(min(positive))), np.log10(max(positive)) + 1e-9)
        axes.set_xscale("symlog", linthresh=min(positive), linscale=0.5)
        axes.set_xticks([0, *powers])
        axes.set_xlim(left=-min(positive) / 4)
    elif xscale != "linear":  # which would put numbers in the place of words
        axes.set_xscale(xscale)
    axes.set(xlabel=xlabel, ylabel=ylabel, yscale=yscale)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    plt.close(figure)
    return figure


def groups(weight: torch.Tensor, pattern: nm.NMPattern | str, *, rows: int = 8, columns: int = 16):
    """A matplotlib figure of a weight [out, in, ...] and its magnitude mask: pruned entries are pale, lines part the groups.

    Rows are the first output features of a linear weight; of a convolution the kernel positions of its first output, for the
    groups run along the input channels of each.
    """
    import matplotlib.pyplot as plt

    pattern, weight = nm.NMPattern.parse(pattern), weight.detach().float().cpu()
    kept, convolution = nm.mask(weight, pattern), weight.dim() > 2
    shown, kept = (x[0].flatten(1).T if convolution else x[:rows] for x in (weight, kept))
    columns = min(max(columns, pattern.m), shown.shape[1])
    shown, kept = shown[:, :columns], kept[:, :columns]
    largest = shown.abs().max().item() or 1.0
    figure, axes = plt.subplots(figsize=(1.6 + 0.34 * columns, 0.9 + 0.34 * len(shown)), layout="constrained")
    drawn = axes.imshow(shown, cmap="RdBu_r", vmin=-largest, vmax=largest, alpha=kept.float() * 0.75 + 0.25)
    for y, x in (~kept).nonzero().tolist():
        axes.plot(x, y, marker="x", color="#999999", markersize=4, linewidth=0)
    for edge in range(0, columns + 1, pattern.m):
        axes.axvline(edge - 0.5, color="black", linewidth=1.2)
    names = [str(place).strip("()") for place in np.ndindex(*weight.shape[2:])] if convolution else range(len(shown))
    axes.set(
        xticks=range(0, columns, min(pattern.m, 4)), yticks=range(len(shown)), yticklabels=names,
        xlabel="input channel" if convolution else "input feature",
        ylabel="kernel position (row, column)" if convolution else "output feature",
        title=f"{pattern}: the {pattern.n} largest of every {pattern.m} stay, x marks the pruned",
    )  # fmt: skip
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.colorbar(drawn, label="weight")
    plt.close(figure)
    return figure


def group_explorer(weight: torch.Tensor, pattern: nm.NMPattern | str = "2:4"):
    """Sliders for N and M over `groups`; the figure itself where there is no ipywidgets, or no front end that runs them."""
    pattern = nm.NMPattern.parse(pattern)
    try:
        import ipywidgets
    except ImportError:
        return groups(weight, pattern)

    class Explorer(ipywidgets.VBox):
        def _repr_mimebundle_(self, **kwargs) -> dict:
            return super()._repr_mimebundle_(**kwargs) | {"image/png": base64.b64encode(picture.value).decode()}

    sizes = [m for m in (2, 4, 8, 16, 32) if weight.shape[1] % m == 0]
    m = ipywidgets.SelectionSlider(options=sizes, value=pattern.m, description="M")
    n = ipywidgets.IntSlider(pattern.n, 1, pattern.m, description="N", continuous_update=False)
    picture = ipywidgets.Image(format="png", layout={"align_self": "flex-start"})  # as large as it is

    def draw(change: object = None) -> None:
        n.max = m.value  # and so is n, at most
        buffer = io.BytesIO()
        groups(weight, nm.NMPattern(n.value, m.value)).savefig(buffer, format="png", dpi=80)
        picture.value = buffer.getvalue()

    n.observe(draw, "value")
    m.observe(draw, "value")
    draw()
    return Explorer([m, n, picture])


def timesteps(losses: Sequence[float], thresholds: Sequence[float]):
    """A matplotlib figure of the loss at t = 0, 1, 2, ... over the largest of them, and where each threshold cuts it off."""
    import matplotlib.pyplot as plt

    share = np.asarray(losses) / np.maximum.accumulate(losses)
    figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
    axes.plot(share, color=INK, linewidth=1.5)
    for threshold, color in zip(thresholds, plt.cm.plasma(np.linspace(0, 0.8, len(thresholds))), strict=True):
        below = np.flatnonzero(share < threshold)
        stop = int(below[0]) if len(below) else len(share)
        axes.plot([0, stop, stop], [threshold, threshold, 0], color=color, linewidth=1, label=f"T = {threshold:g}: t < {stop}")
    axes.set(xlabel="timestep t", ylabel="loss / largest loss so far", xlim=(0, None), ylim=(0, 1.02))
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    plt.close(figure)
    return figure


def channels(scores: Mapping[str, torch.Tensor], kept: Mapping[str, Sequence[int]]):
    """A matplotlib figure of the scores [channels] of each group, one bar per channel, largest first; pruned ones are pale."""
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    figure, axes = plt.subplots(1, len(scores), figsize=(2.7 * len(scores), 2.6), layout="constrained", squeeze=False)
    for ax, (name, values) in zip(axes[0], scores.items(), strict=True):
        order = values.argsort(descending=True).tolist()
        colors = [SPARSE_INK if channel in set(kept[name]) else PRUNED for channel in order]
        ax.bar(range(len(order)), values[order], color=colors, width=1.0)
        ax.set_title(name, fontsize=8)
        ax.set(xlabel="channel, by score", yscale="log")
        ax.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("importance")
    axes[0, -1].legend(handles=[Patch(color=SPARSE_INK, label="kept"), Patch(color=PRUNED, label="pruned")], frameon=False)
    plt.close(figure)
    return figure


def matrix(values: Sequence[Sequence[float]], names: Sequence[str], *, label: str):
    """A matplotlib figure of shares (0 to 1) between every two of `names`, as percentages."""
    import matplotlib.pyplot as plt

    values, size = np.asarray(values), 1.6 + 0.75 * len(names)
    figure, axes = plt.subplots(figsize=(size + 0.6, size - 0.6), layout="constrained")
    least = values.min() - 0.05
    drawn = axes.imshow(values, cmap="Blues", vmin=least, vmax=1)
    for (y, x), value in np.ndenumerate(values):
        color = "white" if value - least > 0.6 * (1 - least) else "black"
        axes.text(x, y, f"{value:.1%}", ha="center", va="center", fontsize=8, color=color)
    axes.set(xticks=range(len(names)), yticks=range(len(names)), yticklabels=names)
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.colorbar(drawn, label=label, format="{x:.0%}")
    plt.close(figure)
    return figure
