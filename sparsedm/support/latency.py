"""Timing that survives a shared, noisy machine: interleaved runs in one process, warmed up, compared pair by pair."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds of each run of one variant, in the order of the runs."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> tuple[float, float]:
        """First and third quartile, in seconds."""
        first, _, third = statistics.quantiles(self.seconds, n=4) if len(self.seconds) > 1 else [self.seconds[0]] * 3
        return first, third


def interleaved(variants: Mapping[str, Callable[[], object]], *, rounds: int = 15, warmup: int = 2) -> dict[str, Timing]:
    """Time every variant once per round, in turn, the order reversed every other round; `warmup` rounds are not counted."""
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else (lambda: None)
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for round_ in range(warmup + rounds):
        names = list(variants) if round_ % 2 == 0 else list(reversed(variants))
        for name in names:
            synchronize()
            start = time.perf_counter()
            variants[name]()
            synchronize()
            if round_ >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def ratio(timings: Mapping[str, Timing], numerator: str, denominator: str) -> float:
    """Median over the rounds of the ratio of two variants' times: noise that lasts longer than a round cancels."""
    return statistics.median(ratios(timings, numerator, denominator))


def ratios(timings: Mapping[str, Timing], numerator: str, denominator: str) -> list[float]:
    """The ratio of two variants' times in every round."""
    return [a / b for a, b in zip(timings[numerator].seconds, timings[denominator].seconds, strict=True)]
