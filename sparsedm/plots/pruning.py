"""Figures of Diff-Pruning: timesteps that count, and channels that go."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from .base import INK, PRUNED, PRUNED_INK, figure, open_frame


def timesteps(losses: Sequence[float], thresholds: Sequence[float]):
    """A matplotlib figure of the loss at t = 0, 1, 2, ... over the largest of them, and where each threshold cuts it off."""
    from matplotlib import colormaps

    share = np.asarray(losses) / np.maximum.accumulate(losses)
    plot, axes = figure(6, 3.2)
    axes.plot(share, color=INK, linewidth=1.5)
    for threshold, color in zip(thresholds, colormaps["plasma"](np.linspace(0, 0.8, len(thresholds))), strict=True):
        below = np.flatnonzero(share < threshold)
        stop = int(below[0]) if len(below) else len(share)
        axes.plot([0, stop, stop], [threshold, threshold, 0], color=color, linewidth=1, label=f"T = {threshold:g}: t < {stop}")
    axes.set(xlabel="timestep t", ylabel="loss / largest loss so far", xlim=(0, None), ylim=(0, 1.02))
    axes.legend(frameon=False)
    open_frame(axes)
    return plot


def channels(scores: Mapping[str, torch.Tensor], kept: Mapping[str, Sequence[int]]):
    """A matplotlib figure of the scores [channels] of each group, one bar per channel, largest first; pruned ones are pale."""
    from matplotlib.patches import Patch

    plot, axes = figure(2.7 * len(scores), 2.6, 1, len(scores), squeeze=False)
    for ax, (name, values) in zip(axes[0], scores.items(), strict=True):
        order = values.argsort(descending=True).tolist()
        colors = [PRUNED_INK if channel in set(kept[name]) else PRUNED for channel in order]
        ax.bar(range(len(order)), values[order], color=colors, width=1.0)
        ax.set_title(name, fontsize=8)
        ax.set(xlabel="channel, by score", yscale="log")
    open_frame(*axes[0])
    axes[0, 0].set_ylabel("importance")
    axes[0, -1].legend(handles=[Patch(color=PRUNED_INK, label="kept"), Patch(color=PRUNED, label="pruned")], frameon=False)
    return plot
