"""The settings of a training run, and its state, which changes from step to step, is saved and taken up again."""

import dataclasses
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from accelerate import Accelerator
from diffusers.optimization import SchedulerType, get_scheduler
from diffusers.training_utils import EMAModel
from torch import nn

from ..masking import layers, nm
from ..masking.dense import default_rule
from ..masking.plain import weight_layers
from ..support import fields
from ..support.fields import Count, NonNegative, Range, Seed, Share
from ..support.files import replacing
from .ast import AST
from .recovery import TRAIN_ONLY

CHECKPOINT = "checkpoint.pt"
OPTIMIZERS = ("adamw", "muon")
LR_SCHEDULES = tuple(kind.value for kind in SchedulerType if kind is not SchedulerType.PIECEWISE_CONSTANT)  # it needs rules
_FREE = ("accumulate", "gradient_checkpointing", "compile", "checkpoint_every", "workers")  # these may change in a run


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a run; `steps` and what follows are keyword arguments of `train` and `finetune`.

    Attributes:
        steps: steps of the whole run.
        batch_size: pictures per step, over all processes.
        optimizer: "adamw", or "muon" (torch.optim.Muon on the hidden linear weights, AdamW on the rest).
        lr: learning rate of either optimiser.
        betas: decay of AdamW's first and second moments.
        weight_decay: of either optimiser.
        lr_schedule: diffusers' name ("constant_with_warmup" is the papers', "cosine").
        warmup: steps of linear warm-up.
        clip: largest gradient norm, 0 for no limit.
        ema_decay: the decay d of the moving average (EMA) of the dense master weights. After s steps it is diffusers' ramp
            min(d, (1 + s) / (10 + s)), and 0 at the first step, not the constant d of the official codes: 0.999 is reached
            after 8,990 steps, 0.9999 after 89,990.
        p_uncond: how often a label is replaced by the "no class" one, for classifier-free guidance.
        flip: mirror half of the pictures.
        noise_weight: weight of the loss's noise term (SparseDM 3.3: 1).
        teacher_weight: weight of the loss's teacher term (SparseDM 3.3: 0.1).
        train_only: "" trains all parameters; "norms" the norms', the biases and a scale per output row, which is folded into
            the weights at the end: recovery of a calibrated model, whose weights and zeros stay.
        pattern_schedule: ((step, "31:32"), ...): the student's pattern from that step on, with the same weights and optimiser.
        seed: of all random draws, 0 to 2**32 - 1.
        mixed_precision: "no", "fp16" or "bf16".
        accumulate: parts in which each process takes its share of a batch, one after the other, to save memory.
        gradient_checkpointing: compute activations twice instead of keeping them.
        compile: torch.compile the model.
        checkpoint_every: steps between checkpoints.
        workers: processes of the data loader.

    A resumed run may change the last five. Values of another type, not finite or out of range are ValueErrors.
    """

    steps: Count
    batch_size: Count = 64
    optimizer: Literal[OPTIMIZERS] = "adamw"
    lr: NonNegative = 2e-4
    betas: tuple[Share, Share] = (0.9, 0.999)
    weight_decay: NonNegative = 0.0
    lr_schedule: Literal[LR_SCHEDULES] = "constant_with_warmup"
    warmup: Annotated[int, Range(0)] = 0
    clip: NonNegative = 1.0
    ema_decay: Share = 0.999
    p_uncond: Share = 0.1
    flip: bool = False
    noise_weight: NonNegative = 1.0
    teacher_weight: NonNegative = 0.1
    train_only: Literal[TRAIN_ONLY] = ""
    pattern_schedule: tuple[tuple[Annotated[int, Range(0)], str], ...] = ()
    seed: Seed = 0
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    accumulate: Count = 1
    gradient_checkpointing: bool = False
    compile: bool = False
    checkpoint_every: Count = 500
    workers: Annotated[int, Range(0)] = 0

    def __post_init__(self):
        fields.check(self)
        starts = [step for step, _ in self.pattern_schedule]
        if starts != sorted(set(starts)):
            raise ValueError(f"pattern_schedule steps must increase, they are {starts}")
        for _, pattern in self.pattern_schedule:
            nm.NMPattern.sparse(pattern)

    @classmethod
    def of(cls, options: dict) -> "TrainConfig":
        """Settings by name. Raises ValueError for an unknown name, with the known names, or for a value out of range."""
        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(set(options) - set(known)):
            raise ValueError(f"unknown training setting {unknown[0]!r}; known: {', '.join(known)}")
        return cls(**options)

    def identity(self) -> dict:
        """The settings that must be equal for a checkpoint to be resumed."""
        values = json.loads(json.dumps(dataclasses.asdict(self)))  # tuples and lists are the same
        return {k: v for k, v in values.items() if k not in _FREE}


_DEFAULTS = {field.name: field.default for field in dataclasses.fields(TrainConfig)}  # for what older checkpoints do not know


class Training:
    """Everything of a run that changes from step to step: weights, their average, optimisers, learning rates."""

    def __init__(self, model: nn.Module, config: TrainConfig, accelerator: Accelerator):
        self.model, self.config, self.accelerator = model.to(accelerator.device), config, accelerator
        if config.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        self.ema = EMAModel(model.parameters(), decay=config.ema_decay, foreach=True)
        self.optimizers = make_optimizers(model, config)
        self.lr_schedulers = [
            get_scheduler(config.lr_schedule, optimizer, num_warmup_steps=config.warmup, num_training_steps=config.steps)
            for optimizer in self.optimizers
        ]
        self.prepared, *self.steppers = accelerator.prepare(model, *self.optimizers)
        if config.compile:
            self.prepared = torch.compile(self.prepared)

    def update(self) -> float:
        """One optimiser step with the gradients that have been summed up; returns the learning rate of this step."""
        if self.config.clip:
            self.accelerator.clip_grad_norm_(self.prepared.parameters(), self.config.clip)
        lr = self.lr_schedulers[0].get_last_lr()[0]
        for optimizer in self.steppers:
            optimizer.step()
            optimizer.zero_grad()
        for lr_scheduler in self.lr_schedulers:
            lr_scheduler.step()
        layers.decay_pruned(self.model, lr)
        self.ema.step(self.model.parameters())
        return lr

    def _stateful(self) -> list:
        return [self.model, self.ema, *self.optimizers, *self.lr_schedulers]

    def save(self, path: Path, step: int) -> None:
        content = {"step": step, "config": self.config.identity(), "states": [x.state_dict() for x in self._stateful()]}
        if self.accelerator.scaler:
            content["scaler"] = self.accelerator.scaler.state_dict()
        with replacing(path) as temporary:
            torch.save(content, temporary)

    def resume(self, path: Path) -> int:
        """Take up a checkpoint and return its step. Raises ValueError, with the reason, if the checkpoint does not fit."""
        content = _read(path)
        saved = _DEFAULTS | content["config"]
        other = [f"{k} {saved.get(k)!r} instead of {v!r}" for k, v in self.config.identity().items() if saved.get(k) != v]
        if other:
            raise ValueError(f"{path} belongs to a run with {', '.join(other)}; use another folder or the same settings")
        try:
            step = self._take(content)
        except Exception as error:  # of any kind: torch and diffusers hardly check what they are given
            raise ValueError(
                f"{path} is not of this model ({error!r}); use another folder, or remove it to start anew"
            ) from error
        self.ema.to(self.accelerator.device)
        return step

    def _take(self, content: dict) -> int:
        model, ema, *others = content["states"]
        optimizers = [_fitted(state, optimizer) for optimizer, state in zip(self.optimizers, others, strict=False)]
        parameters = list(self.model.parameters())
        ema["shadow_params"] = [_like(p, value, "the average") for p, value in zip(parameters, ema["shadow_params"], strict=True)]
        states = [model, ema, *optimizers, *others[len(optimizers) :]]
        for part, state in zip(self._stateful(), states, strict=True):
            part.load_state_dict(state)
        if self.accelerator.scaler and "scaler" in content:
            self.accelerator.scaler.load_state_dict(content["scaler"])
        return int(content["step"])


def _read(path: Path) -> dict:
    """The content of a checkpoint, checked by the CRC-32 of each record, which torch.save writes and torch.load ignores."""
    try:
        with zipfile.ZipFile(path) as file:
            if damaged := file.testzip():
                raise ValueError(f"{damaged} is damaged")
        content = torch.load(path, map_location="cpu", weights_only=True)
        if not all(isinstance(content[key], kind) for key, kind in (("config", dict), ("states", list), ("step", int))):
            raise ValueError("it holds other things")
    except Exception as error:  # of any kind: zip files and pickles have many
        raise ValueError(f"{path} is not a readable checkpoint ({error}); remove it to start anew") from error
    return content


_MOMENTS = {"step", "exp_avg", "exp_avg_sq"}
_STATE = {torch.optim.AdamW: _MOMENTS, AST: _MOMENTS, torch.optim.Muon: {"momentum_buffer"}}


def _fitted(state: dict, optimizer: torch.optim.Optimizer) -> dict:
    """The state of an optimizer with tensors like its parameters: its kernels read as many numbers as the parameters have.

    The learning rates come from the saved settings; the other settings are the run's.
    """
    groups, parameters = optimizer.state_dict()["param_groups"], [p for group in optimizer.param_groups for p in group["params"]]
    if [group["params"] for group in groups] != [group["params"] for group in state["param_groups"]]:
        raise ValueError("its optimizer has other parameters")
    rates = [{key: group[key] for key in ("lr", "initial_lr")} for group in state["param_groups"]]
    entries = {}
    for i, entry in state["state"].items():
        if set(entry) != _STATE[type(optimizer)]:
            raise ValueError(f"its optimizer keeps {', '.join(entry)} of parameter {i}")
        like = {"step": torch.zeros(())}
        entries[i] = {key: _like(like.get(key, parameters[i]), value, f"{key} of parameter {i}") for key, value in entry.items()}
    return {"state": entries, "param_groups": [group | rate for group, rate in zip(groups, rates, strict=True)]}


def _like(parameter: torch.Tensor, value: torch.Tensor, name: str) -> torch.Tensor:
    """A copy of `value` with the parameter's dtype and strides. Raises ValueError if `value` is of another shape."""
    if value.shape != parameter.shape:
        raise ValueError(f"{name} has shape {list(value.shape)}, not {list(parameter.shape)}")
    return torch.empty_like(parameter, device="cpu", requires_grad=False).copy_(value)


def make_optimizers(model: nn.Module, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """AdamW for all parameters but these: Muon's, the linear layers that `masking.dense` lets be sparse; AST's, by decay_mode."""
    inside = [layer for _, layer in layers.nm_layers(model) if layer.decay_mode == "adam"]
    taken, hidden = {id(layer.weight) for layer in inside}, {}
    if config.optimizer == "muon":
        excluded = default_rule(model)
        linears = [(n, m) for n, m in weight_layers(model) if isinstance(m, nn.Linear) and id(m.weight) not in taken]
        hidden = {id(m.weight): m.weight for n, m in linears if not excluded(n)}
    rest = [p for p in model.parameters() if id(p) not in hidden.keys() | taken]
    optimizers = [torch.optim.AdamW(rest, config.lr, config.betas, weight_decay=config.weight_decay, fused=True)]
    if hidden:  # this scaling gives Muon's update the size of AdamW's, so that one learning rate serves both
        optimizers.append(torch.optim.Muon(hidden.values(), config.lr, config.weight_decay, adjust_lr_fn="match_rms_adamw"))
    if inside:
        optimizers.append(AST(inside, config.lr, config.betas, config.weight_decay, rise=config.steps // 4))
    return optimizers
