"""Colours, and figures of one look."""

INK, SPARSE_INK, PRUNED_INK, PAPER, PRUNED = "#1f3a93", "#b4491f", "#2e7d4f", "#fdfaf3", "#d9cfc3"


def figure(width: float, height: float, rows: int = 1, columns: int = 1, **options):
    """A matplotlib figure, `width` by `height` inches, and its axes (an array for several rows or columns, as in `subplots`).

    pyplot forgets the figure at once: a notebook would show it twice, and an app would keep all figures.
    """
    import matplotlib.pyplot as plt

    new, axes = plt.subplots(rows, columns, figsize=(width, height), layout="constrained", **options)
    plt.close(new)
    return new, axes


def open_frame(*axes) -> None:
    """Hide the upper and right sides of the frame of each of `axes`."""
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)


def plain_numbers(axes) -> None:
    """Label the logarithmic y axis with numbers such as 3 instead of powers of ten."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="y", linewidth=0.3)
