"""A scatter plot as SVG whose points can be clicked, or reached with the keyboard."""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..plots import FAMILIES

FEW = 6  # points that are labelled without hovering
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 900, 420, 64, 24, 16, 52
CLASSES = {family: f"f{i}" for i, family in enumerate(FAMILIES)}
# Clicks and the Enter key on a point become Gradio's event "select" with the point's name.
ON_LOAD = """
const pick = event => {
  const point = event.target.closest('[data-name]');
  if (point) trigger('select', {index: 0, value: point.dataset.name});
};
element.addEventListener('click', pick);
element.addEventListener('keydown', event => { if (event.key === 'Enter') pick(event); });
"""


@dataclass(frozen=True)
class Point:
    """A result in the plot.

    Attributes:
        name: the recipe; a click reports it.
        label: the name that people read.
        family: one of `plots.FAMILIES`.
        cost: share of the dense model's cost.
        fd: FD-glyph.
    """

    name: str
    label: str
    family: str
    cost: float
    fd: float


def svg(points: Sequence[Point], xlabel: str, chosen: str = "", ceiling: float = math.inf) -> str:
    """The plot, FD on a logarithmic axis; the chosen point is ringed and drawn last, every point is labelled on hovering.

    A point above the `ceiling` is drawn there as a triangle, and its label gives the FD.
    """
    if not points:
        return "<p>No results are stored for this choice.</p>"
    low, high = min(p.fd for p in points) / 1.25, min(max(p.fd for p in points), ceiling) * 1.25
    widest = max(1.05, 1.05 * max(p.cost for p in points))

    def place(cost: float, fd: float) -> tuple[float, float]:
        x = LEFT + cost / widest * (WIDTH - LEFT - RIGHT)
        return x, HEIGHT - BOTTOM - math.log(fd / low) / math.log(high / low) * (HEIGHT - TOP - BOTTOM)

    marks = [_point(p, *place(p.cost, min(p.fd, ceiling)), p.name == chosen, p.fd > ceiling) for p in points]
    marks.sort(key=lambda mark: "chosen" in mark)
    bottom = HEIGHT - BOTTOM
    across = [(place(share / 4, low)[0], f"{share * 25} %") for share in range(int(widest * 4) + 1)]
    up = [(place(0, fd)[1], f"{fd:g}") for fd in _ticks(low, high)]
    grid = "".join(f"<line x1='{LEFT}' x2='{WIDTH - RIGHT}' y1='{y:.1f}' y2='{y:.1f}'/>" for y, _ in up)
    names = "".join(f"<text x='{x:.1f}' y='{bottom + 18}' text-anchor='middle'>{text}</text>" for x, text in across)
    names += "".join(f"<text x='{LEFT - 8}' y='{y + 4:.1f}' text-anchor='end'>{text}</text>" for y, text in up)
    middle = (LEFT + WIDTH - RIGHT) / 2
    names += f"<text x='{middle}' y='{HEIGHT - 10}' text-anchor='middle'>{html.escape(xlabel)}</text>"
    names += (
        f"<text transform='translate(16 {bottom / 2 + TOP}) rotate(-90)' text-anchor='middle'>FD-glyph, lower is better</text>"
    )
    grid += f"<line x1='{LEFT}' x2='{WIDTH - RIGHT}' y1='{bottom}' y2='{bottom}'/>"
    few = " few" if len(points) <= FEW else ""
    return (
        f"{_legend(points)}<svg class='scatter{few}' viewBox='0 0 {WIDTH} {HEIGHT}' role='group' aria-label='Results'>"
        f"<g class='grid'>{grid}</g>{names}{''.join(marks)}</svg>"
    )


def _point(point: Point, x: float, y: float, chosen: bool, above: bool) -> str:
    words = html.escape(f"{point.label}: FD-glyph {point.fd:.2f} at {point.cost:.0%}", quote=True)
    text = f"{point.label}: {point.fd:.0f}" if above else point.label
    aside, anchor = (-12, "end") if x > WIDTH * 0.62 else (12, "start")
    label = f"<text x='{x + aside:.1f}' y='{y + 4:.1f}' text-anchor='{anchor}'>{html.escape(text)}</text>"
    shape = f"<path d='M{x:.1f} {y - 8:.1f} l8 14 h-16 z'/>" if above else f"<circle cx='{x:.1f}' cy='{y:.1f}' r='7'/>"
    return (
        f"<g class='point {CLASSES[point.family]}{' chosen' if chosen else ''}' tabindex='0' role='button' aria-label='{words}' "
        f"data-name='{html.escape(point.name, quote=True)}'><title>{words}</title>"
        f"{shape}{label}</g>"
    )


def _ticks(low: float, high: float) -> list[float]:
    """1, 2, 5 times powers of ten within the limits."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [step * 10.0**power for power in powers for step in (1, 2, 5) if low <= step * 10.0**power <= high]


def _legend(points: Sequence[Point]) -> str:
    shown = [family for family in FAMILIES if any(point.family == family for point in points)]
    return "<p class='legend'>" + "".join(f"<span class='{CLASSES[name]}'>{html.escape(name)}</span>" for name in shown) + "</p>"
