"""What packing gives models of real sizes: time of a step, bytes on disk and in memory, seconds to load."""

import copy
import itertools
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from ..checkpoints import folders
from ..masking import layers
from ..models import dryrun, large, students
from ..packing import packed
from ..support import latency, markdown
from . import sizes
from .speed import ONEDNN, Variant, all_threads, onednn, randomised, timed, with_threads


def measure(
    names: Sequence[str] = tuple(large.LARGE),
    dtypes: Sequence[str] = ("float32",),
    threads: Sequence[int] = (),
    rounds: int = 5,
) -> Iterator[dict]:
    """One row per model, dtype and number of threads: random weights, masked 2:4 by magnitude, one picture.

    The dense model runs in the faster of eager's two memory formats and converted to oneDNN; more copies of this size would not
    fit in memory. Files are in bfloat16.

    Raises:
        ValueError: an unknown name.
    """
    models = [large.known(name) for name in names]
    for model, dtype, count in itertools.product(models, dtypes, threads or all_threads()[-1:]):
        with with_threads(count), torch.no_grad():
            row = _row(large.build(model, getattr(torch, dtype)), rounds)
        yield {"what": model.title, "dtype": dtype, "threads": count, **row}


def _row(dense: nn.Module, rounds: int) -> dict:
    inputs = randomised(dryrun.example_inputs(dense))
    sparse = layers.fold(students.sparsify(copy.deepcopy(dense), "2:4"))
    files = {"dense": _stored(dense, packed=False), "packed": _stored(sparse, packed=True)}
    way = _to_faster_format(dense, inputs, rounds)
    fast = packed.pack(sparse, batch=1)
    call = lambda model: model(**inputs)  # noqa: E731
    return {
        "parameters": sizes.parameters(dense),
        **timed({str(Variant("dense", way)): dense, **onednn("dense", dense, call), "packed": fast}, call, rounds),
        "packed_layers": (packed_layers := sum(map(packed.is_packed, fast.modules()))),
        "sparse_layers": packed_layers + len(layers.patterns(fast)),
        "files": files,
        "memory": {"dense": sizes.memory(dense), "packed": sizes.memory(fast)},
    }


def _to_faster_format(model: nn.Module, inputs: Mapping, rounds: int) -> str:
    """Leave the model in the faster of contiguous and channels-last format; which one, as `speed.Variant` calls it."""
    seconds = {}
    for way, layout in (("eager", torch.contiguous_format), ("channels last", torch.channels_last)):
        model.to(memory_format=layout)
        seconds[way] = latency.interleaved({way: lambda: model(**inputs)}, rounds=rounds, warmup=1)[way].median
    if seconds["eager"] <= seconds["channels last"]:
        model.to(memory_format=torch.contiguous_format)
    return min(seconds, key=seconds.get)


def _stored(model: nn.Module, packed: bool) -> dict[str, float]:
    """Bytes of the model's weights file, and seconds to load it."""
    with tempfile.TemporaryDirectory() as folder:
        folders.save(model, Path(folder, "model"), torch.bfloat16, packed=packed)
        began = time.perf_counter()
        folders.load(Path(folder, "model"))
        return {"bytes": folders.bytes_of(Path(folder, "model")), "load_seconds": time.perf_counter() - began}


HEAD = (
    "size in pixels", "dtype", "M parameters", "dense s", "oneDNN s", "packed s", "speed-up", "over oneDNN", "layers packed",
    "GB in memory", "GB on disk", "s to load",
)  # fmt: skip


def words(result: Mapping) -> str:
    """The rows of a result as a Markdown table."""
    return markdown.table(HEAD, map(_cells, result["rows"]))


def line(row: Mapping) -> str:
    """One row alone, as it is measured."""
    return markdown.line(_cells(row))


def _cells(row: Mapping) -> list:
    files, seconds = row["files"], {name: f"{ms / 1e3:.2f}" for name, ms in row["ms"].items()}
    dense, over = row["fastest_dense"], row["speedup_over_onednn"]
    return [
        row["what"], row["dtype"], f"{row['parameters'] / 1e6:.0f}", f"{seconds[dense]} ({Variant.parse(dense).way})",
        seconds.get(ONEDNN, ""), seconds["packed"], f"**{row['speedup']:.2f}x**", f"{over:.2f}x" if over else "",
        f"{row['packed_layers']} of {row['sparse_layers']}",
        f"{row['memory']['dense'] / 1e9:.2f} → {row['memory']['packed'] / 1e9:.2f}",
        f"{files['dense']['bytes'] / 1e9:.2f} → {files['packed']['bytes'] / 1e9:.2f}",
        f"{files['dense']['load_seconds']:.1f} → {files['packed']['load_seconds']:.1f}",
    ]  # fmt: skip
