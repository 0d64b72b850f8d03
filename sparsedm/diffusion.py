"""Forward process and sampling on diffusers' schedulers."""

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, SchedulerMixin
from torch import nn

SAMPLERS = {"ddim": DDIMScheduler, "ddpm": DDPMScheduler, "dpm++": DPMSolverMultistepScheduler}
_EXTRA = {"dpm++": {"algorithm_type": "dpmsolver++", "solver_order": 2}}


_SCHEDULE_KEYS = (
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type", "clip_sample",
)  # fmt: skip


def make_scheduler(name: str, source: nn.Module | SchedulerMixin | dict | None = None) -> SchedulerMixin:
    """The sampler called `name` ("ddim", "ddpm" or "dpm++") on the noise schedule and prediction type of `source`.

    `source` is a scheduler, its config, or a diffusers model whose own config has one as `noise_schedule`;
    without any it is DDPM's linear schedule of 1,000 steps with noise prediction.

    Raises:
        ValueError: unknown name (the message lists the known ones).
    """
    if name not in SAMPLERS:
        raise ValueError(f"unknown sampler {name!r}; known: {', '.join(SAMPLERS)}")
    if isinstance(source, nn.Module):
        source = getattr(getattr(source, "config", None), "noise_schedule", None)
    config = dict(getattr(source, "config", source) or {})
    known = {k: v for k, v in config.items() if k in _SCHEDULE_KEYS}
    return SAMPLERS[name].from_config({"clip_sample": True, **known, **_EXTRA.get(name, {})})


def target(scheduler: SchedulerMixin, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """What the network is trained to predict, [B, C, H, W]: the noise, the velocity or the picture."""
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return noise
    if kind == "v_prediction":
        return scheduler.get_velocity(x0, noise, t)
    if kind == "sample":
        return x0
    raise ValueError(f"unknown prediction_type {kind!r}; known: epsilon, v_prediction, sample")


def predict_x0(scheduler: SchedulerMixin, output: torch.Tensor, t: torch.Tensor, x_t: torch.Tensor) -> torch.Tensor:
    """The picture that a network output implies, clamped to [-1, 1] as the schedulers do with `clip_sample`."""
    kind = scheduler.config.prediction_type
    abar = scheduler.alphas_cumprod.to(x_t.device)[t].to(x_t.dtype)
    abar = abar.reshape(-1, *[1] * (x_t.dim() - 1))
    if kind == "epsilon":
        x0 = (x_t - (1 - abar).sqrt() * output) / abar.sqrt()
    elif kind == "v_prediction":
        x0 = abar.sqrt() * x_t - (1 - abar).sqrt() * output
    else:
        x0 = output
    return x0.clamp(-1, 1)


def null_label(model: nn.Module) -> int | None:
    """The label that means "no class" (the last of the table), or None for an unconditional model."""
    config = model.config
    classes = getattr(config, "num_classes", None) or getattr(config, "num_class_embeds", None)
    return None if classes is None else classes - 1


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


def sample(
    model: nn.Module,
    noise: torch.Tensor,
    *,
    sampler: str | SchedulerMixin = "ddim",
    steps: int = 50,
    class_labels: torch.Tensor | None = None,
    guidance: float = 0.0,
    generator: torch.Generator | None = None,
) -> Iterator[SampleState]:
    """Denoise `noise` [B, C, H, W], yielding a `SampleState` after every step; the last one holds the pictures.

    Args:
        sampler: a name from `SAMPLERS`, on the model's own noise schedule, or a diffusers scheduler.
        class_labels: [B]; None lets a conditional model draw without a class.
        guidance: classifier-free guidance g in cond + g * (cond - uncond); 0 does no second evaluation.
        generator: for samplers that add noise (ddpm).

    Raises:
        ValueError: guidance for a model without classes, or steps out of range.
    """
    scheduler = make_scheduler(sampler, model) if isinstance(sampler, str) else sampler
    null = null_label(model)
    train_steps = scheduler.config.num_train_timesteps
    if not 1 <= steps <= train_steps:
        raise ValueError(f"steps must be in 1..{train_steps}, not {steps}")
    if null is None and (guidance or class_labels is not None):
        raise ValueError("this model has no classes: leave class_labels out and guidance at 0")
    parameter = next(model.parameters())
    x = noise.to(parameter.device, parameter.dtype) * scheduler.init_noise_sigma
    if null is not None:
        labels = torch.full((len(x),), null) if class_labels is None else class_labels
        labels = labels.to(x.device)
    guided = guidance != 0 and class_labels is not None
    scheduler.set_timesteps(steps)
    for step, t in enumerate(scheduler.timesteps.tolist(), 1):
        model_input = scheduler.scale_model_input(x, t)
        kwargs = {}
        if null is not None:
            kwargs["class_labels"] = torch.cat([labels, torch.full_like(labels, null)]) if guided else labels
        with torch.no_grad():
            seconds, output = _timed_call(model, torch.cat([model_input] * 2) if guided else model_input, t, kwargs)
            if guided:
                cond, uncond = output.chunk(2)
                output = cond + guidance * (cond - uncond)
            x0 = predict_x0(scheduler, output, t, x)
            extra = {"generator": generator} if generator is not None else {}
            x = scheduler.step(output, t, x, **extra).prev_sample
        yield SampleState(step, steps, int(t), x, x0, seconds)


def _timed_call(model: nn.Module, x: torch.Tensor, t: int, kwargs: dict) -> tuple[float, torch.Tensor]:
    synchronize = torch.cuda.synchronize if x.is_cuda else (lambda: None)
    synchronize()
    start = time.perf_counter()
    output = model(x, torch.tensor(t, device=x.device), **kwargs).sample
    synchronize()
    return time.perf_counter() - start, output


def generate(model: nn.Module, noise: torch.Tensor, **kwargs) -> torch.Tensor:
    """The pictures [B, C, H, W] at the end of `sample`, not clamped; arguments as there."""
    return deque(sample(model, noise, **kwargs), maxlen=1)[0].sample
