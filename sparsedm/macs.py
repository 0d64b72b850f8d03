"""Multiply-accumulate counts: dense, theoretical sparse, and what the present backend really executes.

One dry run on the meta device finds how often each layer runs; no arithmetic is done. Convolutions, linear layers and
attention products count; norms, activations and biases do not (the papers' and torch.utils.flop_counter's convention, where
1 MAC is 2 FLOPs). `FlopCounterMode` itself counts CPU attention as 0 in torch 2.13.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from . import nm
from .diffusion import null_label
from .layers import densify, nm_layers, patterns


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
    found = patterns(model)
    inputs = {k: v.to("meta") for k, v in (inputs or example_inputs(model)).items()}
    shadow = _meta_copy(model)
    dense: dict[str, int] = {}
    attention = _AttentionCounter()
    with _layer_hooks(shadow, dense), attention, torch.no_grad():
        shadow(**inputs)
    return Macs(tuple(LayerMacs(name, n, found.get(name)) for name, n in dense.items()), attention.macs)


def example_inputs(model: nn.Module, batch: int = 1) -> dict[str, torch.Tensor]:
    """Zeros of the shapes that a 2-D diffusers denoiser takes: sample, timestep, class labels or text if it has them."""
    config = getattr(model, "config", None)
    size, channels = getattr(config, "sample_size", None), getattr(config, "in_channels", None)
    if size is None or channels is None:
        raise ValueError(f"{type(model).__name__} has no config.sample_size and in_channels; pass inputs={{...}}")
    height, width = (size, size) if isinstance(size, int) else size
    inputs = {"sample": torch.zeros(batch, channels, height, width), "timestep": torch.zeros(batch, dtype=torch.long)}
    if null_label(model) is not None:
        inputs["class_labels"] = torch.zeros(batch, dtype=torch.long)
    if getattr(config, "context_dim", None):
        inputs["encoder_hidden_states"] = torch.zeros(batch, config.context_tokens, config.context_dim)
    return inputs


def _meta_copy(model: nn.Module) -> nn.Module:
    """A copy without storage; sparse-training layers become plain ones of the same shape."""
    memo = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        empty = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    shadow = copy.deepcopy(model, memo)
    return densify(shadow) if any(True for _ in nm_layers(shadow)) else shadow


@contextmanager
def _layer_hooks(model: nn.Module, macs: dict[str, int]) -> Iterator[None]:
    def hook_for(name: str):
        def hook(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
            positions = output.numel() // output.shape[-1 if isinstance(module, nn.Linear) else 1]
            macs[name] = macs.get(name, 0) + module.weight.numel() * positions

        return hook

    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    handles = [m.register_forward_hook(hook_for(n)) for n, m in model.named_modules() if isinstance(m, kinds)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


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
