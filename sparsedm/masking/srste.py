"""The sparse-training layers: the sparse weight is derived from the dense master weight in every forward.

SR-STE masks the weight and lets the gradient decay what is pruned; S-STE shrinks all weights by the group's threshold, so that
nothing jumps where a mask changes. AST is SR-STE with the decay inside Adam's division (`training.ast`).
"""

import torch
import torch.nn.functional as F
from torch import nn

from . import nm
from .nm import NMPattern

SR_STE_DECAY = 2e-4
DECAY_MODES = ("gradient", "decoupled", "adam")
ESTIMATORS = ("sr-ste", "s-ste")


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


class _Straight(torch.autograd.Function):
    """`value` forward; its gradient goes to `weight` as it is."""

    @staticmethod
    def forward(ctx, weight: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return value

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        return grad, None


class NMLayer:
    """What NMLinear and NMConv2d share.

    Attributes:
        pattern: N:M of the weight.
        decay: lambda of SR-STE.
        decay_mode: one of `DECAY_MODES`.
        soft_scale: beta of S-STE, by which the shrunk weights are multiplied; None for SR-STE.
        loss_scale: the factor by which the loss is multiplied before it goes backward (`set_loss_scale`).
        frozen_mask: the mask that no longer follows the weight, or None.
        called: whether the forward has run.
    """

    pattern: NMPattern
    decay: float
    decay_mode: str
    soft_scale: float | None = None
    loss_scale: float = 1.0
    frozen_mask: torch.Tensor | None
    called: bool = False

    def mask(self) -> torch.Tensor:
        """Boolean mask of the current weight, or the frozen one."""
        return nm.mask(self.weight, self.pattern) if self.frozen_mask is None else self.frozen_mask

    def freeze_mask(self) -> None:
        """Keep the current weight's mask from now on."""
        self.register_buffer("frozen_mask", nm.mask(self.weight, self.pattern), persistent=False)

    def sparse_weight(self) -> torch.Tensor:
        """The weight the layer computes with, without a gradient: exact zeros outside the mask."""
        weight = self.weight.detach()
        if self.soft_scale is not None:
            return nm.soft_threshold(weight, self.pattern).mul_(self.soft_scale)
        return nm.masked(weight, self.mask())

    def masked_weight(self) -> torch.Tensor:
        """`sparse_weight` with a gradient to the dense master weight.

        SparseDM 3.2 (arXiv 2404.10445), after SR-STE (arXiv 2102.04010): dL/dw = dL/dw_masked + decay * (1 - mask) * w. With
        S-STE (arXiv 2409.09099): dL/dw = dL/dw_sparse.
        """
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            if self.soft_scale is not None:
                return _Straight.apply(self.weight, self.sparse_weight())
            decay = self.decay * self.loss_scale if self.decay_mode == "gradient" else 0.0
            return _SRSTE.apply(self.weight, self.mask(), decay)
        with torch.inference_mode(False), torch.no_grad():
            masked = self.sparse_weight().requires_grad_(self.weight.requires_grad)
            return masked.view_as(masked)  # autocast keeps its casts of leaves, but not of views

    def soften(self) -> None:
        """Compute with S-STE from now on: beta = <w, S(w)> / <S(w), S(w)> of the present weight."""
        weight = self.weight.detach().double()
        shrunk = nm.soft_threshold(weight, self.pattern)
        self.soft_scale = float((weight * shrunk).sum() / shrunk.square().sum().clamp_min(1e-30))

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
    module.__dict__.pop("soft_scale", None)
    module.register_buffer("frozen_mask", None, persistent=False)


def to_plain(module: NMLayer) -> None:
    """Make a sparse-training layer plain, in place, with the dense master weight."""
    module.__class__ = DENSE_CLASS[type(module)]
    del module.pattern, module.decay, module.decay_mode, module.frozen_mask
    for name in ("loss_scale", "called", "soft_scale"):
        module.__dict__.pop(name, None)
