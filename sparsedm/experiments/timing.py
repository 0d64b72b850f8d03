"""The time per sampling step of the models that the recipes made, and of the teachers' and students' shallow blocks."""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import nn

from ..checkpoints import folders
from ..diffusion import deepcache
from ..masking import layers
from ..measure.speed import cast, compare, pair, randomised, timed, ways, with_threads
from ..models import dryrun, students
from ..packing import packed
from ..pruning import diffpruning
from .recipes import recipe
from .rivals import SHALLOW


def measure_methods(
    runs: str | Path,
    names: Sequence[str],
    batch: int = 16,
    dtypes: Sequence[str] = ("float32",),
    threads: Sequence[int] = (),
    rounds: int = 15,
    device: str | torch.device = "cpu",
) -> Iterator[dict]:
    """Times of one sampling step of recipes' models against their teacher's; one row each.

    A model that is not in `runs`/name/model is made as its recipe makes it, but not trained: the values of the weights do not
    change the time. N:M models run packed. Rows are as from `measure_steps`, where "packed" stands for the recipe's model.
    """
    for name, dtype, count in itertools.product(names, dtypes, threads or (torch.get_num_threads(),)):
        with with_threads(count):
            dense = cast(folders.load(recipe(name).base), getattr(torch, dtype), device)
            fast = cast(_model(name, Path(runs)), getattr(torch, dtype), device)
            fast = packed.pack(fast, batch=batch) if recipe(name).pattern else fast
            step = compare(f"{name}, batch {batch}", {"dense": dense, "packed": fast}, batch, True, rounds)
            torch.compiler.reset()
        yield {"name": name, "dtype": dtype, "threads": count, **step}


def _model(name: str, runs: Path) -> nn.Module:
    """The recipe's model: the trained one, or one of its shape and pattern."""
    if (runs / name / "model").is_dir():
        return folders.load(runs / name / "model")
    chosen = recipe(name)
    model = folders.load(chosen.base)
    if chosen.prune:
        model = diffpruning.prune(model, chosen.prune["ratio"], round_to=chosen.prune["round_to"], score="magnitude")
    return layers.fold(students.sparsify(model, chosen.pattern)) if chosen.pattern else model


def measure_rivals(
    names: Sequence[str], batch: int = 16, dtypes: Sequence[str] = ("float32",), threads: Sequence[int] = (), rounds: int = 15
) -> Iterator[dict]:
    """Times of one sampling step of teachers and of their packed 2:4 students, and of UNets without their deep blocks.

    One row a teacher, as from `measure_steps`; the kinds "dense shallow" and "packed shallow" are the calls between two whole
    ones of DeepCache.
    """
    for name, dtype, count in itertools.product(names, dtypes, threads or (torch.get_num_threads(),)):
        with with_threads(count):
            models = dict(zip(("dense", "packed"), pair(name, getattr(torch, dtype), batch), strict=True))
            inputs = randomised(dryrun.example_inputs(models["dense"], batch))
            models |= _shallow(models, inputs)
            row = timed(ways(models, inputs, True), lambda model, inputs=inputs: model(**inputs), rounds)
            torch.compiler.reset()
        yield {"name": name, "what": f"{name}, batch {batch}", "batch": batch, "dtype": dtype, "threads": count, **row}


def _shallow(models: dict[str, nn.Module], inputs: dict) -> dict[str, nn.Module]:
    """UNets that return what their deep blocks gave for these inputs, by kind; {} for other models."""
    shallow = {}
    for kind, model in models.items():
        if hasattr(model, "down_blocks"):
            whole, shallow[SHALLOW.format(kind)] = deepcache.in_turn(model, 2)
            with torch.no_grad():
                whole(**inputs)
    return shallow
