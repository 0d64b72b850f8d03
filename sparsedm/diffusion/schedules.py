"""The forward process and what the network predicts, on diffusers' schedulers."""

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SchedulerMixin,
)
from diffusers.training_utils import compute_density_for_timestep_sampling
from torch import nn

from ..models import denoisers

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


def training_scheduler(model: nn.Module) -> SchedulerMixin:
    """The forward process that `model` is trained on: DDPM's, or rectified flow for the classes made for it (SD3, Flux).

    Either with the numbers of the model's own config, if it has a `noise_schedule`.
    """
    if not denoisers.of(model).flow:
        return make_scheduler("ddpm", model)
    return FlowMatchEulerDiscreteScheduler.from_config(getattr(model.config, "noise_schedule", None) or {})


def is_flow(scheduler: SchedulerMixin) -> bool:
    """Whether the forward process is rectified flow, x_t = (1 - sigma) x_0 + sigma noise."""
    return isinstance(scheduler, FlowMatchEulerDiscreteScheduler)


def draw_timesteps(scheduler: SchedulerMixin, n: int) -> torch.Tensor:
    """Random timesteps [n] for training: uniform; for rectified flow logit-normal, as SD3 (arXiv 2403.03206, section 3.1)."""
    steps = scheduler.config.num_train_timesteps
    if not is_flow(scheduler):
        return torch.randint(steps, (n,))
    u = compute_density_for_timestep_sampling("logit_normal", n, logit_mean=0.0, logit_std=1.0)
    return scheduler.timesteps[(u * steps).long().clamp(max=steps - 1)]


def add_noise(scheduler: SchedulerMixin, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """x_t [B, C, H, W] for pictures x0 and noise [B, C, H, W] at timesteps t [B]."""
    return scheduler.scale_noise(x0, t, noise) if is_flow(scheduler) else scheduler.add_noise(x0, noise, t)


def target(scheduler: SchedulerMixin, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """What the network is trained to predict, [B, C, H, W]: the noise, the velocity or the picture; for rectified flow
    noise - picture."""
    if is_flow(scheduler):
        return noise - x0
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
