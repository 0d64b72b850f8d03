"""Which layers are faster packed: timed once on this machine, and remembered beside the compiled kernels."""

import contextlib
import json
import os
import statistics
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ..support import latency
from ..support.files import replacing
from .kernels.build import cache_folder, library


@dataclass(frozen=True)
class Times:
    """Median seconds of a dense and of a packed call, and how many times faster packed is (median of interleaved pairs)."""

    dense: float
    packed: float
    gain: float

    def __str__(self) -> str:
        return f"{self.packed * 1e3:.2f} ms, dense {self.dense * 1e3:.2f} ms"


known: dict[str, Times] = {}  # by what the times depend on; read from the file once
_passing: set[str] = set()  # names of times that were taken under load, which no file remembers
_lock = threading.Lock()


def times(key: tuple, variants: Callable[[], Mapping[str, Callable[[], object]]], rounds: int = 9) -> Times:
    """Times of `variants()` ("dense" and "packed"), unless known for this `key`, number of threads, torch and kernels."""
    name = json.dumps([torch.__version__, torch.get_num_threads(), *map(str, key)])
    with _lock:
        if name not in known:
            known.update(_read())
        if name not in known:
            known[name] = _measure(variants(), rounds)
            (_passing.add if under_load() else _passing.discard)(name)
            _write()
        return known[name]


def under_load() -> bool:
    """Whether more work than the cores can do has been waiting in the last minute."""
    return hasattr(os, "getloadavg") and os.getloadavg()[0] > (os.cpu_count() or 1)


def _measure(variants: Mapping[str, Callable[[], object]], rounds: int) -> Times:
    with torch.no_grad():
        timings = latency.interleaved(variants, rounds=rounds)
        first, _, third = statistics.quantiles(latency.ratios(timings, "dense", "packed"), n=4)
        if first < 1 < third:  # the rounds disagree on which is faster
            timings = latency.interleaved(variants, rounds=4 * rounds)
    return Times(timings["dense"].median, timings["packed"].median, latency.ratio(timings, "dense", "packed"))


def path() -> Path:
    """The file with the times of the kernels compiled for this machine."""
    kernels = library()
    return Path(kernels._name).with_suffix(".json") if kernels else cache_folder() / "times.json"


def _read() -> dict[str, Times]:
    try:
        return {
            name: Times(**{key: float(value) for key, value in row.items()})
            for name, row in json.loads(path().read_text()).items()
        }
    except (OSError, TypeError, ValueError, AttributeError):  # none yet, or damaged: measured again
        return {}


def _write() -> None:
    lasting = _read() | {name: row for name, row in known.items() if name not in _passing}
    with contextlib.suppress(OSError), replacing(path()) as temporary:  # a cache folder that is read-only: measured each time
        temporary.write_text(json.dumps({name: asdict(row) for name, row in lasting.items()}, indent=1))
