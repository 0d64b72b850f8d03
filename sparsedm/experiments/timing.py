"""The time per sampling step of the models that the recipes made."""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from ..checkpoints import folders
from ..measure.speed import cast, compare, with_threads
from ..packing import packed
from .recipes import recipe


def measure_methods(
    runs: str | Path,
    names: Sequence[str],
    batch: int = 16,
    dtypes: Sequence[str] = ("float32",),
    threads: Sequence[int] = (),
    rounds: int = 15,
    device: str | torch.device = "cpu",
) -> Iterator[dict]:
    """Times of one sampling step of models made by recipes, in `runs`/name/model, against their teacher's; one row each.

    N:M models run packed. Every model also runs compiled, and the faster way counts. Rows are as from `measure_steps`, where
    "packed" stands for the recipe's model.

    Raises:
        ValueError: the folder of a model is missing.
    """  # fmt: skip
    for name, dtype, count in itertools.product(names, dtypes, threads or (torch.get_num_threads(),)):
        folder = Path(runs, name, "model")
        if not folder.is_dir():
            raise ValueError(f"{folder} is not there; make it with: python -m sparsedm reproduce {name} --out {runs}")
        with with_threads(count):
            dense = cast(folders.load(recipe(name).base), getattr(torch, dtype), device)
            fast = cast(folders.load(folder), getattr(torch, dtype), device)
            fast = packed.pack(fast, batch=batch) if recipe(name).pattern else fast
            step = compare(f"{name}, batch {batch}", {"dense": dense, "packed": fast}, batch, True, rounds)
            torch.compiler.reset()
        yield {"name": name, "dtype": dtype, "threads": count, **step}
