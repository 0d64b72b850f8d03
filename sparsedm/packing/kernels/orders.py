"""The orders in which kernels read packed weights; each holds the same numbers in as many bytes.

ROWS is that of files: values [out, kernel positions, in / 4 * N], positions likewise. A positive order is a number of inputs:
slices [in / order, out, kernel positions, order / 4 * N]. PAIRS, of 2:4, has two outputs side by side: values [out / 2, groups of
4 inputs, 2, 2], and a byte of positions for each group.
"""

import functools

import torch

from .build import library

ROWS, PAIRS = 0, -1


@functools.cache
def best(shape: tuple[int, ...], stride: int, kept: int, dtype: torch.dtype) -> int:
    """The order of the fastest kernel here for a weight [out, in, ...] with `kept` of every 4, computed in `dtype`."""
    outputs, inputs, *kernel = shape
    side = kernel[0] if kernel else 1
    if dtype == torch.bfloat16:
        return PAIRS
    if library() is None or stride != 1 or (kernel and kernel != [side, side]):
        return ROWS
    return library().sparsedm_slice(inputs, outputs, side, kept)


Packed = tuple[torch.Tensor, torch.Tensor]  # values [out, kept inputs] and positions


def arranged(values: torch.Tensor, positions: torch.Tensor, spots: int, kept: int, order: int) -> Packed:
    """Values and positions that lie in ROWS, of a kernel with so many `spots`, in another order."""
    if order == PAIRS:
        one, other = positions.reshape(len(values) // 2, 2, -1).unbind(1)
        codes = (one & 15) | (other & 15) << 4, one >> 4 | (other & 240)
        return _pairs_swapped(values, 2), torch.stack(codes, -1).flatten()
    return _moved(values, positions, kept, order, lambda x, share: x.reshape(len(values), spots, -1, share).permute(2, 0, 1, 3))


def rows(values: torch.Tensor, positions: torch.Tensor, spots: int, kept: int, order: int) -> Packed:
    """What `arranged` was given."""
    if order == PAIRS:
        low, high = positions.reshape(len(values) // 2, -1, 2).unbind(-1)
        halves = (low & 15) | (high & 15) << 4, low >> 4 | (high & 240)
        return _pairs_swapped(values, -1), torch.stack(halves, 1).flatten()
    return _moved(values, positions, kept, order, lambda x, share: x.reshape(-1, len(values), spots, share).permute(1, 2, 0, 3))


def _moved(values, positions, kept, order, move):
    if order == ROWS:
        return values, positions
    share = order // 4 * kept  # values of an output, a kernel position and a slice; four positions are a byte
    return move(values, share).reshape(values.shape), move(positions, share // 4).reshape(positions.shape)


def _pairs_swapped(values: torch.Tensor, outer: int) -> torch.Tensor:
    """Values as [out / 2, outer, rest, 2], with the axes between swapped."""
    inner = 2 if outer == -1 else -1
    return values.reshape(len(values) // 2, outer, inner, 2).transpose(1, 2).reshape(values.shape)
