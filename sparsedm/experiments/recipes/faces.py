"""The experiments on cartoon faces of 32x32 pixels in colour, drawn from words: both papers' methods on text-to-image models."""

from diffusers import UNet2DConditionModel

from ...data.faces import DIM, TOKENS
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


def recipes() -> dict[str, Recipe]:
    teach = {**TEACH, "mixed_precision": "bf16", "batch_size": 64, "warmup": 300, "checkpoint_every": 100}
    uvit = {**teach, "steps": 6_000, "optimizer": "muon"}
    unet = {**teach, "steps": 6_000}
    teacher = {"suite": "faces", "method": "teacher", "schedule": SCHEDULE, "data": "faces"}
    return {
        "faces-uvit": Recipe(backbone="U-ViT", model=(UViTModel, _UVIT), train=uvit, **teacher),
        "faces-unet": Recipe(backbone="UNet", model=(UNet2DConditionModel, _UNET), context_tokens=TOKENS, train=unet, **teacher),
    }
