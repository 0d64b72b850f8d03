"""Pictures that models made, as images and in rows."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageColor

from ..support import files
from .base import INK, PAPER, figure


def check_file(path: str | Path) -> None:
    """Check, before a picture is drawn, that it can be written to `path`.

    Raises:
        ValueError: pictures of this suffix cannot be written.
        OSError: nothing can be written there.
    """
    _format(path)
    files.check_writable(path)


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


def save(image: Image.Image, path: str | Path) -> None:
    """Write an image in the format that the suffix of `path` names, whole or not at all.

    Raises:
        ValueError: no format has this suffix.
        OSError: the file cannot be written; an earlier picture stays.
    """
    kind = _format(path)
    with files.replacing(path) as temporary:
        image.save(temporary, kind)


def _format(path: str | Path) -> str:
    """The picture format that the suffix of `path` names."""
    kind = Image.registered_extensions().get(Path(path).suffix.lower())
    if kind not in Image.SAVE:
        raise ValueError(f"{path} does not end as a picture does, such as .png or .jpg")
    return kind


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


def rows(pictures: Mapping[str, torch.Tensor], *, ink: str = INK):
    """A matplotlib figure with one labelled row of pictures [n, C, H, W] per name, for comparing models on the same noise."""
    n, _, height, width = next(iter(pictures.values())).shape
    strips_of = {name: picture(images, scale=4, ink=ink) for name, images in pictures.items()}
    return strips(strips_of, width=0.42 * n, height=0.5 * height / width)


def strips(images: Mapping[str, Image.Image], *, width: float = 7.6, height: float = 1.0):
    """A matplotlib figure with one labelled image per name, each of this size in inches."""
    labels = 0.4 + 0.1 * max(map(len, images))
    plot, axes = figure(labels + width, height * len(images), len(images), squeeze=False)
    for ax, (name, image) in zip(axes[:, 0], images.items(), strict=True):
        ax.imshow(image, interpolation="nearest")
        ax.set(xticks=[], yticks=[])
        ax.set_ylabel(name, rotation=0, ha="right", va="center")
        ax.spines[:].set_visible(False)
    return plot
