"""Recovery after calibration: biases, norm parameters and a scale per output row are trained, the sparse weights stay.

After PERP (arXiv 2312.15230): so few parameters bring back most of what pruning cost. The scales are folded into the weights at
the end, so the model is as it was: zeros stay zeros, no key is added.
"""

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

from ..masking import layers

TRAIN_ONLY = ("", "norms")


class _Scaled:
    """A layer whose output is multiplied by `row_scale` [out] before its bias is added."""

    row_scale: nn.Parameter


class _ScaledLinear(_Scaled, nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.linear(input, self.weight * self.row_scale[:, None], self.bias)


class _ScaledConv2d(_Scaled, nn.Conv2d):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(input, self.weight * self.row_scale[:, None, None, None], self.bias)


_SCALED = {nn.Linear: _ScaledLinear, nn.Conv2d: _ScaledConv2d}
_PLAIN = {scaled: plain for plain, scaled in _SCALED.items()}


@contextlib.contextmanager
def norms_only(model: nn.Module) -> Iterator[None]:
    """Within it biases, norms' parameters and row scales alone get a gradient; at the end the scales are folded in.

    Raises:
        ValueError: a model in sparse training, whose weights are not settled yet.
    """
    if layers.is_sparse(model):
        raise ValueError('train_only="norms" keeps the sparse weights; calibrate or fold the model first')
    wanted = {id(p): p.requires_grad for p in model.parameters()}
    weights = {id(p) for module in model.modules() for p in _weights(module)}
    for p in model.parameters():
        p.requires_grad_(p.requires_grad and id(p) not in weights)
    for module in model.modules():
        if type(module) in _SCALED:
            module.row_scale = nn.Parameter(module.weight.new_ones(len(module.weight)))
            module.__class__ = _SCALED[type(module)]
    try:
        yield
    finally:
        fold_scales(model)
        for p in model.parameters():
            p.requires_grad_(wanted[id(p)])


def _weights(module: nn.Module) -> list[nn.Parameter]:
    """Parameters that are neither biases nor of a norm: those with two axes or more."""
    return [p for p in module.parameters(recurse=False) if p.dim() > 1]


@torch.no_grad()
def fold_scales(model: nn.Module) -> nn.Module:
    """Multiply the scales into the weights, if there are any, and take them away. Returns the model."""
    for module in model.modules():
        if isinstance(module, _Scaled):
            module.weight.mul_(module.row_scale.view(-1, *[1] * (module.weight.dim() - 1)))
            del module.row_scale
            module.__class__ = _PLAIN[type(module)]
    return model
