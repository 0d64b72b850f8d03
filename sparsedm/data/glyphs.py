"""Digits and capital letters, drawn from a seed in the fonts that matplotlib ships."""

import functools
import string
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch.utils.data import Dataset

from .base import SPLITS, check_split, to_float

GLYPHS = string.digits + string.ascii_uppercase
_FONTS = (
    "DejaVuSans-Bold",
    "DejaVuSans-BoldOblique",
    "DejaVuSansMono-Bold",
    "DejaVuSerif-Bold",
    "DejaVuSerif-BoldItalic",
    "STIXGeneralBol",
)
_SUPERSAMPLE = 4


class Glyphs(Dataset):
    """Digits and capital letters (36 classes) in the bold fonts that matplotlib ships, drawn from a seed.

    Each picture has a random font, size, shift and rotation (up to 10 degrees): white ink on black, one channel; with
    `rgb=True` random ink and paper, three channels. Drawn on first use, then kept as uint8.

    Args:
        n: number of pictures; the class of picture i is i mod 36.
        size: height and width in pixels.
        seed: with it and its number each picture is drawn.
        split: "train" or "test": different pictures from the same distribution.
        rgb: three channels instead of one.
    """

    classes = tuple(GLYPHS)

    def __init__(self, n: int = 40_000, size: int = 16, seed: int = 0, split: str = "train", rgb: bool = False):
        check_split(split)
        if n < 1 or size < 8:
            raise ValueError(f"glyphs need n >= 1 and size >= 8, not n={n}, size={size}")
        self.size, self.seed, self.split, self.rgb = size, seed, split, rgb
        self.channels = 3 if rgb else 1
        self._images = torch.zeros(n, self.channels, size, size, dtype=torch.uint8)
        self._drawn = np.zeros(n, dtype=bool)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        label = index % len(GLYPHS)
        if not self._drawn[index]:
            rng = np.random.default_rng((self.seed, SPLITS[self.split], index))
            self._images[index] = _draw_glyph(GLYPHS[label], self.size, self.rgb, rng)
            self._drawn[index] = True
        return to_float(self._images[index]), label


@functools.lru_cache(maxsize=512)
def _font(name: str, pixels: int) -> ImageFont.FreeTypeFont:
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", f"{name}.ttf")), pixels)


def _draw_glyph(char: str, size: int, rgb: bool, rng: np.random.Generator) -> torch.Tensor:
    """One picture [C, size, size], uint8. Drawn enlarged, centred on its ink, rotated, then reduced by averaging."""
    canvas = size * _SUPERSAMPLE
    name = _FONTS[rng.integers(len(_FONTS))]
    pixels = int(canvas * rng.uniform(0.86, 1.08))
    left, top, right, bottom = _font(name, pixels).getbbox(char)
    overflow = max(right - left, bottom - top) / (canvas * 0.88)
    if overflow > 1:  # a W as wide as the picture
        pixels = int(pixels / overflow)
        left, top, right, bottom = _font(name, pixels).getbbox(char)
    shift = rng.uniform(-1, 1, 2) * size / 16 * _SUPERSAMPLE
    image = Image.new("L", (canvas, canvas))
    corner = ((canvas - left - right) / 2 + shift[0], (canvas - top - bottom) / 2 + shift[1])
    ImageDraw.Draw(image).text(corner, char, fill=255, font=_font(name, pixels))
    image = image.rotate(rng.uniform(-10, 10), Image.Resampling.BILINEAR)
    ink = np.asarray(image.resize((size, size), Image.Resampling.BOX), dtype=np.float32)[None] / 255
    if not rgb:
        return torch.from_numpy((ink * 255).round().astype(np.uint8))
    paper, pen = _contrasting_colours(rng)
    return torch.from_numpy((ink * pen + (1 - ink) * paper).round().astype(np.uint8))


def _contrasting_colours(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Two RGB colours [3, 1, 1] whose luma differs by at least 90 of 255."""
    while True:
        colours = rng.uniform(0, 255, (2, 3))
        if abs(np.diff(colours @ (0.299, 0.587, 0.114))[0]) >= 90:
            return colours[0][:, None, None], colours[1][:, None, None]


def word_labels(word: str) -> torch.Tensor:
    """Class labels [len(word)] that spell `word` with glyphs; letters in either case.

    Raises:
        ValueError: empty, or characters outside the 36 classes (the message names them).
    """
    word = word.strip().upper()
    wrong = sorted(set(word) - set(GLYPHS))
    if wrong or not word:
        reason = f"{' '.join(map(repr, wrong))} cannot be drawn" if wrong else "the word is empty"
        raise ValueError(f"{reason}; use the letters A-Z and the digits 0-9")
    return torch.tensor([GLYPHS.index(c) for c in word])
