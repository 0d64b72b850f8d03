"""The calls of a model that calibration takes: of noised pictures, of sampling, or of somebody's own run."""

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import SchedulerMixin
from torch import nn
from torch.utils.data import DataLoader, Dataset

from .. import data as data_module
from .. import diffusion
from ..models import denoisers
from ..models.denoisers import Inputs, each
from ..support import processes
from . import distill
from .checkpoint import TrainConfig


@dataclass(frozen=True)
class Call:
    """One call of the model: its arguments, how many rows it has, and their timesteps [B], None if the class has other ones."""

    args: tuple
    kwargs: Inputs
    rows: int
    timestep: torch.Tensor | None


def calls_of(model, teacher, data, n, batch_size, seed, scheduler, sampling) -> list[Call]:
    """The calls of `model` or of its float32 form `teacher`, as `calibrate` describes its argument `data`."""
    if callable(data) and not isinstance(data, (str, Dataset)):
        return _recorded(model, data)
    if data is None:
        return _recorded(teacher, lambda: _sample(teacher, n, batch_size, seed, **sampling))
    return list(_noised(teacher, data, n, batch_size, seed, scheduler))


def _noised(model, data, n: int, batch_size: int, seed: int, scheduler: SchedulerMixin | None) -> Iterator[Call]:
    """Pictures of a data set at random timesteps, as in a step of training."""
    dataset = data_module.load(data, size=denoisers.picture_size(model))
    size = min(batch_size, n, len(dataset))
    config = TrainConfig(steps=-(-n // size), batch_size=size, seed=seed)
    scheduler = scheduler or diffusion.training_scheduler(model)
    distill.check_data(model, dataset, config)
    draw = distill.StepDraw(model, scheduler, config, processes.accelerator("no"), getattr(dataset, "null", None))
    batches = data_module.StepSampler(len(dataset), size, seed, 0, config.steps)
    like, denoiser = next(model.parameters()), denoisers.of(model)
    for step, (images, labels) in enumerate(DataLoader(dataset, batch_sampler=batches, generator=torch.Generator())):
        with draw.random_stream(step):
            images, noise, t, given = draw(images, labels)
        noisy = diffusion.add_noise(scheduler, images, noise, t)
        noisy, t, given = each(lambda x: x.to(like.device), {"x": noisy, "t": t, "given": given}).values()
        yield from _recorded(model, lambda x=noisy, t=t, given=given: denoiser.predict(model, x, t, given), compute=False)


def _sample(model, n: int, batch_size: int, seed: int, *, steps: int = 20, **options) -> None:
    """Sample so many pictures that the model is called with n inputs; `options` are arguments of `diffusion.sample`."""
    given = {name: each(_full, options.pop(name, None)) for name in ("class_labels", "conditioning", "negative")}
    rows, null = _rows(given) or -(-n // steps), denoisers.null_label(model)
    if null is not None and given["class_labels"] is None:
        given["class_labels"] = torch.arange(rows) % null
    for start in range(0, rows, batch_size):
        stop = min(start + batch_size, rows)
        numbers = {"n": stop - start, "seed": seed, "first": start}
        noise, generators = diffusion.start_noise(model, **numbers), diffusion.step_generators(**numbers)
        some = each(lambda x, part=slice(start, stop): x[part], given)
        diffusion.generate(model, noise, steps=steps, generator=generators, **options, **some)


def _rows(inputs: Inputs) -> int | None:
    """How many rows the first tensor in `inputs` has, numbers apart."""
    rows = []
    each(lambda x: rows.extend(x.shape[:1]), inputs)
    return next(iter(rows), None)


def by_name(model: nn.Module, call: Call) -> dict[str, Any]:
    """All arguments of a call as keyword arguments."""
    named = inspect.signature(model.forward).bind(*call.args, **call.kwargs).arguments
    return {name: value for name, value in named.items() if name != "kwargs"} | named.get("kwargs", {})


def _timesteps(args: tuple, kwargs: Inputs, rows: int) -> torch.Tensor | None:
    """The timestep [B] of each row, or None where the class names or shapes it in another way (one for each frame or token)."""
    t = torch.as_tensor(kwargs.get("timestep", args[1] if len(args) > 1 else math.nan))
    return t.double().cpu().expand(rows) if t.shape in ((), (1,), (rows,)) and not t.isnan().any() else None


class Enough(Exception):
    """Raised in a hook: the rest of the call is not needed."""


def _recorded(model: nn.Module, run: Callable[[], Any], compute: bool = True) -> list[Call]:
    """The calls of `model` while `run` runs, in float32; without `compute` the first alone, which is broken off."""
    calls = []

    def note(module: nn.Module, args: tuple, kwargs: dict) -> None:
        args, kwargs = tuple(each(_full, x) for x in args), each(_full, kwargs)
        rows = _rows({"picture": args[0] if args else None, **kwargs})
        calls.append(Call(args, kwargs, rows, _timesteps(args, kwargs, rows)))
        if not compute:
            raise Enough

    with hooked([model.register_forward_pre_hook(note, with_kwargs=True)]):
        run()
    if not calls:
        raise ValueError(f"data did not call the {type(model).__name__}; let it run a pipeline that holds this very model")
    return calls


def _full(x: torch.Tensor) -> torch.Tensor:
    return x.detach().float() if x.is_floating_point() else x.detach()


@contextlib.contextmanager
def hooked(handles: list) -> Iterator[None]:
    """Remove these hooks at the end, which one of them may bring about by raising `Enough`."""
    try:
        with contextlib.suppress(Enough):
            yield
    finally:
        for handle in handles:
            handle.remove()
