"""Calibration: N:M sparsity in one shot, layer after layer, from what the layers see. No gradients, no training."""

import copy
import math
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import SchedulerMixin
from torch import nn
from torch.utils.data import Dataset

from ..masking import layers, nm, obs
from ..masking.nm import NMPattern
from ..masking.obs import Moments
from ..models import students
from ..models.dryrun import bypassed, meta_copy, structure_of
from ..support import markdown
from .calls import Call, Enough, by_name, calls_of, hooked

METHODS = ("magnitude", "wanda", "obs", "admm")
WEIGHTS = ("uniform", "obs-diff")
NOT_RUN = "the layer did not run in calibration"


@dataclass(frozen=True)
class LayerState:
    """What `calibrate` yields after every layer.

    `before` and `after` are relative errors of the layer's output, |Y - Y_dense|^2 / |Y_dense|^2 over the calibration tokens,
    of magnitude's mask and of the method, both with the inputs that the pruned model gives. `fallback` says why Wanda's
    mask had to do, or is empty.
    """

    name: str
    layer: int
    layers: int
    before: float
    after: float
    seconds: float
    fallback: str = ""


def worst(states: Sequence[LayerState], count: int = 10) -> str:
    """The layers with the largest errors, as a Markdown table."""
    rows = sorted(states, key=lambda state: -state.after)[:count]
    head = ("layer", "relative error", "with magnitude's mask", "instead")
    return markdown.table(head, ((row.name, f"{row.after:.4f}", f"{row.before:.4f}", row.fallback) for row in rows))


@torch.no_grad()
def calibrate(
    model: nn.Module,
    data: str | Dataset | Callable[[], Any] | None = None,
    pattern: str | NMPattern = "2:4",
    method: str = "admm",
    *,
    n: int = 1024,
    batch_size: int = 64,
    packages: int = 8,
    max_memory: float = 1e9,
    tokens: int = 65_536,
    weights: str = "uniform",
    damping: float = 0.01,
    seed: int = 0,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] | None = None,
    overrides: Mapping[str, str | NMPattern] | None = None,
    scheduler: SchedulerMixin | None = None,
    **sampling,
) -> Iterator[LayerState]:
    """Make the layers of a dense `model` N:M sparse in place, in the order in which they run, yielding a `LayerState` for each.

    Every layer is fitted to the outputs that it has in the dense model, on the inputs that it gets from the layers pruned so far.
    A layer that does not run in calibration stays dense, and so does a layer whose weight is used outside of its forward.
    The model changes at the very end, when all is verified; if the generator is closed before, or raises, nothing has changed.
    Half-precision models are computed in float32 and stored back.

    Args:
        data: a data set, or its name, whose pictures are noised as in training; or a function of nothing that runs the model,
            such as `lambda: pipeline(prompts)`, whose calls of the model are taken; or None for the trajectories of
            `sparsedm.sample`.
        method: "magnitude" and "wanda" choose a mask; "obs" (SparseGPT's order) and "admm" (ALPS) update what is kept, too.
        n: how many inputs of the model, each a noised picture or one step of a sampled one.
        packages: into how many parts the layers are divided; the inputs of each are computed with all parts before it pruned.
        max_memory: bytes of Gram matrices that are kept at once; more packages are made where they would be larger.
        tokens: of so many tokens at most, drawn at random, a layer's Gram matrix is made.
        weights: of the timesteps, "uniform" or "obs-diff" (`obs.timestep_weights`).
        damping: added to the diagonal of the Gram matrix, as a share of its mean.
        include, exclude, overrides: which layers, as `sparsedm.sparsify`.
        scheduler: the forward process of noised data, by default the model's own.
        **sampling: for the trajectories, arguments of `sparsedm.sample`: `sampler`, `steps` (20), `guidance`, `class_labels` or
            `conditioning` (of one picture each) and `negative`. Without `class_labels` all classes have their turn.

    Raises:
        ValueError: a bad option, data that do not fit the model or run no chosen layer, or a model in sparse training.
        FloatingPointError: weights or inputs of a layer (named) that are not finite.
    """
    _check(model, data, method, weights, sampling, n=n, batch_size=batch_size, packages=packages, tokens=tokens)
    shadow = students.sparsify(meta_copy(model), pattern, include=include, exclude=exclude, overrides=overrides)
    patterns = {name: layer.pattern for name, layer in layers.nm_layers(shadow)}
    for name in patterns:
        if not torch.isfinite(model.get_submodule(name).weight).all():
            raise FloatingPointError(f"{name} has weights that are not finite; nothing is changed")
    full = all(p.dtype == torch.float32 for p in model.parameters())
    teacher = (structure_of(model) if full else copy.deepcopy(model).float()).eval()
    student = structure_of(teacher)
    calls = calls_of(model, teacher, data, n, batch_size, seed, scheduler, sampling)
    row_weights = _row_weights(calls, weights)
    chosen = ", ".join(list(patterns)[:3])
    for name, reason in bypassed(teacher, by_name(model, calls[0])).items():
        if patterns.pop(name, None):
            shadow.get_submodule(name).dense_reason = NOT_RUN if reason == layers.NEVER_CALLED else reason
    runs = _runs(teacher, patterns, calls[0])
    if not runs:
        raise ValueError(f"no chosen layer ran in calibration ({chosen}); choose others, or give other data")
    _warn_of_few(teacher, runs, calls)
    generator, notes = torch.Generator().manual_seed(seed), {}
    for package in _packages(teacher, runs, packages, max_memory):
        began = time.perf_counter()
        moments = _gather(teacher, student, package, calls, row_weights, tokens, generator)
        for name in package:
            before, after, notes[name] = _prune(student.get_submodule(name), moments.pop(name), patterns[name], method, damping)
            yield LayerState(name, len(notes), len(runs), before, after, time.perf_counter() - began, notes[name])
            began = time.perf_counter()
    _write(model, student, shadow, notes)


def _check(model: nn.Module, data, method: str, weights: str, sampling: Mapping, **numbers: int) -> None:
    for what, value, known in (("method", method, METHODS), ("weights", weights, WEIGHTS)):
        if value not in known:
            raise ValueError(f"{what} {value!r} is none of {', '.join(known)}")
    for what, value in numbers.items():
        if value < 1:
            raise ValueError(f"{what} must be at least 1, it is {value}")
    if layers.is_sparse(model):
        raise ValueError("the model is in sparse training; calibrate the dense one, or densify it")
    if data is not None and sampling:
        raise ValueError(f"{next(iter(sampling))} is for calibration without data")


def _row_weights(calls: Sequence[Call], kind: str) -> Sequence[torch.Tensor | None]:
    """A weight [B] for the rows of each call; None for all 1."""
    if kind == "uniform":
        return [None] * len(calls)
    timesteps = [call.timestep for call in calls]
    if any(t is None for t in timesteps):
        raise ValueError(f"weights {kind!r} need one timestep for each row of a call, which this model does not take; leave them")
    return obs.timestep_weights(torch.cat(timesteps)).split([len(t) for t in timesteps])


# --- layers in the order in which they run -----------------------------------------------------------------------------


@dataclass
class _Runs:
    """How often a layer runs in one call, and on how many tokens in all."""

    times: int = 0
    tokens: int = 0


def _runs(model: nn.Module, names: Collection[str], call: Call) -> dict[str, _Runs]:
    """How the layers run in a call, in the order of their first run."""
    by_name: dict[str, _Runs] = {}

    def see(name: str, layer: nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
        runs = by_name.setdefault(name, _Runs())
        runs.times, runs.tokens = runs.times + 1, runs.tokens + y.numel() // len(layer.weight)

    _watch(model, names, call, see)
    return by_name


def _watch(model: nn.Module, names: Collection[str], call: Call, see: Callable, stop_after: int = -1) -> None:
    """Call the model with `see(name, layer, input, output)` after the named layers; it ends after so many of these."""
    seen = 0

    def hook(name: str) -> Callable:
        def after(layer: nn.Module, args: tuple, kwargs: dict, output: torch.Tensor) -> None:
            nonlocal seen
            see(name, layer, args[0] if args else kwargs["input"], output)
            seen += 1
            if seen == stop_after:
                raise Enough

        return after

    with hooked([model.get_submodule(name).register_forward_hook(hook(name), with_kwargs=True) for name in names]):
        model(*call.args, **call.kwargs)


def _packages(model: nn.Module, runs: Mapping[str, _Runs], count: int, max_memory: float) -> Iterator[dict[str, _Runs]]:
    """The layers in `count` equal parts, or more where their Gram matrices would be too large together."""
    package, used, size = {}, 0, -(-len(runs) // count)
    for name, found in runs.items():
        out, d = obs.columns(model.get_submodule(name).weight).shape
        needed = 8 * d * (d + out)
        if package and (len(package) == size or used + needed > max_memory):
            yield package
            package, used = {}, 0
        package[name], used = found, used + needed
    yield package


def _warn_of_few(model: nn.Module, runs: Mapping[str, _Runs], calls: Sequence[Call]) -> None:
    rows = sum(call.rows for call in calls)
    needed = {}  # rows, for as many tokens as inputs
    for name, found in runs.items():
        d = obs.columns(model.get_submodule(name).weight).shape[1]
        needed[name] = -(-d * calls[0].rows // found.tokens)
    name = max(needed, key=needed.get)
    if needed[name] > rows:
        warnings.warn(f"{name} has fewer calibration tokens than inputs at n={rows}; n={needed[name]} would do", stacklevel=2)


def _gather(teacher, student, package, calls, row_weights, tokens: int, generator: torch.Generator) -> dict[str, Moments]:
    """The moments of the package's layers: targets from the teacher, inputs from the student."""
    found, stop = {}, sum(runs.times for runs in package.values())
    for name in package:
        weight = obs.columns(teacher.get_submodule(name).weight)
        found[name] = Moments(weight.shape[1], weight.shape[0], weight.device)
    for call, weight in zip(calls, row_weights, strict=True):
        targets = {name: [] for name in package}

        def draw(name, y):
            wanted = math.ceil(tokens * len(y) / (package[name].tokens * len(calls)))
            return torch.randperm(len(y), generator=generator)[:wanted]

        def keep(name, layer, x, y, targets=targets, weight=weight):
            if not _is_routed(name):
                y = obs.outputs(layer, y)
                chosen = draw(name, y)
                each_token = None if weight is None else weight.repeat_interleave(len(y) // len(weight))[chosen]
                targets[name].append((chosen, y[chosen], each_token))

        def add(name, layer, x, y, targets=targets):
            if not torch.isfinite(x).all():
                raise FloatingPointError(f"the inputs of {name} are not finite in calibration; nothing is changed")
            if _is_routed(name):
                y = obs.outputs(layer, teacher.get_submodule(name)(x))
                chosen = draw(name, y)
                y, weight = y[chosen], None
            else:
                chosen, y, weight = targets[name].pop(0)
            found[name].add(obs.tokens(layer, x, chosen), y, weight)

        _watch(teacher, package, call, keep, stop)
        _watch(student, package, call, add, stop)
    return found


def _is_routed(name: str) -> bool:
    """Whether a layer is one of several experts, to which a router gives tokens: others in the pruned model.

    Such a layer is fitted to what the dense layer makes of the pruned model's tokens.
    """
    return "expert" in name


# --- one layer ---------------------------------------------------------------------------------------------------------


def _prune(layer: nn.Module, moments: Moments, pattern: NMPattern, method: str, damping: float) -> tuple[float, float, str]:
    """Give the layer its sparse weight; returns the relative errors of magnitude's mask and of this one, and what went wrong."""
    dense = obs.columns(layer.weight).double()
    magnitude, shift, fallback = nm.masked(dense, nm.mask(dense, pattern)), 0.0, ""
    try:
        sparse, shift = _solve(layer, dense, magnitude, moments, pattern, method, damping)
    except (obs.Unsolvable, torch.linalg.LinAlgError) as error:
        sparse, fallback = obs.wanda(dense, moments, pattern), f"Wanda's mask: {error}"
    _replace(layer, obs.from_columns(sparse, layer.weight.shape))
    if torch.is_tensor(shift):
        layer.bias = nn.Parameter(layer.bias + shift.to(layer.bias), requires_grad=False)
    return moments.error(magnitude), moments.error(sparse, shift), fallback


def _solve(layer, dense, magnitude, moments, pattern, method, damping) -> tuple[torch.Tensor, torch.Tensor | float]:
    if method == "magnitude":
        return magnitude, 0.0
    if method == "wanda":
        return obs.wanda(dense, moments, pattern), 0.0
    biased = layer.bias is not None
    hessian, target = obs.quadratic(moments, dense, damping, centred=biased)
    sparse = {"obs": obs.sequential, "admm": obs.admm}[method](target, hessian, pattern)
    sparse = obs.refit(sparse, target, hessian)
    return sparse, moments.shift(sparse) if biased else 0.0


def _replace(layer: nn.Module, weight: torch.Tensor) -> None:
    """A new parameter: the old one is the dense model's, too."""
    layer.weight = nn.Parameter(weight.to(layer.weight), requires_grad=False)


def _write(model: nn.Module, student: nn.Module, shadow: nn.Module, notes: Mapping[str, str]) -> None:
    """Give the model the weights and biases of the student, and to each layer why it is dense or what went wrong."""
    for name in notes:
        weight = student.get_submodule(name).weight
        if not torch.isfinite(weight).all() or nm.verify(weight, shadow.get_submodule(name).pattern):
            raise FloatingPointError(f"the weights that were found for {name} are not finite; nothing is changed")
    for name, layer in layers.weight_layers(shadow):
        own = model.get_submodule(name)
        own.mask_note = notes.get(name, "")
        own.dense_reason = "" if name in notes else getattr(layer, "dense_reason", NOT_RUN)
        if name in notes:
            found = student.get_submodule(name)
            own.weight.copy_(found.weight)
            if own.bias is not None:
                own.bias.copy_(found.bias)
