"""Multiply-accumulate counts: dense, theoretical sparse, and what the present backend really executes.

One dry run on the meta device finds how often each layer runs; no arithmetic is done. Convolutions, linear layers and
attention products count; norms, activations and biases do not (the papers' and torch.utils.flop_counter's convention, where
1 MAC is 2 FLOPs). `FlopCounterMode` itself counts CPU attention as 0 in torch 2.13.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from ..masking import layers, nm
from ..models import dryrun
from ..packing.packed import is_packed


@dataclass(frozen=True)
class LayerMacs:
    """One layer, per image: dense MACs, the pattern its weights satisfy, and the share its kernel executes."""

    name: str
    dense: int
    pattern: nm.NMPattern | None = None
    executed_share: float = 1.0

    @property
    def sparse(self) -> int:
        """MACs with a nonzero weight if every group is full: dense * N / M."""
        return round(self.dense * self.pattern.density) if self.pattern else self.dense

    @property
    def executed(self) -> int:
        """MACs that the kernel in use does: dense kernels multiply the zeros too."""
        return round(self.dense * self.executed_share)


@dataclass(frozen=True)
class Macs:
    """MACs of one model call per image. `attention` is the part of the totals spent on attention products."""

    layers: tuple[LayerMacs, ...]
    attention: int

    @property
    def dense(self) -> int:
        return sum(layer.dense for layer in self.layers) + self.attention

    @property
    def sparse(self) -> int:
        return sum(layer.sparse for layer in self.layers) + self.attention

    @property
    def executed(self) -> int:
        return sum(layer.executed for layer in self.layers) + self.attention

    @property
    def by_name(self) -> dict[str, LayerMacs]:
        return {layer.name: layer for layer in self.layers}

    @staticmethod
    def calls(steps: int, guidance: float = 0.0) -> int:
        """Model calls per image in a sampling run: guidance needs two a step."""
        return steps * (2 if guidance else 1)


def count(model: nn.Module, inputs: Mapping[str, torch.Tensor] | None = None) -> Macs:
    """Count one call of `model` on one image.

    Args:
        inputs: keyword arguments of a call with batch size 1; by default made from the config of a diffusers 2-D model.

    Raises:
        ValueError: no `inputs` and a config that does not tell the input's shape.
    """
    attention, modules = _AttentionCounter(), dict(model.named_modules())
    positions = dryrun.positions(model, inputs, attention)
    found = layers.patterns(model) | {n: m.pattern for n, m in modules.items() if is_packed(m)}
    counted = (_layer(name, modules[name], n, found.get(name)) for name, n in positions.items())
    return Macs(tuple(counted), attention.macs)


def _layer(name: str, module: nn.Module, positions: int, pattern: nm.NMPattern | None) -> LayerMacs:
    if is_packed(module):
        return LayerMacs(name, math.prod(module.weight_shape) * positions, pattern, pattern.density)
    return LayerMacs(name, module.weight.numel() * positions, pattern)


class _AttentionCounter(TorchFunctionMode):
    """Counts products of two activations: fused attention, and matmul, bmm or baddbmm written out."""

    _PRODUCTS = (torch.matmul, torch.bmm, torch.Tensor.matmul, torch.Tensor.bmm, torch.Tensor.__matmul__)

    def __init__(self):
        super().__init__()
        self.macs = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            names = ("query", "key", "value")
            query, key, value = (kwargs[n] if n in kwargs else args[i] for i, n in enumerate(names))
            self.macs += query.numel() * key.shape[-2] + output.numel() * value.shape[-2]
        elif func in self._PRODUCTS:
            self.macs += output.numel() * args[0].shape[-1]
        elif func in (torch.baddbmm, torch.Tensor.baddbmm):
            self.macs += output.numel() * args[1].shape[-1]
        return output
