"""The experiments on cartoon faces of 32x32 pixels in colour, drawn from words: both papers' methods on text-to-image models.

Every student has a fifth of its teacher's training, the most that Diff-Pruning claims to need, or none.
"""

from diffusers import UNet2DConditionModel

from ...data.faces import DIM, TOKENS
from ...measure.protocol import Protocol
from ...models.uvit import UViTModel
from .base import Recipe
from .glyphs import SCHEDULE, TEACH

_UVIT = {
    "sample_size": 32, "in_channels": 3, "patch_size": 4, "embed_dim": 256, "depth": 8, "num_heads": 8, "context_dim": DIM,
    "context_tokens": TOKENS,
}  # fmt: skip
_UNET = {
    "sample_size": 32, "in_channels": 3, "out_channels": 3, "block_out_channels": (48, 96, 128), "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"), "mid_block_type": "UNetMidBlock2DCrossAttn",
    "cross_attention_dim": DIM, "attention_head_dim": 4, "norm_num_groups": 8,
}  # fmt: skip
_PROTOCOL = Protocol(n=2_500, steps=20)  # ten minutes of one core
_GENTLE = {"lr": 3e-4}
_CALIBRATE = {"n": 1024}
_TEACHER_ONLY = {"noise_weight": 0.0, "teacher_weight": 1.0}


def recipes() -> dict[str, Recipe]:
    teach = {**TEACH, "mixed_precision": "bf16", "batch_size": 64, "warmup": 300, "checkpoint_every": 100}
    uvit = {**teach, "steps": 6_000, "optimizer": "muon"}
    unet = {**teach, "steps": 6_000}
    return {
        **_suite("faces-uvit", "U-ViT", (UViTModel, _UVIT), uvit, 0.5),
        **_suite("faces-unet", "UNet", (UNet2DConditionModel, _UNET), unet, 0.35),
    }


def _suite(base: str, backbone: str, model: tuple[type, dict], teach: dict, half: float) -> dict[str, Recipe]:
    """The teacher and its students at half the MACs; `half` is the share of channels whose removal leaves half of them."""
    tune = {**teach, "lr": 1e-3, "warmup": 50, "steps": teach["steps"] // 5}
    common = {"suite": "faces", "backbone": backbone, "data": "faces", "protocol": _PROTOCOL}
    text = {"context_tokens": TOKENS, "schedule": SCHEDULE, "model": model, "train": teach, "bundle": True}
    students = {}

    def add(key: str, method: str, **options) -> None:
        students[f"{base}-{key}"] = Recipe(method=method, base=base, role=key, **common, **options)

    def pruned() -> dict:
        return {"ratio": half, "round_to": 4, "score": "squared", "threshold": 0.05}

    calibrated = {"pattern": "2:4", "calibrate": _CALIBRATE}
    distilled = {"pattern": "2:4", "distil": True}
    add("2x4-oneshot", "2:4, one-shot", pattern="2:4")
    add("2x4-calibrated", "2:4, calibrated, no training", bundle=True, **calibrated)
    add("more", "dense, same extra training", train=tune, seeds=3)
    add("more-gentle", "dense, same extra training, lr 3e-4", train={**tune, **_GENTLE}, seeds=3)
    add("2x4", "2:4, SparseDM", train=tune, seeds=3, **distilled)
    add(
        "2x4-from-calibrated", "2:4, SparseDM from the calibrated start, lr 3e-4", bundle=True, distil=True, seeds=3,
        train={**tune, **_GENTLE}, **calibrated,
    )  # fmt: skip
    add("diffpruned", "Diff-Pruning", prune=pruned(), train=tune, seeds=3)
    add("diffpruned-2x4", "Diff-Pruning, then 2:4, SparseDM", prune=pruned(), train=tune, **distilled)
    return {base: Recipe(method="teacher", **common, **text), **students}
