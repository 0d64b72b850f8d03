"""How far FD-glyph varies by chance: t-tests on ln FD-glyph.

The tests pool the deviation from run to run over all methods that have several seeds, of both teachers: two or three runs alone
may agree by luck.
"""

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from scipy import stats

from . import results
from .results import Row

TOLERANCE = 1.1  # ratio of FD-glyph to the dense model's that counts as the same quality: FID grows so in the SparseDM paper
CONFIDENCE = 0.95


class MissingEvidence(Exception):
    """A result that a claim needs and that has not been measured; the message names it."""


class Score(NamedTuple):
    """The mean FD-glyph of a method, and the number of its runs."""

    fd: float
    runs: float = 1.0

    @classmethod
    def of(cls, row: Row) -> "Score":
        return cls(row.fd, len(row.runs))


@dataclass(frozen=True)
class Chance:
    """How much FD-glyph varies by chance.

    Attributes:
        deviation: standard deviation of ln FD-glyph from run to run of one method.
        freedom: degrees of freedom of the estimate.
    """

    deviation: float
    freedom: int

    @classmethod
    def of(cls, rows: Iterable[Row]) -> "Chance":
        """Pooled over the rows with several runs. Raises MissingEvidence if there is none."""
        several = [row for row in rows if len(row.runs) > 1]
        freedom = sum(len(row.runs) - 1 for row in several)
        if not freedom:
            raise MissingEvidence("several seeds of a method")
        squares = sum(_deviation(row) ** 2 * (len(row.runs) - 1) for row in several)
        return cls(math.sqrt(squares / freedom), freedom)

    def reach(self, a: float = 1.0, b: float = 1.0, sides: int = 2) -> float:
        """How far apart ln FD-glyph of means of `a` and of `b` runs must be to count as different, or as larger (one side)."""
        return stats.t.ppf(1 - (1 - CONFIDENCE) / sides, self.freedom) * self.deviation * math.sqrt(1 / a + 1 / b)

    def compare(self, a: Score, b: Score) -> int:
        """-1 if FD-glyph of `a` is the lower one, 1 if that of `b` is, 0 if chance may explain the difference."""
        return _sign(math.log(a.fd / b.fd), self.reach(a.runs, b.runs))

    def within(self, a: Score, b: Score) -> int:
        """-1 if FD-glyph of `a` is at most `TOLERANCE` times that of `b`, 1 if more, 0 if chance may explain the difference."""
        return _sign(math.log(a.fd / b.fd / TOLERANCE), self.reach(a.runs, b.runs, sides=1))


def _deviation(row: Row) -> float:
    """The standard deviation of ln FD-glyph over the runs of one method."""
    return statistics.stdev(math.log(run["scores"]["fd_glyph"]) for run in row.runs)


def _sign(gap: float, reach: float) -> int:
    return 0 if abs(gap) <= reach else int(math.copysign(1, gap))


def chance() -> Chance:
    """The deviation by chance in the stored results of both suites. Raises MissingEvidence if no method has several seeds."""
    return Chance.of(_rows())


def _rows() -> list[Row]:
    return [row for suite in results.SUITES for row in results.load(suite)]


def between(a: Score, b: Score, share: float) -> Score:
    """The score at `share` of the way from `a` to `b`, on a logarithmic scale; its number of runs gives the mean's variance."""
    fd = a.fd ** (1 - share) * b.fd**share
    return Score(fd, 1 / ((1 - share) ** 2 / a.runs + share**2 / b.runs))


def told_apart() -> str:
    """How far FD-glyph varies by chance, in words."""
    try:
        spread = chance()
    except MissingEvidence:
        return "Nothing tells how large chance is: no method has several seeds."
    single, three = (math.expm1(spread.reach(runs, runs)) for runs in (1, 3))
    most = max((row for row in _rows() if len(row.runs) > 1), key=_deviation)
    return (
        f"*Chance*: from seed to seed FD-glyph varies by {spread.deviation:.1%} (standard deviation of all methods together,"
        f" {spread.freedom} degrees of freedom; most of all, {_deviation(most):.0%}, in {most.recipe.title}). Single runs count"
        f" as different from {single:.0%} on, means of three from {three:.0%} on (t-test, {CONFIDENCE:.0%})."
    )
