"""Training as generators: `train` a dense model, `finetune` a sparse student with knowledge transferred from its teacher.

Every random draw of a step comes from (seed, step) alone, so a run that was killed and resumed ends with the same weights,
bit for bit on one CPU, as one that was not.
"""

import contextlib
import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import SchedulerMixin
from diffusers.models.embeddings import LabelEmbedding
from diffusers.training_utils import EMAModel
from torch import nn
from torch.utils.data import DataLoader, Dataset

from .. import data as data_module
from .. import diffusion
from ..masking import layers
from ..models import denoisers
from ..models.denoisers import Denoiser, Inputs, each
from ..support import processes, seeds
from ..support.files import sweep
from . import recovery
from .checkpoint import CHECKPOINT, TrainConfig, Training


@dataclass
class TrainState:
    """The state of a training run, which `train` and `finetune` yield after every step.

    Attributes:
        step: the number of this step, from 1.
        steps: how many steps the run has.
        loss: the weighted loss of this step, mean over the batch of this process.
        terms: the unweighted terms of the loss: "noise", and "teacher" with a teacher.
        lr: the learning rate of this step.
        seconds: duration of this step, without the loading of its batch.
        model: the model with its raw weights, not averaged.
        ema: the moving average of the weights.
    """

    step: int
    steps: int
    loss: float
    terms: dict[str, float]
    lr: float
    seconds: float
    model: nn.Module
    ema: EMAModel = field(repr=False)

    def ema_model(self) -> nn.Module:
        """A copy of the model with the averaged weights, in eval mode, to sample from."""
        model = copy.deepcopy(self.model).eval()
        self.ema.copy_to(model.parameters())
        return recovery.fold_scales(model)


def train(model: nn.Module, data: str | Dataset, **options) -> Iterator[TrainState]:
    """Train a dense model (a teacher, or a baseline) from its present weights; arguments as `finetune` without a teacher."""
    return _run(model, None, data, **options)


def finetune(student: nn.Module, teacher: nn.Module | None, data: str | Dataset, **options) -> Iterator[TrainState]:
    """Fine-tune `student` in place by distillation, yielding a `TrainState` after every step (SparseDM 3.3, arXiv 2404.10445).

    loss = noise_weight * MSE(target, student) + teacher_weight * MSE(teacher, student), means over pixels and batch. Student
    and EMA start from the student's present weights (the teacher's weights, if the student is a sparsified copy); the teacher
    is in eval mode and gets no gradient. When the generator is exhausted, `student` holds the EMA weights, in eval mode.

    Args:
        student: the model to train, sparse or dense.
        teacher: the model whose predictions the student learns, or None.
        data: a data set, or its name (`sparsedm.data.NAMES`) for pictures of the model's size. Items are (picture, label), or
            (picture, dict of the arguments that condition the model), such as {"encoder_hidden_states": [tokens, dim]}. Labels
            are dropped with `p_uncond`, and so are entries of the dict for which the data set's attribute `null`, a dict, has
            another value. The pictures of latent models are latents.
        scheduler: a diffusers scheduler with the noise schedule and prediction type; by default the `noise_schedule` in the
            student's config, else DDPM's linear schedule with noise prediction; rectified flow for SD3 and Flux.
        out: a folder for checkpoints; a run that finds its own checkpoint in the folder goes on from it. Closing the generator
            writes a checkpoint, too.
        **options: the fields of `TrainConfig`; `steps` is required.

    Raises:
        ValueError: a model that this package cannot call (`denoisers.FAMILIES`), or that predicts a variance and has no teacher;
            a bad option; a checkpoint in `out` that belongs to a run with other settings; data without what the model needs, with
            other channels or labels, or latents of another size.
        BlockingIOError: another process trains in `out`.
        FloatingPointError: the loss is not finite (names the step; the last checkpoint stays).
    """
    return _run(student, teacher, data, **options)


def _run(
    model: nn.Module,
    teacher: nn.Module | None,
    data: str | Dataset,
    *,
    scheduler: SchedulerMixin | None = None,
    out: str | Path | None = None,
    **options,
) -> Iterator[TrainState]:
    config = TrainConfig.of(options)
    denoisers.refuse_unknown(model, "train it in a loop of your own; sparsify, fold and save take it")
    dataset = data_module.load(data, size=denoisers.picture_size(model))
    scheduler = scheduler or diffusion.training_scheduler(model)
    _check_trainable(model, teacher, scheduler, config)
    check_data(model, dataset, config)
    for _, pattern in config.pattern_schedule:
        layers.set_pattern(model, pattern)  # all of them fit, or none is trained
    accelerator = processes.accelerator(config.mixed_precision)
    if config.batch_size % (accelerator.num_processes * config.accumulate):
        shares = f"{accelerator.num_processes} processes" + (f" in {config.accumulate} parts" if config.accumulate > 1 else "")
        raise ValueError(f"batch_size {config.batch_size} cannot be shared by {shares}")
    if teacher is not None:
        teacher.to(accelerator.device).eval()
    only = recovery.norms_only(model) if config.train_only else contextlib.nullcontext()
    with only, processes.claimed(out) if out else contextlib.nullcontext():
        yield from _steps(Training(_train_mode(model), config, accelerator), teacher, dataset, scheduler, out)


def _steps(
    training: Training, teacher: nn.Module | None, dataset: Dataset, scheduler: SchedulerMixin, out: str | Path | None
) -> Iterator[TrainState]:
    """Take up the checkpoint in `out`, if there is one, and go on to the last step.

    The contract of the loop. For the images [B, C, H, W] and labels of the global batch, a step is
        draw     images, noise [b, C, H, W], t [b], conditioning: this process's b = B / processes pictures (some mirrored),
                 their noise, timesteps, and a dict of the model's other arguments (some dropped). Every random number in the
                 step, dropout's too, follows from (seed, step).
        terms    x_t = add_noise(images, noise, t), and scalars, means over b, C, H, W:
                 "noise"    MSE(student(x_t, t), target); the target is the noise, the velocity, the picture or the flow.
                 "teacher"  MSE(student(x_t, t), teacher(x_t, t)), a predicted variance included; only with a teacher.
        loss     noise_weight * "noise" + teacher_weight * "teacher"; its gradients are averaged over the `accumulate` parts
                 of b and over the processes. A loss that is not finite ends the run before the weights change.
        update   clip, step of the optimisers, of their learning rates and of the decoupled decay, then the EMA.
    """
    model, config, accelerator = training.model, training.config, training.accelerator
    checkpoint = Path(out, CHECKPOINT) if out else None
    start = training.resume(checkpoint) if checkpoint and checkpoint.exists() else 0
    if checkpoint and accelerator.is_main_process:
        sweep(checkpoint.parent)
    draw = StepDraw(model, scheduler, config, accelerator, getattr(dataset, "null", None))
    denoiser = denoisers.of(model)
    batches = data_module.StepSampler(len(dataset), config.batch_size, config.seed, start, config.steps)
    loader = DataLoader(dataset, batch_sampler=batches, num_workers=config.workers, generator=torch.Generator())
    for step, (images, labels) in enumerate(loader, start + 1):
        began = time.perf_counter()
        _apply_pattern(model, config.pattern_schedule, step - 1)
        with draw.random_stream(step - 1):
            batch = draw(images, labels)
            terms = _accumulate(lambda part: _losses(denoiser, training.prepared, teacher, scheduler, *part), batch, training)
        loss = _weighted(config, terms)
        if not math.isfinite(loss):
            kept = f"; the last checkpoint is {checkpoint}" if checkpoint and checkpoint.exists() else ""
            raise FloatingPointError(f"the loss is {loss} at step {step}; start anew with a lower lr{kept}")
        lr = training.update()
        if checkpoint and accelerator.is_main_process and (step % config.checkpoint_every == 0 or step == config.steps):
            training.save(checkpoint, step)
        try:
            yield TrainState(step, config.steps, loss, terms, lr, time.perf_counter() - began, model, training.ema)
        except GeneratorExit:  # the caller stopped: nothing is lost
            if checkpoint and accelerator.is_main_process:
                training.save(checkpoint, step)
            raise
    _apply_pattern(model, config.pattern_schedule, config.steps)
    training.ema.copy_to(model.parameters())
    model.eval()


def _accumulate(losses: Callable[..., dict[str, torch.Tensor]], batch: tuple, training: Training) -> dict[str, float]:
    """Add the gradients of the weighted losses of all parts of a batch; returns the terms, means over the parts."""
    accelerator, count, means = training.accelerator, training.config.accumulate, {}
    layers.set_loss_scale(training.model, (accelerator.scaler.get_scale() if accelerator.scaler else 1.0) / count)
    for i, part in enumerate(_parts(batch, count)):
        exchange = accelerator.no_sync(training.prepared) if i < count - 1 else contextlib.nullcontext()
        with exchange:
            with accelerator.autocast():
                terms = losses(part)
            accelerator.backward(_weighted(training.config, terms) / count)
        for name, value in terms.items():
            means[name] = means.get(name, 0) + value.item() / count
    return means


def _weighted(config: TrainConfig, terms: Mapping):
    """The loss of `terms`: a tensor if the terms are tensors, a number if they are numbers."""
    return config.noise_weight * terms["noise"] + config.teacher_weight * terms.get("teacher", 0)


def _parts(batch: tuple, count: int) -> Iterator[tuple]:
    """`count` equal parts of a batch (images, noise, t, conditioning), cut along its first axis."""
    *tensors, conditioning = batch
    size = len(tensors[0]) // count
    for start in range(0, count * size, size):
        part = slice(start, start + size)
        yield *(x[part] for x in tensors), each(lambda x, part=part: x[part], conditioning)


def _check_trainable(model: nn.Module, teacher: nn.Module | None, scheduler: SchedulerMixin, config: TrainConfig) -> None:
    name = type(model).__name__
    if denoisers.of(model).flow and not diffusion.is_flow(scheduler):
        raise ValueError(f"{name} predicts a flow; pass a FlowMatchEulerDiscreteScheduler, not a {type(scheduler).__name__}")
    if denoisers.predicts_variance(model) and (teacher is None or not config.teacher_weight):
        raise ValueError(f"{name} predicts a variance, too, which only a teacher can train here; use finetune with one")
    if config.gradient_checkpointing and not hasattr(model, "enable_gradient_checkpointing"):
        raise ValueError(f"{name} has no enable_gradient_checkpointing(); leave gradient_checkpointing out")


def check_data(model: nn.Module, dataset: Dataset, config: TrainConfig) -> None:
    """Raise ValueError, with the remedy, for pictures, latents or classes that do not fit the model."""
    name, null, classes = type(model).__name__, denoisers.null_label(model), len(getattr(dataset, "classes", ()))
    try:
        expected, channels = denoisers.of(model).shape(model)[0], dataset[0][0].shape[0]
    except ValueError:  # the config does not tell
        expected = channels = 0
    if expected != channels:
        remedy = "; sparsedm.data.latents.encode makes latents of pictures" if expected == 4 else ""
        raise ValueError(f"{name} takes pictures of {expected} channels, those of the data set have {channels}{remedy}")
    stored, size = isinstance(dataset, data_module.Latents), denoisers.picture_size(model)
    if stored and size and dataset[0][0].shape[1:] != (size, size):
        found = "x".join(map(str, dataset[0][0].shape[1:]))
        remedy = "encode pictures of another size, or take another model"
        raise ValueError(f"{name} takes latents of {size}x{size}, {dataset.folder} holds {found}; {remedy}")
    if null is not None and classes > null + (not config.p_uncond):
        where = f" in {dataset.folder}; take a model with more classes, or encode with other labels" if stored else ""
        remedy = "; set p_uncond=0 if its last label is a class, too" if classes == null + 1 else ""
        raise ValueError(f"{name} has {null} classes and a label for none, the data set {classes}{where}{remedy}")


def _train_mode(model: nn.Module) -> nn.Module:
    model.train()
    for module in model.modules():
        if isinstance(module, LabelEmbedding):  # else each block of a DiT would drop other labels, and the teacher none
            module.eval()
    return model


def _apply_pattern(model: nn.Module, schedule: Sequence[tuple[int, str]], step: int) -> None:
    due = [pattern for start, pattern in schedule if start <= step]
    if due:
        layers.set_pattern(model, due[-1])


class StepDraw:
    """The random part of a step: flips, label dropout, timesteps, noise.

    Drawn for the global batch and then cut to this process's share, so the number of processes does not matter.
    """

    def __init__(
        self,
        model: nn.Module,
        scheduler: SchedulerMixin,
        config: TrainConfig,
        accelerator: Accelerator,
        nothing: Inputs | None = None,
    ):
        self.nothing = nothing or {}  # the arguments that mean "no condition"
        self.model, self.scheduler, self.config, self.accelerator = model, scheduler, config, accelerator
        self.null = denoisers.null_label(model)

    @contextlib.contextmanager
    def random_stream(self, step: int) -> Iterator[None]:
        """Within this context torch's generators (dropout's too) follow from (seed, step); afterwards they are as before."""
        with torch.random.fork_rng():
            torch.manual_seed(seeds.numbered(self.config.seed, step) * 997)
            yield

    def __call__(self, images: torch.Tensor, labels: torch.Tensor | Inputs) -> tuple[torch.Tensor, ...]:
        """This process's share of the global batch: images and noise [b, C, H, W], timesteps t [b], conditioning [b, ...]."""
        n = len(images)
        if self.config.flip:
            flipped = torch.rand(n).view(-1, *[1] * (images.dim() - 1)) < 0.5
            images = torch.where(flipped, images.flip(-1), images)
        conditioning = self._conditioning(labels, n)
        t = diffusion.draw_timesteps(self.scheduler, n)
        noise = torch.randn(images.shape)
        share = slice(self.accelerator.process_index, None, self.accelerator.num_processes)
        device = self.accelerator.device
        images, noise, t = (x[share].to(device) for x in (images, noise, t))
        return images, noise, t, each(lambda x: x[share].to(device), conditioning)

    def _conditioning(self, labels: torch.Tensor | Inputs, n: int) -> Inputs:
        if isinstance(labels, Mapping):
            conditioning = dict(labels)
            dropped = torch.rand(n) < self.config.p_uncond if self.nothing else None
            for name, value in self.nothing.items():
                conditioning[name] = torch.where(dropped.view(-1, *[1] * value.dim()), value, conditioning[name])
        elif self.null is not None:
            asked = torch.where(torch.rand(n) < self.config.p_uncond, self.null, labels)
            if wrong := asked[(asked < 0) | (asked > self.null)].tolist():  # of data that does not tell its classes
                raise ValueError(f"the data has the label {wrong[0]}, the model those from 0 to {self.null}; change the labels")
            conditioning = {"class_labels": asked}
        else:
            conditioning = {}
        denoisers.require(self.model, conditioning, "let the data set yield (picture, {argument: value, ...})")
        return conditioning


def _losses(denoiser: Denoiser, model, teacher, scheduler, images, noise, t, conditioning: Inputs) -> dict[str, torch.Tensor]:
    """The terms of the loss, scalars: "noise", and "teacher" if there is a teacher."""
    noisy = diffusion.add_noise(scheduler, images, noise, t)
    output = denoiser.predict(model, noisy, t, conditioning).float()
    mean = output[:, : images.shape[1]]  # [b, C, H, W]; the further channels are a variance, which only the teacher trains
    terms = {"noise": F.mse_loss(mean, diffusion.target(scheduler, images, noise, t).float())}
    if teacher is not None:
        with torch.no_grad():
            expected = denoiser.predict(teacher, noisy, t, conditioning)
        terms["teacher"] = F.mse_loss(output, expected.float())
    return terms
