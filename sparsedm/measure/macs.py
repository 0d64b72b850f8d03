"""Multiply-accumulate counts: dense, theoretical sparse, and the multiplications that the present backend executes.

One dry run (`models.dryrun`) finds how often each layer runs, and torch's `FlopCounterMode` counts all products. Convolutions,
linear layers and attention products count; norms, activations and biases do not (the papers' and the counter's convention,
where 1 MAC is 2 FLOPs). Attention is written out for the counter, which counts fused attention on CPUs as 0 in torch 2.13.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..masking import layers, nm
from ..models import dryrun
from ..packing.packed import is_packed


@dataclass(frozen=True)
class LayerMacs:
    """The MACs of one layer per image.

    Attributes:
        name: the module's name.
        dense: MACs with all weights.
        pattern: the N:M pattern that the weights satisfy; None for a dense layer.
        executed_share: share (0 to 1) of the dense MACs that the layer's kernel executes.
    """

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
        """MACs that the kernel in use executes: dense kernels multiply the zeros, too."""
        return round(self.dense * self.executed_share)


@dataclass(frozen=True)
class Macs:
    """MACs of one model call per image.

    Attributes:
        layers: the linear layers and convolutions.
        attention: MACs outside of the layers: attention products, and weights that no layer's forward uses (UNet1DModel's fixed
            resampling kernels).
    """

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
    counter, modules = FlopCounterMode(display=False), dict(model.named_modules())
    with sdpa_kernel(SDPBackend.MATH):
        positions = dryrun.positions(model, inputs, counter)
    patterns = layers.patterns(model) | {n: m.pattern for n, m in modules.items() if is_packed(m)}
    counted = tuple(_layer(name, modules[name], n, patterns.get(name)) for name, n in positions.items())
    plain = sum(layer.dense for layer in counted if not is_packed(modules[layer.name]))  # the counter sees no packed kernels
    return Macs(counted, counter.get_total_flops() // 2 - plain)


def _layer(name: str, module: nn.Module, positions: int, pattern: nm.NMPattern | None) -> LayerMacs:
    executed = pattern.density if is_packed(module) else 1.0
    return LayerMacs(name, module.weight.shape.numel() * positions, pattern, executed)
