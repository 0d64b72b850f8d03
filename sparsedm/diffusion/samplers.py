"""Sampling, step by step, with diffusers' schedulers."""

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
from .schedules import make_scheduler, predict_x0

STEP_SEEDS = 1 << 31  # far from the seeds of the noise that sampling starts from; torch takes seeds modulo 2**32


@dataclass
class SampleState:
    """One step of sampling: `step` of `steps`, x_t after it and the predicted x_0, both [B, C, H, W].

    `seconds` is the time of the model call alone (both halves of a guided call, and the wait for an asynchronous device).
    """

    step: int
    steps: int
    timestep: int
    sample: torch.Tensor
    x0: torch.Tensor
    seconds: float


def start_noise(model: nn.Module, n: int, seed: int = 0, first: int = 0) -> torch.Tensor:
    """Noise [n, C, H, W] for the pictures `first`, `first` + 1, ...; each depends on (seed, its number) alone."""
    size, channels = model.config.sample_size, model.config.in_channels
    shape = (channels, *((size, size) if isinstance(size, int) else size))
    generator = torch.Generator()
    rows = [torch.randn(shape, generator=generator.manual_seed(seed * 1_000_003 + i)) for i in range(first, first + n)]
    return torch.stack(rows)


def step_generators(n: int, seed: int = 0, first: int = 0) -> list[torch.Generator]:
    """For samplers that add noise: a generator for each of the pictures `first`, `first` + 1, ..., as in `start_noise`."""
    return [torch.Generator().manual_seed(STEP_SEEDS + seed * 1_000_003 + i) for i in range(first, first + n)]


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
    generator: torch.Generator | list[torch.Generator] | None = None,
) -> Iterator[SampleState]:
    """Denoise `noise` [B, C, H, W], yielding a `SampleState` after every step; the last one holds the pictures.

    Args:
        sampler: a name from `SAMPLERS`, on the model's own noise schedule, or a diffusers scheduler.
        class_labels: [B]; None lets a conditional model draw without a class.
        conditioning: what else the model takes, such as {"encoder_hidden_states": [B, tokens, dim]}.
        negative: the same for the uncond of guidance (the empty text), as far as it differs.
        guidance: classifier-free guidance g in cond + g * (cond - uncond); 0 does no second evaluation.
        generator: for samplers that add noise (ddpm): one, or one per picture (`step_generators`).

    Raises:
        ValueError: guidance for a model without classes, a class that it does not have, steps out of range, no `conditioning`
            for a model that takes text, or a model that predicts a flow.
    """
    if denoisers.of(model).flow:
        raise ValueError(f"{type(model).__name__} predicts a flow; sample it with its diffusers pipeline")
    denoisers.require(model, ("class_labels", *(conditioning or {})), "pass it in conditioning={...}")
    scheduler = make_scheduler(sampler, model) if isinstance(sampler, str) else sampler
    train_steps = scheduler.config.num_train_timesteps
    if not 1 <= steps <= train_steps:
        raise ValueError(f"steps must be in 1..{train_steps}, not {steps}")
    if not 0 <= guidance < math.inf:
        raise ValueError(f"guidance must be a finite number of at least 0, not {guidance}")
    null = null_label(model)
    if null is not None and class_labels is not None and not 0 <= int(class_labels.min()) <= int(class_labels.max()) <= null:
        raise ValueError(f"the classes of this model are 0 to {null - 1}, and {null} for none")
    if null is None and (class_labels is not None or (guidance and negative is None)):
        raise ValueError("this model has no classes: leave class_labels out and guidance at 0, or give negative={...}")
    parameter = next(model.parameters())
    x = noise.to(parameter.device, parameter.dtype) * scheduler.init_noise_sigma
    guided = guidance != 0 and (class_labels is not None or negative is not None)
    given, without = _conditionings(model, class_labels, conditioning, negative, x)
    arguments = _joined(given, without) if guided else given
    scheduler.set_timesteps(steps)
    for step, t in enumerate(scheduler.timesteps.tolist(), 1):
        model_input = scheduler.scale_model_input(x, t)
        with torch.no_grad():
            seconds, output = _timed_call(model, torch.cat([model_input] * 2) if guided else model_input, t, arguments)
            if guided:
                cond, uncond = output.chunk(2)
                output = cond + guidance * (cond - uncond)
            x0 = predict_x0(scheduler, output, t, x)
            extra = {"generator": generator} if generator is not None else {}
            x = scheduler.step(output, t, x, **extra).prev_sample
        yield SampleState(step, steps, int(t), x, x0, seconds)


def _conditionings(model, class_labels, conditioning, negative, x: torch.Tensor) -> tuple[Inputs, Inputs]:
    """What conditions the calls for x [B, C, H, W], and what their unconditional halves."""
    given, null = dict(conditioning or {}), null_label(model)
    without = {**given, **(negative or {})}
    if null is not None:
        nothing = torch.full((len(x),), null)
        given["class_labels"], without["class_labels"] = nothing if class_labels is None else class_labels, nothing
    return each(lambda y: y.to(x.device), given), each(lambda y: y.to(x.device), without)


def _joined(a: Inputs, b: Inputs) -> Inputs:
    """Both batches in one."""
    return {k: _joined(v, b[k]) if isinstance(v, dict) else torch.cat([v, b[k]]) for k, v in a.items()}


def _timed_call(model: nn.Module, x: torch.Tensor, t: int, kwargs: Inputs) -> tuple[float, torch.Tensor]:
    synchronize = torch.cuda.synchronize if x.is_cuda else (lambda: None)
    synchronize()
    start = time.perf_counter()
    output = denoisers.of(model).predict(model, x, torch.tensor(t, device=x.device), kwargs)[:, : x.shape[1]]
    synchronize()
    return time.perf_counter() - start, output


def generate(model: nn.Module, noise: torch.Tensor, **kwargs) -> torch.Tensor:
    """The pictures [B, C, H, W] at the end of `sample`, not clamped; arguments as there."""
    return deque(sample(model, noise, **kwargs), maxlen=1)[0].sample
