"""What else the same time buys: the dense teacher, and the 2:4 student, with fewer sampling steps or with DeepCache."""

import json
import math
from collections.abc import Mapping

from ..measure.protocol import Protocol
from ..measure.speed import fastest
from ..support import markdown
from . import results
from .results import RESULTS, Row

TIMES = RESULTS / "bench-rivals.json"
SHALLOW = "{} shallow"  # the kind, in `speed.Variant`, of a model whose deep blocks are not computed


def rows(base: str = "") -> list[Row]:
    """The stored rows of one teacher, or of all. Raises ValueError as `results.load`."""
    return results.load("rivals", base)


def picture_ms(row: Row) -> float | None:
    """Milliseconds of the denoiser for one picture, from step times of the fastest way; None if the steps were not timed."""
    timed = next((times for times in _stored().get("rows", ()) if times["name"] == row.recipe.base), None)
    if timed is None:
        return None
    kind, protocol = "packed" if row.recipe.draws != row.recipe.base else "dense", row.recipe.protocol
    whole = math.ceil(protocol.steps / protocol.cache_interval)
    total = whole * _fastest_ms(timed, kind)
    if protocol.cache_interval > 1:
        total += (protocol.steps - whole) * _fastest_ms(timed, SHALLOW.format(kind))
    return total / timed["batch"]


def _stored() -> dict:
    return json.loads(TIMES.read_text()) if TIMES.exists() else {}


def _fastest_ms(timed: Mapping, kind: str) -> float:
    return timed["ms"][fastest(timed["ms"], kind)]


def table() -> str:
    """All stored rows as a Markdown table, a teacher's by time."""
    chosen = sorted(rows(), key=lambda row: (results.bases().index(row.recipe.base), -(picture_ms(row) or 0)))
    head = ("model", "steps", "deep blocks at", "ms a picture ↓", "FD-glyph ↓", "readability ↑", "SSIM to teacher ↑")
    protocol = chosen[0].recipe.protocol
    caption = f"""n = {protocol.n:,} pictures a row, {protocol.sampler.upper()}, {protocol.precision}. SSIM: to the teacher's
        pictures with {Protocol.steps} steps. Times: of the denoiser, {_stored().get("processor", "not measured")}, batches of 16,
        float32, two threads, each model in the fastest of eager, channels-last, compiled, frozen and oneDNN."""
    return f"{markdown.table(head, map(_row, chosen))}\n\n{' '.join(caption.split())}"


def _row(row: Row) -> tuple:
    protocol, ms = row.recipe.protocol, picture_ms(row)
    deep = "all steps" if protocol.cache_interval == 1 else f"1 of {protocol.cache_interval} steps (DeepCache)"
    return (
        row.recipe.title, protocol.steps, deep, f"{ms:.1f}" if ms else "", row.fd_text, f"{row.mean('readability'):.1%}",
        f"{row.mean('ssim_to_base'):.3f}",
    )  # fmt: skip
