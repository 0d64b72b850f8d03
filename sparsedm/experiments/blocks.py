"""SparseDM's own speed experiment, a U-ViT of one block over patch sizes and MLP ratios, repeated on this machine."""

import copy
import itertools
from collections.abc import Iterator, Sequence

import torch

from ..masking import layers
from ..measure import speed
from ..models.uvit import UViTModel
from ..packing import packed

PATCH_SIZES, MLP_RATIOS = (1, 2, 4), (1, 2, 4, 8)
# Dense and 2:4 seconds by (MLP ratio, patch size), from "GPU Inference/log.txt" of github.com/wangkafeng/SparseDM (commit
# dc72273): one U-ViT block of width 8192 in float16 with random weights and one constant mask, 50 steps of 256 pictures of 32x32
# on four A40 GPUs, one run each.
PAPER_SECONDS = {
    (1, 1): (32.81, 32.06), (1, 2): (7.66, 7.58), (1, 4): (2.039, 2.010),
    (2, 1): (42.89, 41.24), (2, 2): (9.39, 9.73), (2, 4): (2.549, 2.521),
    (4, 1): (74.89, 60.87), (4, 2): (31.22, 28.29), (4, 4): (3.407, 3.468),
    (8, 1): (130.27, 106.76), (8, 2): (29.05, 24.76), (8, 4): (6.331, 5.864),
}  # fmt: skip


def measure(
    embed_dim: int = 512,
    patch_sizes: Sequence[int] = PATCH_SIZES,
    mlp_ratios: Sequence[float] = MLP_RATIOS,
    batch: int = 1,
    threads: int = 1,
    rounds: int = 5,
) -> Iterator[dict]:
    """Times of one call, dense against packed at 2:4, in float32, one row per MLP ratio and patch size.

    Random weights with masks by magnitude. Every layer that a kernel serves is packed, whether it gains or not. Rows are those
    of `speed.measure_steps`, with "patch_size", "mlp_ratio" and "tokens".
    """
    for ratio, patch in itertools.product(mlp_ratios, patch_sizes):
        with speed.with_threads(threads), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            dense = UViTModel(patch_size=patch, embed_dim=embed_dim, depth=1, mlp_ratio=ratio).eval()
            fast = packed.pack(layers.sparsify(copy.deepcopy(dense), "2:4"), backend="kernel")
            row = speed.compare(f"patch {patch}, MLP {ratio}", {"dense": dense, "packed": fast}, batch, False, rounds)
        names = {"patch_size": patch, "mlp_ratio": ratio, "tokens": dense.pos_embed.shape[1]}
        yield {**names, "threads": threads, "dtype": "float32", **row}
