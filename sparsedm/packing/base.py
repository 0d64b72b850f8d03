"""The base class of all packed layers."""

import torch
from torch import nn

from ..masking.nm import NMPattern


class PackedLayer(nn.Module):
    """A linear or convolution layer without the zeros of its weight [out, in, ...], for inference.

    Attributes:
        pattern: N:M.
        weight_shape: [out, in, ...] of the dense weight.
        times: the `tuning.Times` that "auto" measured, or None.
    """

    def __init__(self, plain: nn.Linear | nn.Conv2d, pattern: NMPattern | str):
        super().__init__()
        self.pattern, self.weight_shape = NMPattern.parse(pattern), tuple(plain.weight.shape)
        self.times = None

    @property
    def weight(self) -> torch.Tensor:
        """Shape, dtype and device of the dense weight, without its values, which `dense_weight()` computes."""
        kept = self.kept()
        return _NoWeight(self.weight_shape, kept.dtype, kept.device)

    def kept(self) -> torch.Tensor:
        """The tensor that holds the kept weights."""
        raise NotImplementedError

    def dense_weight(self) -> torch.Tensor:
        """The weight [out, in, ...] with its zeros."""
        raise NotImplementedError

    def plain(self) -> nn.Linear | nn.Conv2d:
        """The same layer unpacked."""
        raise NotImplementedError

    def refuse_gradients(self, x: torch.Tensor) -> None:
        """Raise RuntimeError if a gradient is wanted."""
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *self.parameters())):
            raise RuntimeError("packed layers have no gradient: sample under torch.no_grad(), or train before sparsedm.pack")

    def extra_repr(self) -> str:
        return f"{'x'.join(map(str, self.weight_shape))}, pattern={self.pattern}, bias={self.bias is not None}"


class _NoWeight(torch.Tensor):
    """A tensor that has a shape, a dtype and a device, and no values to compute with."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device):
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)

    @property
    def data(self) -> "_NoWeight":
        return self

    def __repr__(self, **kwargs) -> str:
        return f"packed weight {list(self.shape)}, {self.dtype}, {self.device}"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(
            f"{func.overloadpacket.__name__} needs the weight of a packed layer, which is kept without its zeros; "
            "call layer.dense_weight(), or sparsedm.unpack(model) first"
        )
