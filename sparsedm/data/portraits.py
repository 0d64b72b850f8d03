"""Cartoon faces, drawn from their attributes with Pillow: enlarged, then reduced by averaging."""

from collections.abc import Mapping

import numpy as np
import torch
from PIL import Image, ImageDraw

_SUPERSAMPLE = 8

COLOURS = {  # RGB of the values of these attributes
    "skin": ((255, 224, 200), (245, 200, 160), (218, 164, 112), (160, 104, 66), (101, 64, 42)),
    "hair colour": ((38, 32, 36), (112, 68, 38), (236, 196, 92), (196, 74, 34), (236, 236, 232), (58, 112, 226), (240, 118, 182)),
    "shirt": ((214, 52, 52), (242, 142, 34), (46, 154, 82), (44, 92, 204), (134, 68, 176), (244, 244, 244), (44, 44, 50)),
    "background": ((250, 214, 92), (140, 208, 140), (138, 190, 244), (250, 176, 200), (196, 198, 204), (246, 168, 102)),
}
_INK, _WHITE, _FRAME, _BARE_BROW = (40, 30, 34), (252, 252, 250), (30, 30, 36), (90, 66, 52)
_LIP = ((190, 62, 66),) * 3 + ((226, 96, 92),) * 2  # by skin, against which lips must show


class _Pen:
    """Shapes in units of the picture's width on an enlarged canvas, shifted and scaled a little as a whole."""

    def __init__(self, size: int, paper: tuple, shift: tuple[float, float], scale: float):
        self.side = size * _SUPERSAMPLE
        self.image = Image.new("RGB", (self.side, self.side), paper)
        self._canvas = ImageDraw.Draw(self.image)
        self._shift, self._scale = shift, scale

    def _at(self, x: float, y: float) -> tuple[float, float]:
        dx, dy = self._shift
        return ((0.5 + (x - 0.5) * self._scale + dx) * self.side, (0.55 + (y - 0.55) * self._scale + dy) * self.side)

    def _box(self, x: float, y: float, rx: float, ry: float) -> list[tuple[float, float]]:
        return [self._at(x - rx, y - ry), self._at(x + rx, y + ry)]

    def _pixels(self, width: float) -> int:
        return max(1, round(width * self._scale * self.side))

    def oval(self, x: float, y: float, rx: float, ry: float, fill: tuple) -> None:
        self._canvas.ellipse(self._box(x, y, rx, ry), fill)

    def half(self, x: float, y: float, rx: float, ry: float, fill: tuple, upper: bool) -> None:
        self._canvas.pieslice(self._box(x, y, rx, ry), 180 if upper else 0, 360 if upper else 180, fill)

    def ring(self, x: float, y: float, rx: float, ry: float, fill: tuple, width: float) -> None:
        self._canvas.ellipse(self._box(x, y, rx, ry), outline=fill, width=self._pixels(width))

    def arc(self, x: float, y: float, rx: float, ry: float, fill: tuple, width: float, upper: bool) -> None:
        begin, end = (180, 360) if upper else (0, 180)
        self._canvas.arc(self._box(x, y, rx, ry), begin, end, fill, self._pixels(width))

    def block(self, x: float, y: float, rx: float, ry: float, fill: tuple, radius: float = 0.0) -> None:
        self._canvas.rounded_rectangle(self._box(x, y, rx, ry), self._pixels(radius) if radius else 0, fill)

    def shape(self, points: list[tuple[float, float]], fill: tuple) -> None:
        self._canvas.polygon([self._at(*point) for point in points], fill)

    def line(self, points: list[tuple[float, float]], fill: tuple, width: float) -> None:
        self._canvas.line([self._at(*point) for point in points], fill, self._pixels(width), joint="curve")


def _shaded(colour: tuple, factor: float) -> tuple:
    return tuple(min(255, round(c * factor)) for c in colour)


def draw(face: Mapping[str, int], size: int, rng: np.random.Generator) -> torch.Tensor:
    """A face of these attributes (`faces.ATTRIBUTES`), uint8 [3, size, size]; `rng` draws place, proportions and shades."""

    def jitter(spread: float) -> float:
        return float(rng.uniform(-spread, spread))

    skin, hair, shirt, paper = (_shaded(colours[face[name]], 1 + jitter(0.05)) for name, colours in COLOURS.items())
    pen = _Pen(size, paper, (jitter(0.035), jitter(0.02)), 1 + jitter(0.06))
    rx, ry, eye_y = 0.235 + jitter(0.015), 0.265 + jitter(0.02), 0.49 + jitter(0.012)
    _hair_behind(pen, face["hair"], hair, rx)
    _body(pen, skin, shirt)
    for side in (-1, 1):
        pen.oval(0.5 + side * rx, 0.53, 0.045, 0.06, _shaded(skin, 0.93))
    pen.oval(0.5, 0.5, rx, ry, skin)
    _hair_in_front(pen, face["hair"], hair, rx)
    _beard(pen, face["beard"], hair, rx)
    _eyes(pen, face["eyes"], hair if face["hair"] else _BARE_BROW, eye_y)
    pen.oval(0.5, 0.565, 0.028, 0.022, _shaded(skin, 0.82))
    _mouth(pen, face["mouth"], 0.667 if face["beard"] == 2 else 0.655, _LIP[face["skin"]])
    _glasses(pen, face["glasses"], eye_y)
    _hat(pen, face["hat"], shirt, rx)
    small = pen.image.resize((size, size), Image.Resampling.BOX)
    return torch.from_numpy(np.array(small)).permute(2, 0, 1)


def _body(pen: _Pen, skin: tuple, shirt: tuple) -> None:
    pen.oval(0.5, 1.06, 0.4, 0.28, shirt)
    pen.block(0.5, 0.78, 0.085, 0.09, _shaded(skin, 0.88))
    pen.half(0.5, 0.815, 0.105, 0.075, _shaded(skin, 0.88), upper=False)


def _hair_behind(pen: _Pen, style: int, hair: tuple, rx: float) -> None:
    if style == 2:  # curly: a cloud of balls
        for angle in np.linspace(-0.15 * np.pi, 1.15 * np.pi, 11):
            pen.oval(0.5 + 1.12 * rx * np.cos(angle), 0.43 - 0.24 * np.sin(angle), 0.085, 0.085, _shaded(hair, 0.94))
    elif style == 3:  # long
        pen.oval(0.5, 0.44, 1.22 * rx, 0.27, _shaded(hair, 0.9))
        pen.block(0.5, 0.63, 1.22 * rx, 0.21, _shaded(hair, 0.9), 0.09)
    elif style == 4:  # bun
        pen.oval(0.5, 0.17, 0.11, 0.1, hair)


def _hair_in_front(pen: _Pen, style: int, hair: tuple, rx: float) -> None:
    if style in (1, 3, 4):
        pen.half(0.5, 0.42, 1.06 * rx, 0.22, hair, upper=True)
        for side in (-1, 1):
            outer, inner = 0.5 + side * 1.06 * rx, 0.5 + side * 0.84 * rx
            pen.shape([(outer, 0.415), (outer, 0.51), (inner, 0.415)], hair)
    elif style == 2:
        for x in np.linspace(-0.8, 0.8, 5):
            pen.oval(0.5 + x * rx, 0.33 + 0.07 * abs(x), 0.075, 0.07, hair)
    elif style == 5:  # mohawk
        pen.shape([(0.44, 0.36), (0.4, 0.12), (0.46, 0.17), (0.5, 0.07), (0.54, 0.17), (0.6, 0.12), (0.56, 0.36)], hair)


def _beard(pen: _Pen, style: int, hair: tuple, rx: float) -> None:
    if style == 1:
        pen.half(0.5, 0.59, 0.97 * rx, 0.225, hair, upper=False)
        pen.block(0.5, 0.595, 0.97 * rx, 0.014, hair)
    elif style == 2:  # moustache
        for side in (-1, 1):
            pen.oval(0.5 + side * 0.062, 0.607, 0.075, 0.03, hair)


def _eyes(pen: _Pen, style: int, brow: tuple, y: float) -> None:
    for side in (-1, 1):
        x = 0.5 + side * 0.1
        pen.line([(x - 0.045, y - 0.088), (x + 0.045, y - 0.088)], _shaded(brow, 0.72), 0.022)
        if style == 1 or (style == 2 and side == 1):  # closed, or winking
            pen.arc(x, y + 0.02, 0.05, 0.045, _INK, 0.026, upper=True)
        else:
            pen.oval(x, y, 0.05, 0.055, _WHITE)
            pen.oval(x, y + 0.004, 0.03, 0.036, _INK)


def _mouth(pen: _Pen, style: int, y: float, lip: tuple) -> None:
    if style == 0:  # smile
        pen.arc(0.5, y - 0.035, 0.085, 0.06, lip, 0.028, upper=False)
    elif style == 1:  # big smile
        pen.half(0.5, y - 0.03, 0.11, 0.095, lip, upper=False)
        pen.block(0.5, y - 0.012, 0.088, 0.018, _WHITE)
    elif style == 2:  # straight
        pen.block(0.5, y, 0.075, 0.015, lip)
    elif style == 3:  # frown
        pen.arc(0.5, y + 0.04, 0.08, 0.055, lip, 0.028, upper=True)
    else:  # surprised
        pen.oval(0.5, y + 0.008, 0.042, 0.052, lip)
        pen.oval(0.5, y + 0.012, 0.024, 0.032, _INK)


def _glasses(pen: _Pen, style: int, y: float) -> None:
    if style == 1:  # round
        for side in (-1, 1):
            pen.ring(0.5 + side * 0.105, y, 0.085, 0.082, _FRAME, 0.02)
        pen.line([(0.475, y - 0.01), (0.525, y - 0.01)], _FRAME, 0.02)
    elif style == 2:  # sunglasses
        pen.block(0.5, y - 0.03, 0.2, 0.016, _FRAME)
        for side in (-1, 1):
            pen.block(0.5 + side * 0.105, y + 0.005, 0.082, 0.06, _FRAME, 0.05)


def _hat(pen: _Pen, style: int, shirt: tuple, rx: float) -> None:
    if style == 1:  # cap, its peak to one side
        pen.half(0.5, 0.34, 1.12 * rx, 0.2, shirt, upper=True)
        pen.block(0.6, 0.34, 1.25 * rx, 0.028, _shaded(shirt, 0.72), 0.027)
    elif style == 2:  # beanie with a folded rim and a bobble
        pen.half(0.5, 0.34, 1.1 * rx, 0.23, shirt, upper=True)
        pen.block(0.5, 0.335, 1.14 * rx, 0.045, _shaded(shirt, 0.75), 0.03)
        pen.oval(0.5, 0.105, 0.05, 0.05, _WHITE if sum(shirt) < 600 else (220, 80, 80))
    elif style == 3:  # party hat
        pen.shape([(0.36, 0.3), (0.5, 0.01), (0.64, 0.3)], (238, 90, 150))
        pen.shape([(0.405, 0.207), (0.453, 0.107), (0.547, 0.107), (0.595, 0.207)], (250, 220, 90))
        pen.oval(0.5, 0.03, 0.04, 0.04, _WHITE)
