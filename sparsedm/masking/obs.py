"""One-shot N:M sparsity of one layer from its inputs: Wanda, optimal brain surgeon (OBS), and ADMM.

A layer is the linear problem Y = X W^T with inputs X [tokens, d] and weight W [out, d]. A convolution is unfolded into the same
problem in the order (kernel row, kernel column, channel), so that M consecutive columns are M consecutive channels at one kernel
position, as in `nm`. Of the inputs the methods need `Moments` alone. OBS and ADMM minimise tr((Q - T) H (Q - T)^T) over N:M
sparse Q: the squared error of the outputs, with H and T from `quadratic`.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from . import nm
from .nm import NMPattern

_BLOCK = 128  # columns between two updates of all that follow
_ADMM = {"start": 0.01, "growth": 1.1, "stop": 30.0, "stable": 5}  # the penalty on a unit diagonal; steps without a change


class Unsolvable(ValueError):
    """The moments do not define a minimum; the message says why."""


# --- a layer as a linear problem ---------------------------------------------------------------------------------------


def columns(weight: torch.Tensor) -> torch.Tensor:
    """A weight [out, in] or [out, in, rows, columns] as [out, d], the input channel fastest."""
    return weight.flatten(2).movedim(1, 2).flatten(1) if weight.dim() > 2 else weight


def from_columns(weight: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The inverse of `columns`: a weight of `shape`."""
    if len(shape) == 2:
        return weight
    return weight.reshape(shape[0], -1, shape[1]).movedim(1, 2).reshape(shape).contiguous()


def tokens(layer: nn.Linear | nn.Conv2d, x: torch.Tensor, chosen: torch.Tensor | None = None) -> torch.Tensor:
    """The inputs [B, ..., in] of a linear layer, or [B, C, H, W] of a convolution, as [tokens, d] in the order of `columns`.

    `chosen` are the indices of the tokens that are wanted, all by default; they are in the order of the outputs.
    """
    if isinstance(layer, nn.Linear):
        x = x.reshape(-1, x.shape[-1])
        return x if chosen is None else x[chosen]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, layer._reversed_padding_repeated_twice, mode)
    for axis, (kernel, dilation) in enumerate(zip(layer.kernel_size, layer.dilation, strict=True), 2):
        x = x.unfold(axis, dilation * (kernel - 1) + 1, layer.stride[axis - 2])
    x = x[..., :: layer.dilation[0], :: layer.dilation[1]].permute(0, 2, 3, 4, 5, 1)  # [B, H', W', rows, columns, C]
    if chosen is None:
        return x.flatten(3).flatten(0, 2)
    return x[torch.unravel_index(chosen, x.shape[:3])].flatten(1)


def outputs(layer: nn.Linear | nn.Conv2d, y: torch.Tensor) -> torch.Tensor:
    """What a layer made of its tokens, without its bias: [tokens, out]."""
    if isinstance(layer, nn.Conv2d):
        y = y.movedim(1, -1)
    return (y if layer.bias is None else y - layer.bias).reshape(-1, y.shape[-1])


class Moments:
    """Weighted sums over a layer's tokens x [d] and targets y [out], in float64 (the products in float32).

    Attributes:
        gram: sum of x x^T, [d, d]; cross: of x y^T, [d, out]; square: of |y|^2.
        inputs, outputs: sums of x, [d], and y, [out]; total: of the weights; count: number of tokens.
    """

    def __init__(self, d: int, out: int, device: torch.device | str = "cpu"):
        self.gram, self.cross, self.inputs, self.outputs = (
            torch.zeros(shape, dtype=torch.float64, device=device) for shape in ((d, d), (d, out), (d,), (out,))
        )
        self.square, self.total, self.count = 0.0, 0.0, 0

    def add(self, x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor | None = None) -> None:
        """Add tokens x [tokens, d] with the targets y [tokens, out], and `weight` [tokens], 1 by default."""
        with torch.autocast(x.device.type, enabled=False):
            x, y = x.float(), y.float()
            weight = x.new_ones(len(x)) if weight is None else weight.to(x)
            weighted = x * weight[:, None]
            self.gram += weighted.T @ x
            self.cross += weighted.T @ y
            self.inputs += weighted.sum(0)
            self.outputs += weight @ y
            self.square += (weight @ y.square().sum(1)).item()
            self.total += weight.sum().item()
            self.count += len(x)

    def shift(self, weight: torch.Tensor) -> torch.Tensor:
        """What to add to the bias of a layer with `weight` [out, d], so that its mean output is that of the targets: [out]."""
        return (self.outputs - weight @ self.inputs) / self.total

    def error(self, weight: torch.Tensor, shift: torch.Tensor | float = 0.0) -> float:
        """Relative error sum |y - W x - shift|^2 / sum |y|^2 of a layer with `weight` [out, d]."""
        made = weight @ self.inputs
        squared = self.square + ((weight @ self.gram) * weight).sum() - 2 * (weight * self.cross.T).sum()
        squared = squared + ((2 * (made - self.outputs) + self.total * shift) * shift).sum()
        return max(squared.item(), 0.0) / self.square if self.square else 0.0


def quadratic(moments: Moments, weight: torch.Tensor, damping: float = 0.01, centred: bool = False):
    """H [d, d] and T [out, d] of the error as a function of the weight, tr((Q - T) H (Q - T)^T) + constant.

    H = X^T X + a I, where a is `damping` times the mean of the diagonal (SparseGPT, arXiv 2301.00774), and
    T = (Y^T X + a W) H^-1, the best dense weight. T is W itself when the targets are the layer's own outputs, and corrects what
    went wrong before the layer when they are those of the dense model. `centred`: with a bias that follows by `Moments.shift`.

    Raises:
        Unsolvable: inputs that are all zero, or an H that is not positive definite or not finite.
    """
    gram, cross = moments.gram, moments.cross
    if centred:
        gram = gram - torch.outer(moments.inputs, moments.inputs) / moments.total
        cross = cross - torch.outer(moments.inputs, moments.outputs) / moments.total
    a = damping * gram.diagonal().mean()
    hessian = gram + a * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    if not torch.isfinite(hessian).all():
        raise Unsolvable("the Gram matrix of the inputs is not finite")
    factor, broken = torch.linalg.cholesky_ex(hessian)
    if broken:
        raise Unsolvable("the Gram matrix of the inputs is singular")
    return hessian, torch.cholesky_solve(cross + a * weight.double().T, factor).T.contiguous()


def timestep_weights(timesteps: torch.Tensor) -> torch.Tensor:
    """OBS-Diff's weight of each of `timesteps` [n]: a = 0.8 + 0.4 ln(1 + i) / ln T, from 0.8 to 1.2 (arXiv 2510.06751).

    i = 0 ... T - 1 counts the T different timesteps from the cleanest to the noisiest.
    """
    different, index = timesteps.unique(return_inverse=True)  # sorted
    return 0.8 + 0.4 * torch.log1p(index.double()) / math.log(max(len(different), 2))


# --- the methods -------------------------------------------------------------------------------------------------------


def wanda(weight: torch.Tensor, moments: Moments, pattern: NMPattern | str) -> torch.Tensor:
    """`weight` [out, d] with the N of every M entries that have the largest |W_ij| * ||X_j||_2, no update (arXiv 2306.11695)."""
    return nm.masked(weight, nm.mask(weight * moments.gram.diagonal().sqrt(), pattern))


def sequential(target: torch.Tensor, hessian: torch.Tensor, pattern: NMPattern | str) -> torch.Tensor:
    """OBS from the first column to the last (SparseGPT, arXiv 2301.00774): `target` [out, d], N:M sparse; float64.

    With H_j the Hessian of the columns from j on: at the start of a group its entries with the smallest
    w_i^2 / [H_j^-1]_ii go, each with H_j of its own column; a column that loses w_j corrects those that follow by
    -w_j [H_j^-1]_j: / [H_j^-1]_jj. The rows of the upper Cholesky factor U of H^-1 are these corrections: U_jj^2 = [H_j^-1]_jj.
    """
    pattern = NMPattern.parse(pattern)
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    diagonal, result = factor.diagonal(), target.clone()
    block = math.lcm(_BLOCK, pattern.m)
    for start in range(0, result.shape[1], block):
        stop = min(start + block, result.shape[1])
        errors = torch.zeros_like(result[:, start:stop])
        for j in range(start, stop):
            if j % pattern.m == 0:
                group = slice(j, j + pattern.m)
                keep = nm.mask(result[:, group] / diagonal[group], pattern)
            column = result[:, j].clone()
            result[:, j] = torch.where(keep[:, j % pattern.m], column, 0)
            errors[:, j - start] = (column - result[:, j]) / diagonal[j]
            result[:, j + 1 : stop] -= torch.outer(errors[:, j - start], factor[j, j + 1 : stop])
        result[:, stop:] -= errors @ factor[start:stop, stop:]
    return result


def admm(target: torch.Tensor, hessian: torch.Tensor, pattern: NMPattern | str) -> torch.Tensor:
    """N:M sparse weights by splitting (ALPS, arXiv 2406.07831): `target` [out, d], sparse, before `refit`; float64.

    Columns are scaled to a unit diagonal of H. W minimises the error plus p/2 |W - D + V/p|^2, D is the N:M projection of
    W + V/p, V grows by p (W - D), while the penalty p rises until the mask stays.
    """
    scale = hessian.diagonal().sqrt()
    values, vectors = torch.linalg.eigh((hessian / scale / scale[:, None]).float())
    wanted = (target * scale).float()
    pull = wanted @ vectors * values @ vectors.T  # T H
    keep, stable, dual, penalty = nm.mask(wanted, pattern), 0, torch.zeros_like(wanted), _ADMM["start"]
    sparse = nm.masked(wanted, keep)
    while stable < _ADMM["stable"] and penalty < _ADMM["stop"]:
        dense = (pull + penalty * sparse - dual) @ vectors / (values + penalty) @ vectors.T
        free = dense + dual / penalty
        before, keep = keep, nm.mask(free, pattern)
        stable = stable + 1 if torch.equal(before, keep) else 0
        sparse = nm.masked(free, keep)
        dual += penalty * (dense - sparse)
        penalty *= _ADMM["growth"]
    return sparse.double() / scale


def refit(sparse: torch.Tensor, target: torch.Tensor, hessian: torch.Tensor, steps: int = 30) -> torch.Tensor:
    """The best values for the entries that are nonzero in `sparse` [out, d]: least squares, row by row.

    Conjugate gradients on the kept entries, with the diagonal of H as preconditioner.
    """
    kept = (sparse != 0).to(hessian)
    diagonal, result = hessian.diagonal(), sparse
    residual = ((target - result) @ hessian) * kept
    direction = scaled = residual / diagonal
    size = (residual * scaled).sum(1, keepdim=True)
    for _ in range(steps):
        curved = (direction @ hessian) * kept
        step = size / (direction * curved).sum(1, keepdim=True).clamp_min(1e-300)
        result = result + step * direction
        residual = residual - step * curved
        scaled = residual / diagonal
        size, before = (residual * scaled).sum(1, keepdim=True), size
        direction = scaled + size / before.clamp_min(1e-300) * direction
    return result
