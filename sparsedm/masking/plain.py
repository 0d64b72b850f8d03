"""The linear and convolution layers of any model: listed, copied and saved; and what must not stand in their place."""

import copy
import functools
from collections.abc import Callable, Iterator

import torch
from torch import nn

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)  # their weights are [in, out, ...]
WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)  # layers that are listed and counted


def weight_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules of all linear and convolution layers, sparse or not."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, WEIGHTED))


def with_weights(plain: nn.Module, weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Module:
    """`plain`, a new linear or convolution layer, with these weights, their dtype and device, in eval mode."""
    plain.to(weight.device, weight.dtype)
    with torch.no_grad():
        plain.weight.copy_(weight)
        if bias is not None:
            plain.bias.copy_(bias)
    return plain.eval()


def refuse_adapters(model: nn.Module) -> None:
    """Raise ValueError if an adapter (LoRA) stands where a layer of the model's class should be."""
    for name, module in model.named_modules():
        if hasattr(module, "base_layer"):
            remedy = "merge it into the weights and unload it first (diffusers: fuse_lora, unload_lora_weights)"
            raise ValueError(f"{name} is wrapped by an adapter ({type(module).__name__}); {remedy}")


def refuse_fused(model: nn.Module) -> None:
    """Raise ValueError if fused projections, which are copies of weights, stand beside the layers of the model's class."""
    for name, module in model.named_modules():
        if getattr(module, "fused_projections", False):
            remedy = "load the model anew, and call fuse_qkv_projections at the end, on the folded model"
            raise ValueError(f"{name} has fused projections beside its own; {remedy}")


def save_as(model: nn.Module, plain: Callable[[nn.Module], nn.Module]) -> None:
    """From now on diffusers' `save_pretrained` writes `plain(copy)`, for the model and for its parts that have this method.

    The folder then holds the weights that the model computes with, in layers that any tool reads.
    """
    for module in model.modules():
        if hasattr(module, "save_pretrained"):
            save = functools.partial(_save_plain, module, plain)
            module.save_pretrained = functools.update_wrapper(save, type(module).save_pretrained)  # pipelines read the signature


def save_as_is(model: nn.Module) -> None:
    """Undo `save_as`."""
    for module in model.modules():
        module.__dict__.pop("save_pretrained", None)


def _save_plain(model: nn.Module, plain: Callable[[nn.Module], nn.Module], save_directory, **kwargs) -> None:
    copied = plain(copy.deepcopy(model))
    save_as_is(copied)
    copied.save_pretrained(save_directory, **kwargs)
