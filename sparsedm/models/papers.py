"""The papers' models, by name: their configurations, and the published parameters, MACs and FID."""

from collections.abc import Collection
from dataclasses import dataclass, field

import diffusers
from diffusers import ModelMixin

from .uvit import UViTModel


@dataclass(frozen=True)
class PaperModel:
    """A configuration from a paper, with the published numbers.

    Attributes:
        cls: the class of the model.
        config: its arguments.
        params_m: millions of parameters.
        gmacs: multiply-accumulates of one call on one picture, in units of 10^9.
        fid: the published FID, None where none was published.
        source: where the numbers stand.
    """

    cls: type[ModelMixin]
    config: dict = field(repr=False)
    params_m: float
    gmacs: float
    fid: float | None
    source: str


def _uvit(size: int, patch: int, channels: int, dim: int, depth: int, heads: int, classes: int | None = None, **extra) -> dict:
    return {
        "sample_size": size, "patch_size": patch, "in_channels": channels, "embed_dim": dim, "depth": depth,
        "num_heads": heads, "num_classes": classes, **extra,
    }  # fmt: skip


DDPM_GROUPS = 32


def ddpm_config(size: int, widths: tuple[int, ...], attention: Collection[int], blocks: int = 2) -> dict:
    """The DDPM UNet (Ho et al. 2020) in diffusers' terms; `attention` at these levels, 0 the finest, and in the middle."""
    levels = range(len(widths))
    return {
        "sample_size": size, "block_out_channels": widths, "layers_per_block": blocks,
        "down_block_types": tuple("AttnDownBlock2D" if i in attention else "DownBlock2D" for i in levels),
        "up_block_types": tuple("AttnUpBlock2D" if i in attention else "UpBlock2D" for i in reversed(levels)),
        "attention_head_dim": None, "downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1, "norm_eps": 1e-6,
        "norm_num_groups": DDPM_GROUPS,
    }  # fmt: skip


def _ddpm(size: int, multipliers: tuple[int, ...], attention_level: int) -> dict:
    return ddpm_config(size, tuple(128 * m for m in multipliers), (attention_level,))


# SparseDM's UNet for CIFAR-10 (its repository, configs): 112 channels, attention at 4x4 and 2x2, 4 heads, scale and shift.
_SPARSEDM_UNET = {
    "sample_size": 32, "block_out_channels": (112, 224, 224, 448, 448), "layers_per_block": 2,
    "down_block_types": ("DownBlock2D",) * 3 + ("AttnDownBlock2D",) * 2,
    "up_block_types": ("AttnUpBlock2D",) * 2 + ("UpBlock2D",) * 3,
    "attention_head_dim": 112, "norm_num_groups": 28, "resnet_time_scale_shift": "scale_shift",
}  # fmt: skip

_UVIT_README = "U-ViT repository, readme"
_DP_TABLE = "Diff-Pruning (arXiv 2305.10924), tables 1 and 2"
_TEXT = {"context_dim": 768, "context_tokens": 77}

PAPER_MODELS = {
    "uvit-s2-cifar10": PaperModel(UViTModel, _uvit(32, 2, 3, 512, 12, 8), 44, 12.20, 3.11, _UVIT_README),
    "uvit-s4-celeba64": PaperModel(UViTModel, _uvit(64, 4, 3, 512, 12, 8), 44, 12.21, 2.87, _UVIT_README),
    "uvit-m4-imagenet64": PaperModel(UViTModel, _uvit(64, 4, 3, 768, 16, 12, 1001), 131, 35.24, 5.85, _UVIT_README),
    "uvit-l4-imagenet64": PaperModel(UViTModel, _uvit(64, 4, 3, 1024, 20, 16, 1001), 287, 76.47, 4.26, _UVIT_README),
    "uvit-l2-imagenet256": PaperModel(UViTModel, _uvit(32, 2, 4, 1024, 20, 16, 1001), 287, 77, 3.40, _UVIT_README),
    "uvit-h2-imagenet256": PaperModel(UViTModel, _uvit(32, 2, 4, 1152, 28, 16, 1001, conv=False), 501, 133, 2.29, _UVIT_README),
    "uvit-l4-imagenet512": PaperModel(UViTModel, _uvit(64, 4, 4, 1024, 20, 16, 1001), 287, 76.48, 4.67, _UVIT_README),
    "uvit-h4-imagenet512": PaperModel(
        UViTModel, _uvit(64, 4, 4, 1152, 28, 16, 1001, conv=False), 501, 133.23, 4.05, _UVIT_README
    ),
    "uvit-s2-coco": PaperModel(UViTModel, _uvit(32, 2, 4, 512, 12, 8, **_TEXT), 45, 16.23, 5.95, _UVIT_README),
    "uvit-s2-deep-coco": PaperModel(UViTModel, _uvit(32, 2, 4, 512, 16, 8, **_TEXT), 58, 21.24, 5.48, _UVIT_README),
    "ddpm-cifar10": PaperModel(diffusers.UNet2DModel, _ddpm(32, (1, 2, 2, 2), 1), 35.7, 6.1, 4.19, _DP_TABLE),
    "ddpm-celeba64": PaperModel(diffusers.UNet2DModel, _ddpm(64, (1, 2, 2, 2, 4), 2), 78.7, 23.9, 6.48, _DP_TABLE),
    "ddpm-lsun256-church": PaperModel(diffusers.UNet2DModel, _ddpm(256, (1, 1, 2, 2, 4, 4), 4), 113.7, 248.7, 10.6, _DP_TABLE),
    "ddpm-lsun256-bedroom": PaperModel(diffusers.UNet2DModel, _ddpm(256, (1, 1, 2, 2, 4, 4), 4), 113.7, 248.7, 6.9, _DP_TABLE),
    "ddpm-cifar10-sparsedm": PaperModel(diffusers.UNet2DModel, _SPARSEDM_UNET, 92.7, 4.99, None, "SparseDM code (counted)"),
}


def build(name: str) -> ModelMixin:
    """A paper's model with fresh random weights. Raises ValueError for a name that is not in `PAPER_MODELS`."""
    if name not in PAPER_MODELS:
        raise ValueError(f"unknown paper model {name!r}; known: {', '.join(PAPER_MODELS)}")
    model = PAPER_MODELS[name].cls(**PAPER_MODELS[name].config)
    return model.eval()
