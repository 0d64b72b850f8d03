"""N:M masks on real weights."""

import numpy as np
import torch

from ..masking import nm
from .base import PRUNED, SPARSE_INK, figure, open_frame


def groups(
    weight: torch.Tensor,
    pattern: nm.NMPattern | str,
    *,
    rows: int = 8,
    columns: int = 16,
    before: torch.Tensor | None = None,
):
    """A matplotlib figure of a weight [out, in, ...] and its magnitude mask: pruned entries are pale, lines part the groups.

    Rows are the first output features of a linear weight; of a convolution the kernel positions of its first output, because
    groups run along the input channels of each position. Frames mark the entries whose mask has changed since the weight
    `before`, of the same shape.
    """
    from matplotlib.patches import Rectangle

    pattern, weight = nm.NMPattern.parse(pattern), weight.detach().float().cpu()
    kept, convolution = nm.mask(weight, pattern), weight.dim() > 2
    changed = torch.zeros_like(kept) if before is None else kept != nm.mask(before.detach().float().cpu(), pattern)
    shown, kept, changed = (x[0].flatten(1).T if convolution else x[:rows] for x in (weight, kept, changed))
    columns = min(max(columns, pattern.m), shown.shape[1])
    shown, kept, changed = (x[:, :columns] for x in (shown, kept, changed))
    largest = shown.abs().max().item() or 1.0
    plot, axes = figure(1.6 + 0.34 * columns, 0.9 + 0.34 * len(shown))
    drawn = axes.imshow(shown, cmap="RdBu_r", vmin=-largest, vmax=largest, alpha=kept.float() * 0.75 + 0.25)
    for y, x in (~kept).nonzero().tolist():
        axes.plot(x, y, marker="x", color="#999999", markersize=4, linewidth=0)
    for y, x in changed.nonzero().tolist():
        axes.add_patch(Rectangle((x - 0.42, y - 0.42), 0.84, 0.84, fill=False, edgecolor="black", linewidth=1.5))
    for edge in range(0, columns + 1, pattern.m):
        axes.axvline(edge - 0.5, color="black", linewidth=1.2)
    note = "" if before is None else ",\nframes mark what has changed"
    names = [str(place).strip("()") for place in np.ndindex(*weight.shape[2:])] if convolution else range(len(shown))
    axes.set(
        xticks=range(0, columns, min(pattern.m, 4)), yticks=range(len(shown)), yticklabels=names,
        xlabel="input channel" if convolution else "input feature",
        ylabel="kernel position (row, column)" if convolution else "output feature",
        title=f"{pattern}: the {pattern.n} largest of every {pattern.m} stay, x marks the pruned{note}",
    )  # fmt: skip
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    plot.colorbar(drawn, label="weight")
    return plot


def group_counts(weight: torch.Tensor, pattern: nm.NMPattern | str):
    """A matplotlib figure: how many groups of a weight [out, in, ...] hold 0, 1, ... M of its largest N/M share.

    If all held N, the pattern would cost nothing. Raises ValueError when `in` is not a multiple of M.
    """
    pattern = nm.NMPattern.parse(pattern)
    size = weight.detach().float().cpu().abs()
    kept = torch.zeros(size.numel(), dtype=torch.long)
    kept[size.flatten().topk(round(size.numel() * pattern.density)).indices] = 1
    held = nm.grouped(kept.reshape(size.shape), pattern.m).sum(2).flatten()
    share = torch.bincount(held, minlength=pattern.m + 1) / len(held)
    plot, axes = figure(max(4.6, 1.4 + 0.2 * pattern.m), 3.2)
    colors = [SPARSE_INK if count == pattern.n else PRUNED for count in range(pattern.m + 1)]
    bars = axes.bar(range(pattern.m + 1), share, color=colors)
    if pattern.m <= 8:
        axes.bar_label(bars, [f"{part:.0%}" for part in share], fontsize=8)
    axes.set(
        xticks=range(0, pattern.m + 1, max(1, pattern.m // 8)), ylabel="share of the groups",
        xlabel=f"largest {pattern.density:.0%} of the layer in a group of {pattern.m}",
    )  # fmt: skip
    axes.yaxis.set_major_formatter("{x:.0%}")
    open_frame(axes)
    return plot
