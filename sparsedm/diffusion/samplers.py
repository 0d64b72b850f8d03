"""Sampling, step by step, with diffusers' schedulers."""

import inspect
import itertools
import math
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from diffusers import SchedulerMixin
from torch import nn

from ..models import denoisers
from ..models.denoisers import Inputs, each, null_label
from ..support import seeds
from . import deepcache
from .schedules import check_betas, make_scheduler, predict_x0

PIPELINE = "sample it with its diffusers pipeline"
STEP_SEEDS = 1 << 31  # far from the seeds of the noise that sampling starts from; torch takes seeds modulo 2**32


@dataclass
class SampleState:
    """One step of sampling.

    Attributes:
        step: the number of this step, from 1.
        steps: how many calls of the model there are: samplers of second order (Heun, KDPM2) make up to two calls a step.
        timestep: a float may lie between two timesteps of the training, as Euler's with Karras's noise levels.
        sample: x_t [B, C, H, W] after the step.
        x0: the predicted x_0 [B, C, H, W].
        seconds: time of the model call alone (both halves of a guided call, and the wait for an asynchronous device).
    """

    step: int
    steps: int
    timestep: int | float
    sample: torch.Tensor
    x0: torch.Tensor
    seconds: float


def start_noise(model: nn.Module, n: int, seed: int = 0, first: int = 0) -> torch.Tensor:
    """Noise [n, C, H, W] for the pictures `first`, `first` + 1, ...; each depends on (seed, its number) alone.

    Raises:
        ValueError: a model that this package cannot call, or a config that does not tell the shape.
    """
    denoisers.refuse_unknown(model, PIPELINE)
    shape = denoisers.of(model).shape(model)
    generator = torch.Generator()
    rows = [torch.randn(shape, generator=generator.manual_seed(seeds.numbered(seed, i))) for i in range(first, first + n)]
    return torch.stack(rows)


def step_generators(n: int, seed: int = 0, first: int = 0) -> list[torch.Generator]:
    """A generator for each of the pictures `first`, `first` + 1, ..., as in `start_noise`, for samplers that add noise."""
    return [torch.Generator().manual_seed(STEP_SEEDS + seeds.numbered(seed, i)) for i in range(first, first + n)]


def sample(
    model: nn.Module,
    noise: torch.Tensor,
    *,
    sampler: str | SchedulerMixin = "ddim",
    steps: int = 50,
    class_labels: torch.Tensor | None = None,
    conditioning: Inputs | None = None,
    negative: Inputs | None = None,
    guidance: float = 0.0,
    cache_interval: int = 1,
    generator: torch.Generator | list[torch.Generator] | None = None,
) -> Iterator[SampleState]:
    """Denoise `noise` [B, C, H, W], yielding a `SampleState` after every step; the last one holds the pictures.

    Args:
        noise: [B, C, H, W], as `start_noise` draws it.
        sampler: a name from `SAMPLERS`, on the model's own noise schedule, or a diffusers scheduler, which is not changed: its
            noise schedule and prediction type must be the model's, as in `EulerDiscreteScheduler.from_config(noise_schedule)`.
        steps: how many steps to take, at most the timesteps of the training.
        class_labels: [B]; None lets a conditional model draw without a class.
        conditioning: the model's other arguments, such as {"encoder_hidden_states": [B, tokens, dim]}.
        negative: the arguments of the uncond half of guidance (the empty text) that differ from `conditioning`.
        guidance: classifier-free guidance g in cond + g * (cond - uncond); 0 does no second evaluation.
        cache_interval: a UNet computes its deep blocks at the first of so many steps (`deepcache`); 1 is at all steps.
        generator: for samplers that add noise (ddpm): one, or one per picture (`step_generators`).

    Raises:
        ValueError: a model that this package cannot call (`denoisers.FAMILIES`), one that predicts a flow or takes text and gets
            no `conditioning`, a scheduler that is not for models like this, guidance for a model without classes or out of range,
            a class that the model does not have, steps out of range, or a cache for a model that is no UNet.
    """
    scheduler = prepare(model, sampler, steps, class_labels, conditioning, negative, guidance, cache_interval)
    parameter = next(model.parameters())
    x = noise.to(parameter.device, parameter.dtype) * scheduler.init_noise_sigma
    guided = guidance != 0 and (class_labels is not None or negative is not None)
    given, without = _conditionings(model, class_labels, conditioning, negative, x)
    arguments = _joined(given, without) if guided else given
    takes_generator = generator is not None and "generator" in inspect.signature(scheduler.step).parameters
    extra = {"generator": generator} if takes_generator else {}
    called = itertools.cycle(deepcache.in_turn(model, cache_interval))
    for step, t in enumerate(scheduler.timesteps, 1):
        model_input = scheduler.scale_model_input(x, t)
        with torch.no_grad():
            seconds, output = _timed_call(next(called), torch.cat([model_input] * 2) if guided else model_input, t, arguments)
            if guided:
                cond, uncond = output.chunk(2)
                output = cond + guidance * (cond - uncond)
            stepped = scheduler.step(output, t, x, **extra)
            x0 = _predicted_x0(scheduler, stepped, output, step, t, x)
            x = stepped.prev_sample
        yield SampleState(step, len(scheduler.timesteps), t.item(), x, x0, seconds)


def prepare(
    model: nn.Module,
    sampler: str | SchedulerMixin = "ddim",
    steps: int = 50,
    class_labels: torch.Tensor | None = None,
    conditioning: Inputs | None = None,
    negative: Inputs | None = None,
    guidance: float = 0.0,
    cache_interval: int = 1,
) -> SchedulerMixin:
    """The scheduler, at its first step, with which `sample` takes these arguments. Raises ValueError as `sample`."""
    denoisers.refuse_unknown(model, PIPELINE)
    if denoisers.of(model).flow:
        raise ValueError(f"{type(model).__name__} predicts a flow; {PIPELINE}")
    denoisers.require(model, ("class_labels", *(conditioning or {})), "pass it in conditioning={...}")
    deepcache.in_turn(model, cache_interval)
    scheduler = make_scheduler(sampler, model) if isinstance(sampler, str) else sampler
    _set_timesteps(scheduler, steps)
    if not 0 <= guidance < math.inf:
        raise ValueError(f"guidance must be a finite number of at least 0, not {guidance}")
    null = null_label(model)
    if null is not None and class_labels is not None and not 0 <= int(class_labels.min()) <= int(class_labels.max()) <= null:
        raise ValueError(f"the classes of this model are 0 to {null - 1}, and {null} for none")
    if null is None and (class_labels is not None or (guidance and negative is None)):
        raise ValueError("this model has no classes: leave class_labels out and guidance at 0, or give negative={...}")
    return scheduler


def _set_timesteps(scheduler: SchedulerMixin, steps: int) -> None:
    """Prepare `scheduler` for `steps` steps. Raises ValueError for a number out of range, or a scheduler not for our models."""
    check_betas(scheduler)
    own, kind = inspect.signature(type(scheduler).__init__).parameters, scheduler.config.get("variance_type")
    if "variance_type" in own and kind in ("learned", "learned_range"):
        remedy = "sample with ddim or dpm++, or give a scheduler with variance_type='fixed_small'"
        raise ValueError(f"{type(scheduler).__name__} with variance_type={kind!r} is not known here; {remedy}")
    last = scheduler.config.num_train_timesteps
    if not 1 <= steps <= last:
        raise ValueError(f"steps must be in 1..{last}, not {steps}")
    scheduler.set_timesteps(steps)
    if scheduler.timesteps.max() >= last:  # steps_offset moves all of them
        raise ValueError(f"{steps} steps reach timestep {scheduler.timesteps.max().item()}, the last is {last - 1}; take fewer")


def _predicted_x0(scheduler: SchedulerMixin, stepped, output: torch.Tensor, step: int, t: torch.Tensor, x: torch.Tensor):
    """The x_0 that the scheduler has used in its step; where it gives none, computed at the noise level of that step."""
    if getattr(stepped, "pred_original_sample", None) is not None:
        return stepped.pred_original_sample
    abar = 1 / (1 + scheduler.sigmas[step - 1] ** 2) if hasattr(scheduler, "sigmas") else None  # sigma = noise over signal
    return predict_x0(scheduler, output, t, x, abar)


def _conditionings(model, class_labels, conditioning, negative, x: torch.Tensor) -> tuple[Inputs, Inputs]:
    """The conditioning arguments of the calls for x [B, C, H, W], and of the unconditional halves of these calls."""
    given, null = dict(conditioning or {}), null_label(model)
    without = {**given, **(negative or {})}
    if null is not None:
        nothing = torch.full((len(x),), null)
        given["class_labels"], without["class_labels"] = nothing if class_labels is None else class_labels, nothing
    return each(lambda y: y.to(x.device), given), each(lambda y: y.to(x.device), without)


def _joined(a: Inputs, b: Inputs) -> Inputs:
    """The two batches a and b in one, a first."""
    return {k: _joined(v, b[k]) if isinstance(v, dict) else torch.cat([v, b[k]]) for k, v in a.items()}


def _timed_call(model: nn.Module, x: torch.Tensor, t: torch.Tensor, kwargs: Inputs) -> tuple[float, torch.Tensor]:
    synchronize = torch.cuda.synchronize if x.is_cuda else (lambda: None)
    synchronize()
    start = time.perf_counter()
    output = denoisers.of(model).predict(model, x, t.to(x.device), kwargs)[:, : x.shape[1]]
    synchronize()
    return time.perf_counter() - start, output


def generate(model: nn.Module, noise: torch.Tensor, **kwargs) -> torch.Tensor:
    """The pictures [B, C, H, W] at the end of `sample`, not clamped; arguments as there."""
    return deque(sample(model, noise, **kwargs), maxlen=1)[0].sample
