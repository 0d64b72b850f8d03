"""N:M sparsity of tensors: patterns, magnitude masks, verification.

Groups are M consecutive input features of a linear weight [out, in], or M consecutive input channels at a fixed kernel
position of a convolution weight [out, in, ...] (SparseDM 3.1, arXiv 2404.10445; the layout that sparse hardware reads).
Both are runs along axis 1.
"""

import re
from dataclasses import dataclass

import torch

MAX_M = 64
_PAIRWISE_MAX_M = 32  # up to here comparing pairs is faster than selecting


@dataclass(frozen=True)
class NMPattern:
    """Keep `n` of every `m` consecutive weights. `NMPattern.parse("2:4")`; `str` gives it back."""

    n: int
    m: int

    def __post_init__(self):
        if not 1 <= self.n <= self.m <= MAX_M:
            raise ValueError(f"pattern {self.n}:{self.m} is not N:M with 1 <= N <= M <= {MAX_M}, such as 2:4")

    @classmethod
    def parse(cls, text: "str | NMPattern") -> "NMPattern":
        """Read "N:M". Raises ValueError for anything else than two whole numbers with 1 <= N <= M <= 64."""
        if isinstance(text, NMPattern):
            return text
        match = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", text) if isinstance(text, str) else None
        if not match:
            raise ValueError(f"pattern {text!r} is not N:M with 1 <= N <= M <= {MAX_M}, such as '2:4'")
        return cls(int(match[1]), int(match[2]))

    @classmethod
    def sparse(cls, text: "str | NMPattern") -> "NMPattern":
        """As `parse`, for layers that become sparse. Raises ValueError also for N:N, which keeps every weight."""
        pattern = cls.parse(text)
        if pattern.n == pattern.m:
            raise ValueError(f"pattern {pattern} keeps every weight; take N < M, such as 2:4")
        return pattern

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def density(self) -> float:
        """Share of the weights that is kept, N / M."""
        return self.n / self.m


def grouped(weight: torch.Tensor, m: int) -> torch.Tensor:
    """View [out, in, ...] as [out, in / m, m, rest]. Raises ValueError when `in` is not a multiple of m."""
    if weight.dim() < 2:
        raise ValueError(f"an N:M weight has at least two axes (out, in), this one has shape {tuple(weight.shape)}")
    if weight.shape[1] % m:
        raise ValueError(f"axis 1 of shape {tuple(weight.shape)} has {weight.shape[1]} entries, not a multiple of {m}")
    return weight.reshape(weight.shape[0], weight.shape[1] // m, m, -1)


_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def mask(weight: torch.Tensor, pattern: NMPattern | str) -> torch.Tensor:
    """The magnitude mask of `weight` [out, in, ...]: True for the N largest |w| of every group, exactly N of them.

    Ties go to the lowest index, on every device. Magnitudes are compared as the integers of their bits, a total order that
    agrees with |w| and puts NaN on top.

    Raises:
        ValueError: the weight has no axis 1, or its length is not a multiple of M.
    """
    pattern = NMPattern.parse(pattern)
    groups = grouped(weight.detach(), pattern.m)
    if pattern.n == pattern.m:
        return torch.ones_like(weight, dtype=torch.bool)
    keep = _keep_by_pairs if pattern.m <= _PAIRWISE_MAX_M else _keep_by_selection
    kept = keep(_magnitude(groups), pattern.n)  # [m, out, in / m, rest]
    kept = kept.movedim(0, 2)  # [out, in / m, m, rest]
    return kept.reshape(weight.shape).contiguous()  # [out, in, ...]


def masked(weight: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """`weight` with exact +0 where `mask` is False. As bits, several times faster than `torch.where` on a CPU."""
    bits = _BITS[weight.element_size()]  # the integer type as wide as the weights
    return weight.view(bits).bitwise_and(mask.to(bits).neg_()).view(weight.dtype)


def soft_threshold(weight: torch.Tensor, pattern: NMPattern | str) -> torch.Tensor:
    """sign(w) * max(|w| - t, 0), t the (M - N)-th smallest |w| of each group: N:M, and continuous in w (S-STE, arXiv 2409.09099).

    Raises ValueError as `mask`.
    """
    pattern = NMPattern.parse(pattern)
    groups = grouped(weight, pattern.m)  # [out, in / m, m, rest]
    if pattern.n == pattern.m:
        return weight.clone()
    smallest = groups.abs().kthvalue(pattern.m - pattern.n, dim=2, keepdim=True).values
    shrunk = (groups.abs() - smallest).clamp_(min=0)
    return (shrunk * groups.sign()).reshape(weight.shape)


def _magnitude(groups: torch.Tensor) -> torch.Tensor:
    """Orderable integers of |w|, one contiguous slice per position in the group: [m, out, in / m, rest]."""
    bits = groups.abs().view(_BITS[groups.element_size()])  # [out, in / m, m, rest]
    return bits.movedim(2, 0).contiguous()


def _keep_by_pairs(magnitude: torch.Tensor, n: int) -> torch.Tensor:
    """Keep the entries that fewer than n others of their group beat; pairs are compared by distance. No sorting."""
    m = len(magnitude)
    # Entry i starts with its i earlier rivals, who win ties, as victors.
    beaten = torch.arange(m, dtype=torch.int8, device=magnitude.device).view(-1, *[1] * (magnitude.dim() - 1))
    beaten = beaten.expand(magnitude.shape).contiguous()
    for distance in range(1, m):
        later_wins = (magnitude[distance:] > magnitude[:-distance]).view(torch.int8)
        beaten[:-distance] += later_wins
        beaten[distance:] -= later_wins
    return beaten < n


def _keep_by_selection(magnitude: torch.Tensor, n: int) -> torch.Tensor:
    """Keep entries whose unique key (magnitude, then lower index) is at least the n-th largest of the group."""
    m = len(magnitude)
    if magnitude.element_size() == 8:  # float64: no room for the index beside the magnitude
        return _keep_by_sorting(magnitude, n)
    index = torch.arange(m - 1, -1, -1, device=magnitude.device).view(m, *[1] * (magnitude.dim() - 1))
    key = magnitude.long() * m + index
    return key >= key.kthvalue(m - n + 1, dim=0, keepdim=True).values


def _keep_by_sorting(magnitude: torch.Tensor, n: int) -> torch.Tensor:
    order = magnitude.argsort(dim=0, descending=True, stable=True)
    return torch.zeros_like(magnitude, dtype=torch.bool).scatter_(0, order[:n], True)


def verify(weight: torch.Tensor, pattern: NMPattern | str) -> int:
    """How many groups of `weight` hold more than N nonzeros (0: the weight is N:M sparse)."""
    pattern = NMPattern.parse(pattern)
    return int(((grouped(weight.detach(), pattern.m) != 0).sum(2) > pattern.n).sum())


def detect(weight: torch.Tensor) -> NMPattern | None:
    """The sparsest N:M (the smallest M among equals) that `weight` satisfies, or None for a dense weight.

    A weight that is zero throughout counts as dense: it has not been masked, it has not been trained.
    """
    if weight.dim() < 2 or weight.is_meta:
        return None
    nonzero = weight.detach() != 0
    if nonzero.all() or not nonzero.any():
        return None
    best = None
    for m in (m for m in range(2, MAX_M + 1) if weight.shape[1] % m == 0):
        n = int(grouped(nonzero, m).sum(2).max())
        if n < m and (best is None or n / m < best.density):
            best = NMPattern(n, m)
    return best
