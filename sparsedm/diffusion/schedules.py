"""The forward process and what the network predicts, on diffusers' schedulers.

With abar_t, the cumulative product of 1 - beta (`alphas_cumprod`), a noisy picture is
x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise (DDPM, arXiv 2006.11239, formula 4), and the velocity
v = sqrt(abar_t) noise - sqrt(1 - abar_t) x_0 (arXiv 2202.00512, appendix D).
"""

import inspect
import math
from collections.abc import Iterable, Iterator, Mapping

import diffusers
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
MOST_STEPS = 100_000  # of a noise schedule
PREDICTIONS = ("epsilon", "v_prediction", "sample")

_FORWARD = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
    "prediction_type",
)
# Settings that some of diffusers' schedulers have and others lack, each with the value that changes nothing. _FORWARD_EXTRA
# holds kinds of training that nothing here knows, _SAMPLING_EXTRA the noise levels and bounds that a sampler takes. A setting in
# neither belongs to the rule of one sampler (solver_order, set_alpha_to_one; DPM++ does not clip).
_FORWARD_EXTRA = {"snr_shift_scale": 1.0, "use_flow_sigmas": False, "timestep_type": "discrete", "predict_epsilon": True}
_SAMPLING_EXTRA = {
    "clip_sample_range": 1.0,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_lu_lambdas": False,
    "sigma_min": None,
    "sigma_max": None,
    "interpolation_type": "linear",
    "lambda_min_clipped": -math.inf,
    "use_dynamic_shifting": False,
}


def make_scheduler(name: str, source: nn.Module | SchedulerMixin | Mapping | None = None) -> SchedulerMixin:
    """The sampler called `name` ("ddim", "ddpm" or "dpm++") with all settings of `source` that this sampler has.

    `source` is a scheduler, its config, or a diffusers model whose config holds such a config as `noise_schedule`; without a
    `source` the schedule is DDPM's linear one of 1,000 steps with noise prediction. The noise schedule, the prediction type and
    `clip_sample` come from `source`, given there or by default. A setting that `source` leaves at the default of its class takes
    the sampler's own default, as in diffusers' `from_config`.

    Raises:
        ValueError: unknown name (the message lists the known ones), a setting that the sampler lacks and that would change the
            pictures (named), or settings that make no schedule.
    """
    if name not in SAMPLERS:
        raise ValueError(f"unknown sampler {name!r}; known: {', '.join(SAMPLERS)}")
    settings = {"clip_sample": True, **_settings(source)}
    own = inspect.signature(SAMPLERS[name].__init__).parameters
    unused = {"clip_sample_range"} if not settings["clip_sample"] else set()
    lacking = [key for key in _SAMPLING_EXTRA if key not in own and key not in unused]
    remedy = "pass a diffusers scheduler that has it as sampler"
    _refuse(settings, _FORWARD_EXTRA | {key: _SAMPLING_EXTRA[key] for key in lacking}, f"the sampler {name}", remedy)
    if name != "ddpm":
        settings.pop("variance_type", None)  # these samplers add no noise
    return _build(SAMPLERS[name], settings)


def possible_samplers(
    source: nn.Module | SchedulerMixin | Mapping | None = None, names: Iterable[str] = tuple(SAMPLERS)
) -> Iterator[SchedulerMixin]:
    """The samplers among `names`, in this order, that `make_scheduler` can make of `source`.

    Raises:
        ValueError: no sampler keeps all settings of `source`; the message is that of the first one.
    """
    refusals, made = [], False
    for name in names:
        try:
            scheduler = make_scheduler(name, source)
        except ValueError as error:
            refusals.append(error)
        else:
            made = True
            yield scheduler
    if not made:
        raise refusals[0]


def training_scheduler(model: nn.Module) -> SchedulerMixin:
    """The forward process that `model` is trained on: DDPM's, or rectified flow for the classes made for flows (SD3, Flux).

    The numbers come from the `noise_schedule` in the model's config, if there is one. Only the noise schedule and the prediction
    type in this config count: the settings of a sampler do not matter to training.

    Raises:
        ValueError: a setting of the forward process that cannot be kept (named), or settings that make no schedule.
    """
    if denoisers.of(model).flow:
        return _flow_scheduler(model)
    settings = _settings(model)
    _refuse(settings, _FORWARD_EXTRA, "training", "pass a scheduler= with betas alone")
    return _build(DDPMScheduler, {key: settings[key] for key in _FORWARD if key in settings})


def _flow_scheduler(model: nn.Module) -> SchedulerMixin:
    config = _config(model)
    if "beta_schedule" in config:
        raise ValueError(f"{type(model).__name__} predicts a flow, but its noise_schedule has betas; give that of a flow")
    return FlowMatchEulerDiscreteScheduler.from_config(config)


def _config(source: nn.Module | SchedulerMixin | Mapping | None) -> Mapping:
    if isinstance(source, nn.Module):
        source = getattr(getattr(source, "config", None), "noise_schedule", None)
    if isinstance(source, SchedulerMixin):
        return {**source.config, "_class_name": type(source).__name__}
    config = source or {}
    if not isinstance(config, Mapping):
        raise ValueError(f"a noise_schedule is the config of a scheduler, not a {type(config).__name__}")
    return config


def _settings(source: nn.Module | SchedulerMixin | Mapping | None) -> dict:
    """The settings in the config of `source`; of its class's defaults only those that tell how the model was trained."""
    config, kept = _config(source), (*_FORWARD, "clip_sample")
    default, unset = _class_defaults(config), config.get("_use_default_values", ())
    given = {key: value for key, value in config.items() if not key.startswith("_") and (key in kept or key not in unset)}
    return {key: default[key] for key in kept if key in default} | given


def _class_defaults(config: Mapping) -> dict:
    """The default settings of the diffusers scheduler that a config names; {} if the config names none."""
    name = str(config.get("_class_name"))
    cls = getattr(diffusers.schedulers, name, None)
    if not (isinstance(cls, type) and issubclass(cls, SchedulerMixin)):
        return {}
    default = {key: parameter.default for key, parameter in inspect.signature(cls.__init__).parameters.items()}
    if "beta_schedule" not in default:
        raise ValueError(f"the noise schedule of {name} has no betas; give that of a DDIMScheduler or the like")
    return {"clip_sample": False} | default  # a class without this setting does not clip


def _refuse(settings: Mapping, harmless: Mapping, user: str, remedy: str) -> None:
    for key, value in harmless.items():
        if settings.get(key) not in (None, value):
            raise ValueError(f"{user} cannot keep {key}={settings[key]!r} of the noise schedule; {remedy}")


def _build(cls: type[SchedulerMixin], settings: dict) -> SchedulerMixin:
    steps, kind = settings.get("num_train_timesteps", 1000), settings.get("prediction_type", "epsilon")
    if not isinstance(steps, int) or not 1 <= steps <= MOST_STEPS:
        raise ValueError(f"num_train_timesteps of a noise schedule is a number in 1..{MOST_STEPS}, not {steps!r}")
    if kind not in PREDICTIONS:
        raise _unknown(kind)
    try:
        scheduler = cls.from_config(settings)
        scheduler.set_timesteps(1)
    except (TypeError, ValueError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"these settings make no {cls.__name__}: {error}") from error
    betas = scheduler.betas
    if betas.shape != (steps,) or not ((betas >= 0) & (betas <= 1)).all():
        raise ValueError(f"the betas of a noise schedule are {steps} numbers in 0..1 (num_train_timesteps), these are not")
    return scheduler


def is_flow(scheduler: SchedulerMixin) -> bool:
    """Whether the forward process is rectified flow, x_t = (1 - sigma) x_0 + sigma noise."""
    return isinstance(scheduler, FlowMatchEulerDiscreteScheduler)


def check_betas(scheduler: SchedulerMixin) -> None:
    """Raise ValueError unless the scheduler's noise levels follow from betas, as in all models of this package."""
    if not hasattr(scheduler, "alphas_cumprod"):
        raise ValueError(f"the noise schedule of {type(scheduler).__name__} has no betas; give a DDIMScheduler or the like")


def draw_timesteps(scheduler: SchedulerMixin, n: int) -> torch.Tensor:
    """Random timesteps [n] for training: uniform; for rectified flow logit-normal, as SD3 (arXiv 2403.03206, section 3.1)."""
    steps = scheduler.config.num_train_timesteps
    if not is_flow(scheduler):
        return torch.randint(steps, (n,))
    u = compute_density_for_timestep_sampling("logit_normal", n, logit_mean=0.0, logit_std=1.0)
    return scheduler.timesteps[(u * steps).long().clamp(max=steps - 1)]


def add_noise(scheduler: SchedulerMixin, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """x_t [B, C, H, W] for pictures x0 and noise [B, C, H, W] at timesteps t [B]."""
    if is_flow(scheduler):
        return scheduler.scale_noise(x0, t, noise)
    signal, spread = _levels(scheduler, t, x0)
    return signal * x0 + spread * noise


def target(scheduler: SchedulerMixin, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """What the network is trained to predict, [B, C, H, W]: the noise, the velocity or the picture; for rectified flow
    noise - picture."""
    if is_flow(scheduler):
        return noise - x0
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return noise
    if kind == "v_prediction":
        signal, spread = _levels(scheduler, t, x0)
        return signal * noise - spread * x0
    if kind == "sample":
        return x0
    raise _unknown(kind)


def predict_x0(
    scheduler: SchedulerMixin, output: torch.Tensor, t: torch.Tensor | int, x_t: torch.Tensor, abar: torch.Tensor | None = None
) -> torch.Tensor:
    """The picture [B, C, H, W] that a network output implies, bounded as the scheduler's config says.

    With `thresholding` the picture is thresholded, else with `clip_sample` clamped to plus or minus `clip_sample_range`. Where a
    sampler uses noise levels between the timesteps, `abar` takes the place of abar_t.
    """
    kind = scheduler.config.prediction_type
    signal, spread = _levels(scheduler, t, x_t, abar)
    if kind == "epsilon":
        x0 = (x_t - spread * output) / signal
    elif kind == "v_prediction":
        x0 = signal * x_t - spread * output
    elif kind == "sample":
        x0 = output
    else:
        raise _unknown(kind)
    if scheduler.config.get("thresholding"):
        return scheduler._threshold_sample(x0)
    if scheduler.config.get("clip_sample"):
        reach = scheduler.config.get("clip_sample_range", 1.0)
        return x0.clamp(-reach, reach)
    return x0


def predict_noise(scheduler: SchedulerMixin, output: torch.Tensor, t: torch.Tensor, x_t: torch.Tensor) -> torch.Tensor:
    """The noise [B, C, H, W] that a network output implies."""
    kind = scheduler.config.prediction_type
    signal, spread = _levels(scheduler, t, x_t)
    if kind == "v_prediction":
        return signal * output + spread * x_t
    return (x_t - signal * output) / spread if kind == "sample" else output


def _levels(
    scheduler: SchedulerMixin, t: torch.Tensor | int, like: torch.Tensor, abar: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """sqrt(abar_t) and sqrt(1 - abar_t), [B or 1, 1, 1, 1], in the dtype of the pictures `like`."""
    check_betas(scheduler)
    if abar is None:
        abar = scheduler.alphas_cumprod.to(like.device)[t]
    abar = abar.to(like).reshape(-1, *[1] * (like.dim() - 1))
    return abar.sqrt(), (1 - abar).sqrt()


def _unknown(kind: str) -> ValueError:
    return ValueError(f"unknown prediction_type {kind!r}; known: {', '.join(PREDICTIONS)}")
