"""Where the time of a sampling step goes, by kind of layer: packing speeds up one kind alone."""

import itertools
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn

from ..models import dryrun
from ..packing.packed import is_packed
from ..support import markdown
from .speed import all_threads, check, pair, randomised, with_threads

KINDS = ("packed layers", "dense layers", "norms", "activations", "rest")
_NORMS, _ACTIVATIONS = (nn.GroupNorm, nn.LayerNorm), (nn.SiLU, nn.GELU, nn.ReLU, nn.Mish)


def measure(
    models: Sequence[str] = ("uvit-s2-cifar10", "ddpm-cifar10"),
    batch: int = 4,
    dtypes: Sequence[str] = ("float32",),
    threads: Sequence[int] = (),
    rounds: int = 15,
) -> Iterator[dict]:
    """Shares (0 to 1) of the eager time of a packed model's step, one row per model, dtype and number of threads.

    "rest" is the time outside of these layers: attention's products, additions, reshapes, and the framework.
    """  # fmt: skip
    check(models)
    for name, dtype, count in itertools.product(models, dtypes, threads or all_threads()[-1:]):
        with with_threads(count), torch.no_grad():
            _, fast = pair(name, getattr(torch, dtype), batch)
            inputs = randomised(dryrun.example_inputs(fast, batch))
            steps = [_timed(fast, inputs) for _ in range(2 + rounds)][2:]
        shares = {kind: statistics.median(step[kind] / step["all"] for step in steps) for kind in KINDS}
        ms = statistics.median(step["all"] for step in steps) * 1e3
        yield {"what": f"{name}, batch {batch}", "dtype": dtype, "threads": count, "ms": ms, "shares": shares}


def _timed(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Seconds of one step: in all, and of the layers of each kind."""
    seconds, starts, hooks = dict.fromkeys(KINDS, 0.0), {}, []

    def start(module: nn.Module, args: tuple) -> None:
        starts[id(module)] = time.perf_counter()

    def stop(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        seconds[_kind(module)] += time.perf_counter() - starts[id(module)]

    for module in {id(module): module for module in model.modules() if _kind(module) != "rest"}.values():
        hooks += [module.register_forward_pre_hook(start), module.register_forward_hook(stop)]
    began = time.perf_counter()
    model(**inputs)
    seconds["all"] = time.perf_counter() - began
    for hook in hooks:
        hook.remove()
    seconds["rest"] = seconds["all"] - sum(seconds[kind] for kind in KINDS[:-1])
    return seconds


def _kind(module: nn.Module) -> str:
    if is_packed(module):
        return "packed layers"
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        return "dense layers"
    if isinstance(module, _NORMS):
        return "norms"
    return "activations" if isinstance(module, _ACTIVATIONS) else "rest"


HEAD = ("", "dtype", "threads", "ms", *KINDS)


def words(result: Mapping) -> str:
    """The rows of a result as a Markdown table."""
    return markdown.table(HEAD, map(_cells, result["rows"]))


def line(row: Mapping) -> str:
    """One row alone, as it is measured."""
    return markdown.line(_cells(row))


def _cells(row: Mapping) -> list:
    return [row["what"], row["dtype"], row["threads"], f"{row['ms']:.1f}", *(f"{row['shares'][kind]:.1%}" for kind in KINDS)]
