"""What a training run is made of: its settings, and all that changes from step to step, saved and taken up again."""

import dataclasses
import json
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import nn

from ..masking import layers
from ..support.files import replacing
from .recovery import TRAIN_ONLY

CHECKPOINT = "checkpoint.pt"
OPTIMIZERS = ("adamw", "muon")
_FREE = ("accumulate", "gradient_checkpointing", "compile", "checkpoint_every", "workers")  # the weights do not follow from them


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a run; `steps` and what follows are keyword arguments of `train` and `finetune`.

    Attributes:
        batch_size: pictures per step, over all processes.
        optimizer: "adamw", or "muon" (torch.optim.Muon on the hidden linear weights, AdamW on the rest).
        lr, betas, weight_decay: of either. lr_schedule: diffusers' name ("constant_with_warmup" is the papers', "cosine").
        warmup: steps of linear warm-up. clip: largest gradient norm, 0 for none.
        ema_decay: of the moving average of the dense master weights.
        p_uncond: how often a label is replaced by the "no class" one, for classifier-free guidance.
        flip: mirror half of the pictures.
        noise_weight, teacher_weight: of the two terms of the loss (SparseDM 3.3: 1 and 0.1).
        train_only: "" trains all parameters; "norms" the norms', the biases and a scale per output row, which is folded into
            the weights at the end: recovery of a calibrated model, whose weights and zeros stay.
        pattern_schedule: ((step, "31:32"), ...): from that step on the student's pattern, same weights and optimiser.
        accumulate: parts in which each process takes its share of a batch, one after the other, to save memory.
        gradient_checkpointing: compute activations twice instead of keeping them; compile: torch.compile the model.
        checkpoint_every: steps between checkpoints; workers: of the data loader. These and the line above may change between
            resumes.
    """

    steps: int
    batch_size: int = 64
    optimizer: str = "adamw"
    lr: float = 2e-4
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    lr_schedule: str = "constant_with_warmup"
    warmup: int = 0
    clip: float = 1.0
    ema_decay: float = 0.999
    p_uncond: float = 0.1
    flip: bool = False
    noise_weight: float = 1.0
    teacher_weight: float = 0.1
    train_only: str = ""
    pattern_schedule: tuple[tuple[int, str], ...] = ()
    seed: int = 0
    mixed_precision: str = "no"
    accumulate: int = 1
    gradient_checkpointing: bool = False
    compile: bool = False
    checkpoint_every: int = 500
    workers: int = 0

    def __post_init__(self):
        for name in ("steps", "batch_size", "accumulate", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, it is {getattr(self, name)}")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"unknown optimizer {self.optimizer!r}; known: {', '.join(OPTIMIZERS)}")
        if self.train_only not in TRAIN_ONLY:
            raise ValueError(f"unknown train_only {self.train_only!r}; known: {', '.join(map(repr, TRAIN_ONLY))}")
        starts = [step for step, _ in self.pattern_schedule]
        if starts != sorted(set(starts)):
            raise ValueError(f"pattern_schedule steps must increase, they are {starts}")

    @classmethod
    def of(cls, options: dict) -> "TrainConfig":
        """Settings by name. Raises ValueError for a name that is none, with the known ones."""
        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(set(options) - set(known)):
            raise ValueError(f"unknown training setting {unknown[0]!r}; known: {', '.join(known)}")
        return cls(**options)

    def identity(self) -> dict:
        """What must be equal for a checkpoint to be resumed."""
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
        self.optimizers = _make_optimizers(model, config)
        self.lr_schedulers = [
            get_scheduler(config.lr_schedule, optimizer, num_warmup_steps=config.warmup, num_training_steps=config.steps)
            for optimizer in self.optimizers
        ]
        self.prepared, *self.steppers = accelerator.prepare(model, *self.optimizers)
        if config.compile:
            self.prepared = torch.compile(self.prepared)

    def update(self) -> float:
        """One optimiser step with the gradients that have been summed up; returns the learning rate it had."""
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
        """Take up a checkpoint and return its step; a ValueError says why it cannot be taken up."""
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
            saved, states = _DEFAULTS | content["config"], content["states"]
        except Exception as error:
            raise ValueError(f"{path} is not a readable checkpoint ({error}); remove it to start anew") from error
        other = [f"{k} {saved.get(k)!r} instead of {v!r}" for k, v in self.config.identity().items() if saved.get(k) != v]
        if other:
            raise ValueError(f"{path} belongs to a run with {', '.join(other)}; use another folder or the same settings")
        for thing, state in zip(self._stateful(), states, strict=True):
            thing.load_state_dict(state)
        if self.accelerator.scaler and "scaler" in content:
            self.accelerator.scaler.load_state_dict(content["scaler"])
        self.ema.to(self.accelerator.device)
        return content["step"]


def _make_optimizers(model: nn.Module, config: TrainConfig) -> list[torch.optim.Optimizer]:
    hidden = {}
    if config.optimizer == "muon":
        edges = layers.default_exclude(type(model))
        linears = [(n, m) for n, m in layers.weight_layers(model) if isinstance(m, nn.Linear)]
        hidden = {id(m.weight): m.weight for n, m in linears if not any(fnmatchcase(n, glob) for glob in edges)}
    rest = [p for p in model.parameters() if id(p) not in hidden]
    adamw = torch.optim.AdamW(rest, config.lr, config.betas, weight_decay=config.weight_decay, fused=True)
    if not hidden:
        return [adamw]
    # This scaling gives Muon's update the size of AdamW's, so that one learning rate serves both.
    muon = torch.optim.Muon(hidden.values(), config.lr, config.weight_decay, adjust_lr_fn="match_rms_adamw")
    return [adamw, muon]
