"""2:4 layers on NVIDIA GPUs of compute capability 8.0 and up, through torch's semi-structured sparse tensors.

Linear layers and 1x1 convolutions in float16 or bfloat16; neither torch nor cuDNN has larger sparse convolutions. torch cuts a
weight that is not 2:4 down without a warning, so every weight is verified first.
"""

import warnings

import torch
from torch import nn
from torch.nn import functional as F
from torch.sparse import SparseSemiStructuredTensor, to_sparse_semi_structured

from ..masking import nm
from ..masking.nm import NMPattern
from ..masking.plain import with_weights
from .base import PackedLayer


class SemiStructuredLayer(PackedLayer):
    """`nn.Linear`, or a 1x1 `nn.Conv2d`, whose weight [out, in] is compressed. For inference.

    Attributes:
        compressed: torch's semi-structured tensor of the weight.
        like: an empty parameter, for code that asks a layer's parameters for their dtype or device.
        bias: [out], or None.
    """

    def __init__(self, plain: nn.Linear | nn.Conv2d, pattern: NMPattern | str):
        super().__init__(plain, pattern)
        reason = why_not(plain, self.pattern) or ("its weight is not 2:4" if nm.verify(plain.weight, self.pattern) else "")
        if reason:
            raise ValueError(f"{type(plain).__name__} cannot be packed: {reason}")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*SparseSemiStructuredTensor.*")  # that it is a prototype
            self.compressed = to_sparse_semi_structured(plain.weight.detach().flatten(1).contiguous())
        self.like = nn.Parameter(plain.weight.new_empty(0), requires_grad=False)
        self.register_buffer("bias", None if plain.bias is None else plain.bias.detach().clone())

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        self.refuse_gradients(input)
        convolution = len(self.weight_shape) == 4
        tokens = input.movedim(1, -1) if convolution else input
        if input.is_meta:
            y = tokens.new_empty(*tokens.shape[:-1], self.weight_shape[0])
        else:
            y = F.linear(tokens.contiguous(), self.compressed, self.bias)
        return y.movedim(-1, 1) if convolution else y

    def kept(self) -> torch.Tensor:
        return self.compressed

    def dense_weight(self) -> torch.Tensor:
        return self.compressed.to_dense().view(self.weight_shape)

    def plain(self) -> nn.Linear | nn.Conv2d:
        outputs, inputs = self.weight_shape[:2]
        bias = self.bias is not None
        plain = nn.Conv2d(inputs, outputs, 1, bias=bias) if len(self.weight_shape) == 4 else nn.Linear(inputs, outputs, bias)
        return with_weights(plain, self.dense_weight(), self.bias)

    def __deepcopy__(self, memo: dict) -> "SemiStructuredLayer":
        return type(self)(self.plain(), self.pattern)  # compressed tensors cannot be copied


def why_not(module: nn.Module, pattern: NMPattern) -> str:
    """Why torch has no semi-structured form of this layer on its device, or ""."""
    weight = module.weight
    one_by_one = isinstance(module, nn.Conv2d) and (module.kernel_size, module.stride, module.groups) == ((1, 1), (1, 1), 1)
    if not isinstance(module, nn.Linear) and not (one_by_one and module.padding == (0, 0)):
        return "no sparse GPU kernel for convolutions larger than 1x1, strided, grouped or padded"
    if (pattern.n, pattern.m) != (2, 4) or weight.dtype not in (torch.float16, torch.bfloat16):
        return f"sparse GPU kernels are for 2:4 in float16 or bfloat16, not {pattern} in {weight.dtype}"
    if torch.cuda.get_device_capability(weight.device) < (8, 0):
        return "sparse GPU kernels need compute capability 8.0"
    rows, columns = (32, 64) if SparseSemiStructuredTensor._FORCE_CUTLASS else (16, 16)
    if weight.shape[0] % rows or weight.shape[1] % columns:
        return f"sparse GPU kernels need multiples of {rows} outputs and {columns} inputs, not {tuple(weight.shape)}"
    return ""
