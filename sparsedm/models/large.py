"""Large public models by name: their published configurations, for measurements with random weights."""

from dataclasses import dataclass, field

import diffusers
import torch
from diffusers import ModelMixin


@dataclass(frozen=True)
class LargeModel:
    """A published configuration.

    Attributes:
        title: the model, and the size of its pictures in pixels.
        cls: the class of the model.
        config: its arguments.
    """

    title: str
    cls: type[ModelMixin]
    config: dict = field(repr=False)


_SD15 = {"cross_attention_dim": 768}
_SDXL = {
    "block_out_channels": (320, 640, 1280), "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048, "transformer_layers_per_block": (1, 2, 10), "use_linear_projection": True,
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
_XL2 = {
    "num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 4, "out_channels": 8, "num_layers": 28, "patch_size": 2,
    "activation_fn": "gelu-approximate", "num_embeds_ada_norm": 1000,
}  # fmt: skip
_DIT = {**_XL2, "norm_type": "ada_norm_zero"}
_PIXART = {
    **_XL2, "norm_type": "ada_norm_single", "cross_attention_dim": 1152, "caption_channels": 4096,
    "use_additional_conditions": False,
}  # fmt: skip
_SD3 = {
    "sample_size": 64, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 2, "attention_head_dim": 64,
    "num_attention_heads": 24, "joint_attention_dim": 4096, "caption_projection_dim": 1536, "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
}  # fmt: skip
_FLUX = {"num_layers": 2, "num_single_layers": 2, "guidance_embeds": True}

LARGE = {
    "sd15-256": LargeModel("Stable Diffusion 1.5, 256", diffusers.UNet2DConditionModel, {**_SD15, "sample_size": 32}),
    "sd15-512": LargeModel("Stable Diffusion 1.5, 512", diffusers.UNet2DConditionModel, {**_SD15, "sample_size": 64}),
    "sdxl-512": LargeModel("Stable Diffusion XL, 512", diffusers.UNet2DConditionModel, {**_SDXL, "sample_size": 64}),
    "dit-256": LargeModel("DiT-XL/2, 256", diffusers.DiTTransformer2DModel, {**_DIT, "sample_size": 32}),
    "dit-512": LargeModel("DiT-XL/2, 512", diffusers.DiTTransformer2DModel, {**_DIT, "sample_size": 64}),
    "pixart-256": LargeModel("PixArt-alpha, 256", diffusers.PixArtTransformer2DModel, {**_PIXART, "sample_size": 32}),
    "pixart-512": LargeModel("PixArt-alpha, 512", diffusers.PixArtTransformer2DModel, {**_PIXART, "sample_size": 64}),
    "sd3-cut": LargeModel("Stable Diffusion 3, 2 of 24 blocks, 512", diffusers.SD3Transformer2DModel, _SD3),
    "flux-cut": LargeModel("Flux, 2 of 19 and 2 of 38 blocks, 1024", diffusers.FluxTransformer2DModel, _FLUX),
}


def known(name: str) -> LargeModel:
    """The model called `name`. Raises ValueError for a name that is not in `LARGE`."""
    if name not in LARGE:
        raise ValueError(f"unknown large model {name!r}; known: {', '.join(LARGE)}")
    return LARGE[name]


def build(model: LargeModel, dtype: torch.dtype) -> ModelMixin:
    """The model with random weights in `dtype`."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return model.cls(**model.config).eval()
    finally:
        torch.set_default_dtype(before)
