"""How large a model is: parameters, and bytes in memory."""

from torch import nn


def parameters(model: nn.Module) -> int:
    """The number of parameters."""
    return sum(p.numel() for p in model.parameters())


def nonzero(model: nn.Module) -> int:
    """The number of parameters that are not zero."""
    return sum(int(p.count_nonzero()) for p in model.parameters())


def memory(model: nn.Module) -> int:
    """Bytes of the parameters and buffers in memory."""
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
