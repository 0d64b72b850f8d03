"""The sparse-training layers: the mask is derived from the dense master weight in every forward, and its gradient is SR-STE's."""

import torch
import torch.nn.functional as F
from torch import nn

from . import nm
from .nm import NMPattern

SR_STE_DECAY = 2e-4
DECAY_MODES = ("gradient", "decoupled")


class _SRSTE(torch.autograd.Function):
    """Masked weight forward; backward g + decay * (1 - mask) * w, straight through to kept and pruned entries alike."""

    @staticmethod
    def forward(ctx, weight: torch.Tensor, mask: torch.Tensor, decay: float) -> torch.Tensor:
        masked = nm.masked(weight, mask)
        ctx.decays = bool(decay)
        if decay:  # scaled here: torch.compile (2.13) loses a factor that is applied in backward by add's alpha
            ctx.save_for_backward((weight - masked).mul_(decay))
        return masked

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        return grad + ctx.saved_tensors[0] if ctx.decays else grad, None, None


class NMLayer:
    """What NMLinear and NMConv2d share.

    Attributes:
        pattern: N:M of the weight.
        decay: lambda of SR-STE.
        decay_mode: one of `DECAY_MODES`.
        loss_scale: the factor by which the loss is multiplied before it goes backward (`set_loss_scale`).
        frozen_mask: the mask that no longer follows the weight, or None.
        called: whether the forward has run.
    """

    pattern: NMPattern
    decay: float
    decay_mode: str
    loss_scale: float = 1.0
    frozen_mask: torch.Tensor | None
    called: bool = False

    def mask(self) -> torch.Tensor:
        """Boolean mask of the current weight, or the frozen one."""
        return nm.mask(self.weight, self.pattern) if self.frozen_mask is None else self.frozen_mask

    def freeze_mask(self) -> None:
        """Keep the current weight's mask from now on."""
        self.register_buffer("frozen_mask", nm.mask(self.weight, self.pattern), persistent=False)

    def masked_weight(self) -> torch.Tensor:
        """The weight the layer computes with: exact zeros outside the mask, SR-STE gradient to the dense master.

        SparseDM 3.2 (arXiv 2404.10445), after SR-STE (arXiv 2102.04010): dL/dw = dL/dw_masked + decay * (1 - mask) * w.
        """
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            decay = self.decay * self.loss_scale if self.decay_mode == "gradient" else 0.0
            return _SRSTE.apply(self.weight, self.mask(), decay)
        with torch.inference_mode(False), torch.no_grad():
            masked = nm.masked(self.weight.detach(), self.mask()).requires_grad_(self.weight.requires_grad)
            return masked.view_as(masked)  # autocast keeps its casts of leaves, but not of views

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, pattern={self.pattern}, decay={self.decay:g}"


class NMLinear(NMLayer, nn.Linear):
    """`nn.Linear` whose weight is masked N:M along the input features."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        self.called = True
        return F.linear(input, self.masked_weight(), self.bias)


class NMConv2d(NMLayer, nn.Conv2d):
    """`nn.Conv2d` whose weight is masked N:M along the input channels, at each kernel position by itself."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        self.called = True
        return self._conv_forward(input, self.masked_weight(), self.bias)


SPARSE_CLASS = {nn.Linear: NMLinear, nn.Conv2d: NMConv2d}
DENSE_CLASS = {sparse: dense for dense, sparse in SPARSE_CLASS.items()}


def to_sparse(module: nn.Module, pattern: NMPattern, decay: float, decay_mode: str) -> None:
    """Make a plain or sparse-training layer sparse-training, in place; the mask follows the weight."""
    module.__class__ = SPARSE_CLASS.get(type(module), type(module))
    module.pattern, module.decay, module.decay_mode = pattern, float(decay), decay_mode
    module.register_buffer("frozen_mask", None, persistent=False)


def to_plain(module: NMLayer) -> None:
    """Make a sparse-training layer plain, in place, with the dense master weight."""
    module.__class__ = DENSE_CLASS[type(module)]
    del module.pattern, module.decay, module.decay_mode, module.frozen_mask
    for name in ("loss_scale", "called"):
        module.__dict__.pop(name, None)
