"""DeepCache (Ma et al., arXiv 2312.00858): a UNet that computes its deep blocks at every k-th sampling step only."""

import copy
from collections.abc import Callable

from diffusers import UNet2DConditionModel, UNet2DModel
from torch import nn


def in_turn(model: nn.Module, interval: int) -> list[nn.Module]:
    """The models to call at `interval` successive steps; they share the weights of `model`, which is not changed.

    The first computes all blocks and keeps what the deep ones return; the others return that again (section 3.2). The first down
    block and the last up block are computed always, which is the shallowest cut between whole blocks.

    Raises:
        ValueError: an interval below 1, or a model other than diffusers' UNets with two levels or more.
    """
    if interval < 1:
        raise ValueError(f"cache_interval must be at least 1, not {interval}")
    if interval == 1:
        return [model]
    if not isinstance(model, (UNet2DModel, UNet2DConditionModel)) or len(model.down_blocks) < 2:
        raise ValueError(f"DeepCache is for UNets with two levels or more, not for this {type(model).__name__}; leave it out")
    kept: dict[str, object] = {}

    def keeping(name: str, block: nn.Module) -> Callable:
        def forward(*args, **inputs):
            kept[name] = block.forward(*args, **inputs)
            return kept[name]

        return forward

    def returning(name: str, block: nn.Module) -> Callable:
        return lambda *args, **inputs: kept[name]

    return [_with_deep(model, keeping), *[_with_deep(model, returning)] * (interval - 1)]


def _with_deep(model: nn.Module, forward: Callable[[str, nn.Module], Callable]) -> nn.Module:
    """A copy of the model, with the same weights, whose deep blocks have the forward `forward(name, block)`."""

    def deep(name: str, block: nn.Module) -> nn.Module:
        copied = copy.copy(block)  # the UNet also reads its attributes
        copied.forward = forward(name, block)
        return copied

    down, up = list(model.down_blocks), list(model.up_blocks)
    copied = copy.copy(model)
    copied._modules = {
        **model._modules,
        "down_blocks": nn.ModuleList([down[0], *(deep(f"down {i}", block) for i, block in enumerate(down[1:]))]),
        "mid_block": model.mid_block and deep("mid", model.mid_block),
        "up_blocks": nn.ModuleList([*(deep(f"up {i}", block) for i, block in enumerate(up[:-1])), up[-1]]),
    }
    return copied
