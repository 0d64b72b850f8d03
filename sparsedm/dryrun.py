"""One call of a model without arithmetic, on the meta device: how often does each layer run?"""

import copy
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from .diffusion import null_label
from .layers import densify, nm_layers

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def positions(
    model: nn.Module, inputs: Mapping[str, torch.Tensor] | None = None, observer: AbstractContextManager | None = None
) -> dict[str, int]:
    """How many positions (tokens, pixels) each linear, convolution or packed layer computes in one call, by name.

    Args:
        inputs: keyword arguments of the call; by default `example_inputs(model)`.
        observer: a context to be active during the call.

    Raises:
        ValueError: no `inputs` and a config that does not tell the input's shape.
    """
    found: dict[str, int] = {}

    def note(name: str, module: nn.Module, x: torch.Tensor, output: torch.Tensor) -> None:
        channels = -1 if hasattr(module, "in_features") else 1
        found[name] = found.get(name, 0) + output.numel() // output.shape[channels]

    _call(model, inputs, note, observer)
    return found


def input_shapes(model: nn.Module, inputs: Mapping[str, torch.Tensor] | None = None) -> dict[str, tuple[int, ...]]:
    """The shape of each layer's input in its last call; arguments as `positions`."""
    found: dict[str, tuple[int, ...]] = {}
    _call(model, inputs, lambda name, module, x, output: found.update({name: tuple(x.shape)}))
    return found


def _call(model: nn.Module, inputs, note: Callable, observer: AbstractContextManager | None = None) -> None:
    """Call a meta copy of the model, with `note(name, module, input, output)` after each layer."""
    inputs = {k: v.to("meta") for k, v in (inputs or example_inputs(model)).items()}
    shadow = _meta_copy(model)
    for name, module in shadow.named_modules():
        if isinstance(module, _CONVOLUTIONS) or hasattr(module, "in_features") or hasattr(module, "weight_shape"):
            module.register_forward_hook(lambda module, args, output, name=name: note(name, module, args[0], output))
    with observer or nullcontext(), torch.no_grad():
        shadow(**inputs)


def example_inputs(model: nn.Module, batch: int = 1) -> dict[str, torch.Tensor]:
    """Zeros as a 2-D diffusers denoiser takes them, in its dtype and on its device: sample, timestep, class labels or text."""
    config = getattr(model, "config", None)
    size, channels = getattr(config, "sample_size", None), getattr(config, "in_channels", None)
    if size is None or channels is None:
        raise ValueError(f"{type(model).__name__} has no config.sample_size and in_channels; pass inputs={{...}}")
    height, width = (size, size) if isinstance(size, int) else size
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
    label = like.new_zeros(batch, dtype=torch.long)
    inputs = {"sample": like.new_zeros(batch, channels, height, width), "timestep": label}
    if null_label(model) is not None:
        inputs["class_labels"] = label
    if getattr(config, "context_dim", None):
        inputs["encoder_hidden_states"] = like.new_zeros(batch, config.context_tokens, config.context_dim)
    return inputs


def _meta_copy(model: nn.Module) -> nn.Module:
    """A copy without storage; sparse-training layers become plain ones of the same shape."""
    memo = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        empty = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    shadow = copy.deepcopy(model, memo)
    return densify(shadow) if any(True for _ in nm_layers(shadow)) else shadow
