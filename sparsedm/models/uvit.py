"""U-ViT: a vision transformer with long skip connections as denoiser (Bao et al., CVPR 2023, arXiv 2209.12152).

Time, class label and image patches are all tokens. Parameter names and shapes are the official ones, so a published
`nnet_ema.pth` state dict loads with `strict=True`. The class follows diffusers' conventions and works in its pipelines.
"""

import math

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import nn


def timestep_embedding(timesteps: torch.Tensor, dim: int) -> torch.Tensor:
    """Sinusoidal embedding [B, dim], cosines first, of timesteps [B] (0..999, fractions allowed)."""
    half = dim // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, device=timesteps.device, dtype=torch.float32) / half)
    angles = timesteps[:, None].float() * frequencies[None]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class PatchEmbed(nn.Module):
    """Pictures [B, C, H, W] to patch tokens [B, (H/p)(W/p), D]."""

    def __init__(self, patch_size: int, in_channels: int, dim: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, patch_size, patch_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.proj(x)  # [B, D, H/p, W/p]
        return x.flatten(2).transpose(1, 2)  # [B, (H/p)(W/p), D]


class Attention(nn.Module):
    """Multi-head self-attention with fused q, k, v."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.num_heads, -1)  # [B, T, 3, heads, d]
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # 3 x [B, heads, T, d]
        x = F.scaled_dot_product_attention(q, k, v)  # [B, heads, T, d]
        return self.proj(x.transpose(1, 2).flatten(2))  # [B, T, D]


class Mlp(nn.Module):
    """Linear, exact GELU, linear."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block on tokens [B, T, D]; with `skip` the block first merges a long skip connection."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, qkv_bias: bool, norm_eps: float, skip: bool = False):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, norm_eps)
        self.attn = Attention(dim, num_heads, qkv_bias)
        self.norm2 = nn.LayerNorm(dim, norm_eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.skip_linear = nn.Linear(2 * dim, dim) if skip else None

    def forward(self, x: torch.Tensor, skip: torch.Tensor | None = None) -> torch.Tensor:
        if self.skip_linear is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class UViTModel(ModelMixin, ConfigMixin):
    """U-ViT denoiser for pixels or latents, with or without class labels.

    Args:
        sample_size: height and width of the input.
        in_channels: channels of the input; the output has as many.
        patch_size: height and width of a patch in pixels.
        embed_dim: width D of a token.
        depth: blocks beside the middle one: `depth` // 2 before it, `depth` // 2 with long skip connections after it.
        num_heads: heads of each attention.
        mlp_ratio: width of the hidden layer of each MLP, as a multiple of `embed_dim`.
        qkv_bias: whether queries, keys and values have a bias.
        num_classes: size of the label table, the unconditional label (the last) included; None for no label token.
        context_dim: width of the text features of the text-to-image models; None for no text.
        context_tokens: number of text tokens.
        conv: end with a 3x3 convolution (official: all but the Huge models).
        norm_eps: the epsilon of the layer norms.

    Raises:
        ValueError: sizes that do not divide, or are not positive.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        in_channels: int = 3,
        patch_size: int = 2,
        embed_dim: int = 512,
        depth: int = 12,
        num_heads: int = 8,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        num_classes: int | None = None,
        context_dim: int | None = None,
        context_tokens: int = 77,
        conv: bool = True,
        norm_eps: float = 1e-5,
    ):
        super().__init__()
        if min(sample_size, patch_size, in_channels, embed_dim, num_heads) < 1:
            raise ValueError("sample_size, patch_size, in_channels, embed_dim and num_heads must be at least 1")
        if sample_size % patch_size:
            raise ValueError(f"sample_size {sample_size} is not a multiple of patch_size {patch_size}")
        if embed_dim % num_heads or embed_dim % 2:
            raise ValueError(f"embed_dim {embed_dim} must be even and a multiple of num_heads {num_heads}")
        if num_classes is not None and context_dim is not None:
            raise ValueError("U-ViT takes class labels or text, not both")
        self.gradient_checkpointing = False
        self.extras = 1 + (num_classes is not None) + (context_tokens if context_dim else 0)  # tokens before the patches
        tokens = self.extras + (sample_size // patch_size) ** 2
        self.patch_embed = PatchEmbed(patch_size, in_channels, embed_dim)
        if num_classes is not None:
            self.label_emb = nn.Embedding(num_classes, embed_dim)
        if context_dim is not None:
            self.context_embed = nn.Linear(context_dim, embed_dim)
        self.pos_embed = nn.Parameter(torch.empty(1, tokens, embed_dim))

        def block(skip: bool = False) -> Block:
            return Block(embed_dim, num_heads, mlp_ratio, qkv_bias, norm_eps, skip)

        self.in_blocks = nn.ModuleList(block() for _ in range(depth // 2))
        self.mid_block = block()
        self.out_blocks = nn.ModuleList(block(skip=True) for _ in range(depth // 2))
        self.norm = nn.LayerNorm(embed_dim, norm_eps)
        self.decoder_pred = nn.Linear(embed_dim, patch_size**2 * in_channels)
        self.final_layer = nn.Conv2d(in_channels, in_channels, 3, padding=1) if conv else nn.Identity()
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.apply(_init_linear)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        class_labels: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[torch.Tensor]:
        """Predict noise (or velocity) [B, C, H, W] for `sample` [B, C, H, W] at `timestep` (scalar or [B]).

        `class_labels` [B] is required exactly when the model has a label table, `encoder_hidden_states`
        [B, context_tokens, context_dim] exactly when it takes text.
        """
        shape = (self.config.in_channels, self.config.sample_size, self.config.sample_size)
        if tuple(sample.shape[1:]) != shape:
            raise ValueError(f"this U-ViT takes pictures of shape {list(shape)}, not {list(sample.shape[1:])}")
        self._check(class_labels, "label_emb", "class_labels")
        self._check(encoder_hidden_states, "context_embed", "encoder_hidden_states")
        # 1. tokens: [label] time [text] patches
        x = self.patch_embed(sample)  # [B, L, D]
        timestep = torch.as_tensor(timestep, device=sample.device).expand(sample.shape[0])
        tokens = [timestep_embedding(timestep, self.config.embed_dim).to(x.dtype)[:, None], x]
        if class_labels is not None:
            tokens.insert(0, self.label_emb(class_labels)[:, None])
        if encoder_hidden_states is not None:
            tokens.insert(1, self.context_embed(encoder_hidden_states))
        x = torch.cat(tokens, dim=1) + self.pos_embed  # [B, extras + L, D]
        # 2. in, middle, out; the skips are last in, first out
        skips = []
        for block in self.in_blocks:
            x = self._run(block, x)
            skips.append(x)
        x = self._run(self.mid_block, x)
        for block in self.out_blocks:
            x = self._run(block, x, skips.pop())
        # 3. back to pixels
        x = self.decoder_pred(self.norm(x))[:, self.extras :]  # [B, L, p * p * C]
        x = self.final_layer(self._unpatchify(x))  # [B, C, H, W]
        return UNet2DOutput(sample=x) if return_dict else (x,)

    def _run(self, block: "Block", *args: torch.Tensor) -> torch.Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(block, *args)
        return block(*args)

    def _check(self, value: torch.Tensor | None, module: str, argument: str) -> None:
        if (value is not None) != hasattr(self, module):
            raise ValueError(f"this U-ViT {'needs' if value is None else 'takes no'} {argument}")

    def _unpatchify(self, x: torch.Tensor) -> torch.Tensor:
        """[B, L, p * p * C], channel fastest, to [B, C, H, W]."""
        p, side = self.config.patch_size, self.config.sample_size // self.config.patch_size
        x = x.view(x.shape[0], side, side, p, p, self.config.in_channels)  # [B, H/p, W/p, p, p, C]
        x = x.permute(0, 5, 1, 3, 2, 4)  # [B, C, H/p, p, W/p, p]
        return x.reshape(x.shape[0], -1, side * p, side * p)  # [B, C, H, W]


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
