"""Every model class that diffusers exports, and a tiny model of each class that denoises: `TINY`, `OTHER` and `exported`."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass

import diffusers
import torch
from torch import nn


def f(*shape: int) -> torch.Tensor:
    """Numbers in [0, 1)."""
    return torch.rand(shape)


def n(*shape: int, value: int = 1) -> torch.Tensor:
    """Whole numbers."""
    return torch.full(shape, value)


@dataclass(frozen=True)
class Tiny:
    """The config of a tiny model, and the keyword arguments of one call of it; `flex`: the call has flex attention."""

    config: dict
    inputs: Callable[[], dict] | None
    flex: bool = False


def picture(*shape: int, text: tuple[int, ...] = (1, 5, 8), t: float = 0.5, **more) -> Callable[[], dict]:
    """The arguments of most transformers: `hidden_states`, `encoder_hidden_states`, `timestep`, and `more` shapes or values."""

    def make() -> dict:
        values = {name: f(*value) if isinstance(value, tuple) else value() for name, value in more.items()}
        words = {"encoder_hidden_states": f(*text)} if text else {}
        return {"hidden_states": f(*shape), "timestep": torch.full((1,), t)} | words | values

    return make


def mask(*shape: int) -> Callable[[], torch.Tensor]:
    return lambda: torch.ones(shape)


def whole(*shape: int, value: int = 1) -> Callable[[], torch.Tensor]:
    return lambda: n(*shape, value=value)


HEADS = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1}
SAME = {"in_channels": 4, "out_channels": 4}
JOINT = HEADS | {
    "attention_head_dim": 16,
    "in_channels": 16,
    "joint_attention_dim": 8,
    "num_single_layers": 1,
    "axes_dims_rope": (4, 6, 6),
}
WAN = (
    HEADS
    | SAME
    | {"attention_head_dim": 12, "text_dim": 8, "freq_dim": 16, "ffn_dim": 32, "num_layers": 1, "rope_max_seq_len": 16}
)
VIDEO = (1, 4, 2, 8, 8)
IDS = {"img_ids": (16, 3), "txt_ids": (5, 3)}
HUNYUAN = (
    HEADS
    | SAME
    | {
        "attention_head_dim": 16,
        "num_single_layers": 1,
        "num_refiner_layers": 1,
        "text_embed_dim": 8,
        "rope_axes_dim": (4, 6, 6),
    }
)
UNET = SAME | {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 8,
}
LTX = HEADS | SAME | {"cross_attention_dim": 16, "caption_channels": 8}
LTX2 = LTX | {
    "attention_head_dim": 12,
    "cross_attention_dim": 24,
    "audio_in_channels": 4,
    "audio_out_channels": 4,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 12,
    "audio_cross_attention_dim": 24,
}

TINY = {
    "AceStepTransformer1DModel": Tiny(
        {
            "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
                "num_key_value_heads": 1,
            "head_dim": 8, "in_channels": 24, "audio_acoustic_hidden_dim": 8, "encoder_hidden_size": 16, "sliding_window": 4,
        },
        picture(1, 8, 8, text=(1, 5, 16), timestep_r=(1,), context_latents=(1, 8, 16)),
    ),
    "AuraFlowTransformer2DModel": Tiny(
        SAME | {
            "num_attention_heads": 2, "attention_head_dim": 8, "sample_size": 8, "num_mmdit_layers": 1,
                "num_single_dit_layers": 1, "joint_attention_dim": 8,
            "caption_projection_dim": 16, "pos_embed_max_size": 16,
        },
        picture(1, 4, 8, 8),
    ),
    "CogVideoXTransformer3DModel": Tiny(
        HEADS | SAME | {
            "time_embed_dim": 8, "text_embed_dim": 8, "sample_width": 8, "sample_height": 8, "sample_frames": 5,
            "max_text_seq_length": 5,
        },
        picture(1, 2, 4, 8, 8),
    ),
    "ConsisIDTransformer3DModel": Tiny(
        HEADS | SAME | {
            "time_embed_dim": 8, "text_embed_dim": 8, "sample_width": 8, "sample_height": 8, "sample_frames": 5,
            "max_text_seq_length": 5,
        },
        picture(1, 2, 4, 8, 8),
    ),
    "DiTTransformer2DModel": Tiny(
        HEADS | {"in_channels": 4, "out_channels": 8, "sample_size": 8, "num_embeds_ada_norm": 10},
        picture(1, 4, 8, 8, text=(), class_labels=whole(1), timestep=whole(1)),
    ),
    "HunyuanDiT2DModel": Tiny(
        HEADS | {
            "in_channels": 4, "patch_size": 2, "sample_size": 8, "hidden_size": 16, "cross_attention_dim": 8, "num_layers": 2,
            "cross_attention_dim_t5": 8, "pooled_projection_dim": 8, "text_len": 4, "text_len_t5": 4,
        },
        picture(
            1, 4, 8, 8, text=(1, 4, 8), text_embedding_mask=whole(1, 4), encoder_hidden_states_t5=(1, 4, 8),
            text_embedding_mask_t5=whole(1, 4), image_meta_size=(1, 6), style=whole(1, value=0),
            image_rotary_emb=lambda: (f(16, 8), f(16, 8)),
        ),
    ),
    "LatteTransformer3DModel": Tiny(
        HEADS | SAME | {
            "patch_size": 2, "sample_size": 8, "cross_attention_dim": 16, "caption_channels": 8, "video_length": 2,
            "norm_type": "ada_norm_single", "num_embeds_ada_norm": 10, "norm_elementwise_affine": False,
        },
        picture(*VIDEO),
    ),
    "LuminaNextDiT2DModel": Tiny(
        {
            "sample_size": 8, "hidden_size": 16, "num_layers": 1, "num_attention_heads": 2, "num_kv_heads": 1, "multiple_of": 8,
            "cross_attention_dim": 8,
        },
        picture(1, 4, 8, 8, encoder_mask=mask(1, 5), image_rotary_emb=lambda: torch.ones(4, 4, 4, dtype=torch.complex64),
            cross_attention_kwargs=dict),
    ),
    "PixArtTransformer2DModel": Tiny(
        HEADS | {
            "in_channels": 4, "attention_head_dim": 12, "sample_size": 8, "caption_channels": 16, "cross_attention_dim": 24,
            "use_additional_conditions": True,
        },
        picture(
            1, 4, 8, 8, text=(1, 5, 16), timestep=whole(1),
            added_cond_kwargs=lambda: {"resolution": f(1, 2), "aspect_ratio": f(1, 1)},
        ),
    ),
    "SanaTransformer2DModel": Tiny(
        HEADS | SAME | {
            "sample_size": 8, "num_cross_attention_heads": 2, "cross_attention_head_dim": 8, "cross_attention_dim": 16,
            "caption_channels": 8,
        },
        picture(1, 4, 8, 8),
    ),
    "StableAudioDiTModel": Tiny(
        HEADS | SAME | {
            "sample_size": 8, "num_key_value_attention_heads": 1, "cross_attention_dim": 8, "time_proj_dim": 8,
            "global_states_input_dim": 8, "cross_attention_input_dim": 8,
        },
        picture(1, 4, 8, global_hidden_states=(1, 1, 8), rotary_embedding=lambda: (f(9, 4), f(9, 4))),
    ),
    "T5FilmDecoder": Tiny(
        {"input_dims": 8, "targets_length": 6, "d_model": 16, "num_layers": 1, "num_heads": 2, "d_kv": 8, "d_ff": 32},
        lambda: {
            "encodings_and_masks": [(f(1, 5, 16), torch.ones(1, 5))], "decoder_input_tokens": f(1, 6, 8),
            "decoder_noise_time": f(1),
        },
    ),
    "Transformer2DModel": Tiny(
        HEADS | {"in_channels": 16, "cross_attention_dim": 8, "norm_num_groups": 4},
        picture(1, 16, 8, 8),
    ),
    "DreamLiteTransformer2DModel": Tiny(
        HEADS | {"in_channels": 16, "cross_attention_dim": 8, "norm_num_groups": 4},
        picture(1, 16, 8, 8),
    ),
    "AllegroTransformer3DModel": Tiny(
        HEADS | SAME | {
            "attention_head_dim": 12, "cross_attention_dim": 24, "caption_channels": 8, "sample_height": 8, "sample_width": 8,
            "sample_frames": 2,
        },
        picture(
            *VIDEO, text=(1, 1, 5, 8), attention_mask=mask(1, 2, 8, 8), encoder_attention_mask=mask(1, 1, 5),
            image_rotary_emb=lambda: ([(f(2, 4), f(2, 4))] * 3, [n(1, 32)] * 3),
        ),
    ),
    "AnyFlowTransformer3DModel": Tiny(WAN, picture(1, 2, 4, 8, 8, timestep=(1, 2), r_timestep=(1, 2))),
    "AnyFlowFARTransformer3DModel": Tiny(
        WAN | {"chunk_partition": (1, 1)},
        picture(1, 2, 4, 8, 8, timestep=(1, 2), r_timestep=(1, 2), chunk_partition=lambda: (1, 1)),
        flex=True,
    ),
    "BriaTransformer2DModel": Tiny(JOINT, picture(1, 16, 16, **IDS)),
    "BriaFiboTransformer2DModel": Tiny(
        JOINT | {"text_encoder_dim": 8, "joint_attention_dim": 16},
        picture(1, 16, 16, text=(1, 5, 16), text_encoder_layers=lambda: [f(1, 5, 8), f(1, 5, 8)], **IDS),
    ),
    "BriaFibo2Transformer2DModel": Tiny(
        {
            "in_channels": 4, "dim": 32, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "cap_feat_dim": 8,
            "injection_layer_ids": (1,), "perceiver_num_layers": 1, "min_num_gist_tokens": 4, "max_num_gist_tokens": 8,
            "gist_step": 4, "gist_min_text_len": 4, "gist_max_text_len": 8, "axes_dims": (4, 6, 6), "axes_lens": (32, 16, 16),
        },
        picture(1, 4, 8, 8, text=(1, 2, 5, 8)),
    ),
    "ChromaTransformer2DModel": Tiny(
        JOINT | {"approximator_num_channels": 16, "approximator_hidden_dim": 16, "approximator_layers": 1},
        picture(1, 16, 16, **IDS),
    ),
    "ChronoEditTransformer3DModel": Tiny(WAN, picture(*VIDEO)),
    "CogView3PlusTransformer2DModel": Tiny(
        HEADS | SAME | {"text_embed_dim": 8, "time_embed_dim": 8, "condition_dim": 8, "pos_embed_max_size": 8, "sample_size": 8},
        picture(1, 4, 8, 8, original_size=(1, 2), target_size=(1, 2), crop_coords=(1, 2)),
    ),
    "CogView4Transformer2DModel": Tiny(
        HEADS | SAME | {
            "text_embed_dim": 8, "time_embed_dim": 8, "condition_dim": 8, "pos_embed_max_size": 8, "sample_size": 8,
            "rope_axes_dim": (8, 8),
        },
        picture(1, 4, 8, 8, original_size=(1, 2), target_size=(1, 2), crop_coords=(1, 2)),
    ),
    "CosmosTransformer3DModel": Tiny(
        HEADS | SAME | {"attention_head_dim": 12, "text_embed_dim": 8, "adaln_lora_dim": 4, "max_size": (4, 8, 8)},
        picture(*VIDEO, padding_mask=(1, 1, 8, 8), fps=lambda: 16),
    ),
    "EasyAnimateTransformer3DModel": Tiny(
        HEADS | SAME | {
            "attention_head_dim": 16, "patch_size": 2, "sample_width": 8, "sample_height": 8, "mmdit_layers": 1,
            "time_embed_dim": 8, "text_embed_dim": 8,
        },
        picture(*VIDEO),
    ),
    "ErnieImageTransformer2DModel": Tiny(
        SAME | {
            "hidden_size": 32, "num_attention_heads": 2, "num_layers": 1, "ffn_hidden_size": 32, "text_in_dim": 8,
            "rope_axes_dim": (4, 6, 6),
        },
        picture(1, 4, 8, 8, text=(), text_bth=(1, 5, 8), text_lens=whole(1, value=5)),
    ),
    "FluxTransformer2DModel": Tiny(
        JOINT | {"pooled_projection_dim": 8, "guidance_embeds": True},
        picture(1, 16, 16, pooled_projections=(1, 8), guidance=(1,), **IDS),
    ),
    "Flux2Transformer2DModel": Tiny(
        JOINT | {"timestep_guidance_channels": 8, "axes_dims_rope": (4, 4, 4, 4)},
        picture(1, 16, 16, guidance=(1,), img_ids=(16, 4), txt_ids=(5, 4)),
    ),
    "Flux3Transformer2DModel": Tiny(
        JOINT | {"cond_in_channels": 16, "timestep_channels": 8, "axes_dims_rope": (4, 4, 4, 4)},
        picture(1, 16, 16, img_ids=(16, 4), txt_ids=(5, 4)),
    ),
    "GlmImageTransformer2DModel": Tiny(
        HEADS | SAME | {"text_embed_dim": 8, "time_embed_dim": 8, "condition_dim": 8, "prior_vq_quantizer_codebook_size": 4},
        picture(
            1, 4, 8, 8, prior_token_id=whole(1, 16), prior_token_drop=lambda: torch.zeros(1, 16, dtype=torch.bool),
            target_size=(1, 2), crop_coords=(1, 2),
        ),
    ),
    "HeliosTransformer3DModel": Tiny(
        {key: value for key, value in WAN.items() if key != "rope_max_seq_len"} | {"rope_dim": (4, 4, 4)},
        picture(*VIDEO),
    ),
    "HiDreamImageTransformer2DModel": Tiny(
        HEADS | SAME | {
            "patch_size": 2, "num_single_layers": 1, "caption_channels": (8, 8), "text_emb_dim": 8, "num_routed_experts": 2,
            "num_activated_experts": 1, "axes_dims_rope": (4, 2, 2), "max_resolution": (8, 8), "llama_layers": (0, 1),
            "force_inference_output": True,
        },
        lambda: {
            "hidden_states": f(1, 4, 8, 8), "timesteps": f(1), "encoder_hidden_states_t5": f(1, 5, 8),
            "encoder_hidden_states_llama3": f(2, 1, 5, 8), "pooled_embeds": f(1, 8),
        },
    ),
    "HunyuanVideoTransformer3DModel": Tiny(
        HUNYUAN | {"pooled_projection_dim": 8},
        picture(*VIDEO, encoder_attention_mask=mask(1, 5), pooled_projections=(1, 8), guidance=(1,)),
    ),
    "HunyuanVideo15Transformer3DModel": Tiny(
        {key: value for key, value in HUNYUAN.items() if key != "num_single_layers"} | {
            "text_embed_2_dim": 8, "image_embed_dim": 8, "target_size": 8, "task_type": "t2v",
        },
        picture(
            *VIDEO, encoder_attention_mask=mask(1, 5), encoder_hidden_states_2=(1, 5, 8),
            encoder_attention_mask_2=mask(1, 5), image_embeds=(1, 3, 8),
        ),
    ),
    "HunyuanVideoFramepackTransformer3DModel": Tiny(
        HUNYUAN | {"pooled_projection_dim": 8, "has_image_proj": True, "image_proj_dim": 8, "has_clean_x_embedder": True},
        picture(
            *VIDEO, encoder_attention_mask=mask(1, 5), pooled_projections=(1, 8), guidance=(1,), image_embeds=(1, 3, 8),
            indices_latents=whole(2), latents_clean=(1, 4, 1, 8, 8), indices_latents_clean=whole(1),
            latents_history_2x=(1, 4, 2, 8, 8), indices_latents_history_2x=whole(2),
            latents_history_4x=(1, 4, 4, 8, 8), indices_latents_history_4x=whole(4),
        ),
    ),
    "HunyuanImageTransformer2DModel": Tiny(
        HUNYUAN | {"rope_axes_dim": (8, 8)},
        picture(1, 4, 8, 8, encoder_attention_mask=mask(1, 5)),
    ),
    "Ideogram4Transformer2DModel": Tiny(
        HEADS | {
            "in_channels": 8, "attention_head_dim": 16, "intermediate_size": 32, "adaln_dim": 8, "llm_features_dim": 16,
            "mrope_section": (4, 2, 2),
        },
        picture(
            1, 21, 8, text=(1, 21, 16), position_ids=whole(1, 21, 3), segment_ids=whole(1, 21),
            indicator=lambda: torch.cat([n(1, 5, value=3), n(1, 16, value=2)], 1),
        ),
    ),
    "JoyImageEditTransformer3DModel": Tiny(
        SAME | {
            "hidden_size": 32, "num_attention_heads": 2, "text_dim": 8, "num_layers": 1, "rope_dim_list": (4, 6, 6),
        },
        picture(1, 1, *VIDEO[1:]),
    ),
    "JoyImageEditPlusTransformer3DModel": Tiny(
        SAME | {
            "hidden_size": 32, "num_attention_heads": 2, "text_dim": 8, "num_layers": 1, "rope_dim_list": (4, 6, 6),
        },
        picture(1, 16, 4, 1, 2, 2, encoder_hidden_states_mask=mask(1, 5), shape_list=lambda: [[(1, 4, 4)]]),
    ),
    "Kandinsky5Transformer3DModel": Tiny(
        {
            "in_text_dim": 8, "in_text_dim2": 8, "time_dim": 8, "model_dim": 32, "ff_dim": 32, "num_text_blocks": 1,
            "num_visual_blocks": 1, "axes_dims": (4, 6, 6),
        },
        picture(
            1, 2, 8, 8, 4, pooled_projections=(1, 8), text_rope_pos=lambda: torch.arange(5),
            visual_rope_pos=lambda: [torch.arange(2), torch.arange(4), torch.arange(4)],
        ),
    ),
    "Kandinsky6Transformer3DModel": Tiny(
        {
            "in_visual_dim": 4, "out_visual_dim": 4, "in_text_dim": 8, "in_text_dim2": 8, "time_dim": 8, "model_dim": 32,
            "ff_dim": 32, "num_text_blocks": 1, "num_visual_blocks": 1, "axes_dims": (4, 6, 6), "visual_cond": False,
        },
        picture(1, 2, 8, 8, 4, pooled_projections=(1, 8)),
    ),
    "Kandinsky6SRTransformer3DModel": Tiny(
        {
            "in_visual_dim": 4, "out_visual_dim": 4, "time_dim": 8, "model_dim": 32, "ff_dim": 32, "num_visual_blocks": 1,
            "axes_dims": (4, 6, 6), "nabla_window": (3, 3, 3), "tile_sizes": ((8, 8),),
        },
        picture(1, 2, 8, 8, 9, text=()),
        flex=True,
    ),
    "Krea2Transformer2DModel": Tiny(
        HEADS | {
            "in_channels": 8, "attention_head_dim": 16, "num_key_value_heads": 1, "intermediate_size": 32,
            "timestep_embed_dim": 8, "text_hidden_dim": 16, "num_text_layers": 2, "text_num_attention_heads": 2,
            "text_num_key_value_heads": 2, "text_intermediate_size": 16, "num_layerwise_text_blocks": 1,
            "num_refiner_text_blocks": 1, "axes_dims_rope": (4, 6, 6),
        },
        picture(1, 16, 8, text=(1, 5, 2, 16), position_ids=(21, 3)),
    ),
    "LongCatAudioDiTTransformer": Tiny(
        {"dit_dim": 32, "dit_depth": 2, "dit_heads": 2, "dit_text_dim": 8, "latent_dim": 8, "ff_mult": 1.0},
        picture(1, 16, 8, encoder_attention_mask=lambda: torch.ones(1, 5, dtype=torch.bool), latent_cond=(1, 16, 8)),
    ),
    "LongCatImageTransformer2DModel": Tiny(JOINT | {"pooled_projection_dim": 8}, picture(1, 16, 16, **IDS)),
    "LTXVideoTransformer3DModel": Tiny(
        LTX,
        picture(
            1, 32, 4, encoder_attention_mask=mask(1, 5), num_frames=lambda: 2, height=lambda: 4, width=lambda: 4,
        ),
    ),
    "LTX2VideoTransformer3DModel": Tiny(
        LTX2,
        picture(
            1, 32, 4, audio_hidden_states=(1, 6, 4), audio_encoder_hidden_states=(1, 5, 8), num_frames=lambda: 2,
            height=lambda: 4, width=lambda: 4, audio_num_frames=lambda: 6, encoder_attention_mask=mask(1, 5),
            audio_encoder_attention_mask=mask(1, 5),
        ),
    ),
    "Lumina2Transformer2DModel": Tiny(
        {
            "sample_size": 8, "in_channels": 4, "hidden_size": 24, "num_layers": 1, "num_refiner_layers": 1,
            "num_attention_heads": 3, "num_kv_heads": 1, "multiple_of": 8, "axes_dim_rope": (4, 2, 2),
            "axes_lens": (16, 16, 16), "cap_feat_dim": 8,
        },
        picture(1, 4, 8, 8, encoder_attention_mask=lambda: torch.ones(1, 5, dtype=torch.bool)),
    ),
    "MiniMaxH3Transformer3DModel": Tiny(
        HEADS | {
            "hidden_size": 16, "num_refiner_layers": 1, "ffn_dim": 32, "in_channels": 4, "audio_in_channels": 4, "text_dim": 8,
            "freq_dim": 8, "time_embed_hidden_dim": 16, "time_embed_dim": 8, "rope_freq_dim": 2, "attention_head_dim": 16,
        },
        picture(
            1, 16, 16, audio_hidden_states=(1, 3, 4), timestep_indices=whole(24, value=0), position_ids=whole(24, 3),
            token_tags=lambda: torch.tensor([1] * 5 + [0] * 16 + [2] * 3), text_indices=lambda: torch.arange(5),
            video_indices=lambda: torch.arange(5, 21), audio_indices=lambda: torch.arange(21, 24),
        ),
    ),
    "MiniMaxMusic3Transformer1DModel": Tiny(
        HEADS | {"in_channels": 4, "condition_dim": 8, "ff_inner_dim": 32, "rotary_dim": 4, "fourier_embedding_dim": 8},
        picture(1, 4, 16, text=(1, 16, 8)),
    ),
    "MochiTransformer3DModel": Tiny(
        HEADS | {
            "num_attention_heads": 3, "in_channels": 4, "pooled_projection_dim": 8, "text_embed_dim": 8, "time_embed_dim": 8,
            "max_sequence_length": 5,
        },
        picture(*VIDEO, encoder_attention_mask=lambda: torch.ones(1, 5, dtype=torch.bool)),
    ),
    "MotifVideoTransformer3DModel": Tiny(
        HEADS | SAME | {
            "attention_head_dim": 16, "num_single_layers": 1, "text_embed_dim": 8, "rope_axes_dim": (4, 6, 6),
        },
        picture(*VIDEO),
    ),
    "NucleusMoEImageTransformer2DModel": Tiny(
        HEADS | {
            "in_channels": 16, "num_attention_heads": 3, "attention_head_dim": 16, "num_layers": 5,
                "joint_attention_dim": 8, "axes_dims_rope": (4, 6, 6),
            "num_experts": 2, "moe_intermediate_dim": 16, "capacity_factors": [1.0] * 5,
        },
        picture(1, 16, 16, img_shapes=lambda: [(1, 4, 4)], encoder_hidden_states_mask=mask(1, 5)),
    ),
    "OmniGenTransformer2DModel": Tiny(
        {
            "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 32, "num_layers": 1,
            "pad_token_id": 0, "vocab_size": 16, "max_position_embeddings": 64, "original_max_position_embeddings": 64,
            "pos_embed_max_size": 8, "time_step_dim": 8,
            "rope_scaling": {"long_factor": [1.0] * 4, "short_factor": [1.0] * 4, "type": "su"},
        },
        picture(
            1, 4, 8, 8, text=(), input_ids=whole(1, 5), input_img_latents=list, input_image_sizes=dict,
            attention_mask=mask(1, 22, 22), position_ids=lambda: torch.arange(22)[None],
        ),
    ),
    "OvisImageTransformer2DModel": Tiny(JOINT | {"out_channels": 16}, picture(1, 16, 16, **IDS)),
    "PRXTransformer2DModel": Tiny(
        {"in_channels": 4, "context_in_dim": 8, "hidden_size": 32, "num_heads": 2, "depth": 1, "axes_dim": (8, 8)},
        picture(1, 4, 8, 8),
    ),
    "QwenImageTransformer2DModel": Tiny(
        HEADS | {"in_channels": 16, "out_channels": 4, "attention_head_dim": 16, "joint_attention_dim": 8,
            "axes_dims_rope": (4, 6, 6)},
        picture(1, 16, 16, encoder_hidden_states_mask=mask(1, 5), img_shapes=lambda: [[(1, 4, 4)]]),
    ),
    "QwenImage21Transformer2DModel": Tiny(
        HEADS | {"in_channels": 16, "out_channels": 16, "attention_head_dim": 16, "context_in_dim": 8,
            "axes_dims_rope": (4, 6, 6)},
        picture(1, 16, 16, encoder_hidden_states_mask=mask(1, 5), img_shapes=lambda: [[(1, 4, 4)]],
            img_mask=lambda: torch.cat([torch.zeros(1, 5), torch.ones(1, 4)], 1).bool()),
    ),
    "SanaVideoTransformer3DModel": Tiny(
        HEADS | SAME | {
            "attention_head_dim": 12, "sample_size": 8, "num_cross_attention_heads": 2, "cross_attention_head_dim": 12,
            "cross_attention_dim": 24, "caption_channels": 8, "rope_max_seq_len": 16,
        },
        picture(*VIDEO),
    ),
    "SanaWMTransformer3DModel": Tiny(
        {
            "in_channels": 4, "num_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "linear_head_dim": 16,
            "softmax_every_n": 2, "caption_channels": 8, "chunk_plucker_channels": 4, "chunk_plucker_post_attn_blocks": 1,
        },
        picture(1, 4, 2, 4, 4, text=(1, 1, 5, 8), timestep=(1, 1, 2), encoder_attention_mask=mask(1, 5)),
    ),
    "SanaWMLTX2RefinerTransformer3DModel": Tiny(
        LTX2, picture(1, 32, 4, timestep=(1, 32), video_rotary_emb=lambda: (f(1, 32, 24), f(1, 32, 24))),
    ),
    "SD3Transformer2DModel": Tiny(
        HEADS | SAME | {
            "sample_size": 8, "joint_attention_dim": 8, "caption_projection_dim": 16, "pooled_projection_dim": 8,
            "pos_embed_max_size": 8, "dual_attention_layers": (0,), "num_layers": 2,
        },
        picture(1, 4, 8, 8, pooled_projections=(1, 8)),
    ),
    "SkyReelsV2Transformer3DModel": Tiny(WAN, picture(*VIDEO)),
    "StableAudio3DiTModel": Tiny(
        {
            "io_channels": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "cond_token_dim": 8, "global_cond_dim": 8,
            "local_add_cond_dim": 9, "timestep_features_dim": 8, "num_memory_tokens": 2, "ff_mult": 2.0,
        },
        picture(1, 8, 16, global_hidden_states=(1, 8), local_add_cond=(1, 9, 16)),
    ),
    "TransformerTemporalModel": Tiny(
        HEADS | {"in_channels": 16, "norm_num_groups": 4},
        lambda: {"hidden_states": f(2, 16, 8, 8), "num_frames": 2},
    ),
    "WanTransformer3DModel": Tiny(WAN, picture(*VIDEO)),
    "WanAnimateTransformer3DModel": Tiny(
        WAN | {
            "in_channels": 12, "latent_channels": 4, "image_dim": 8, "motion_encoder_channel_sizes": {"4": 16, "8": 16, "16": 16},
            "motion_encoder_size": 16, "motion_style_dim": 8, "motion_dim": 4, "motion_encoder_dim": 8,
            "face_encoder_hidden_dim": 16, "face_encoder_num_heads": 2, "inject_face_latents_blocks": 1,
        },
        picture(
            1, 12, 3, 8, 8, encoder_hidden_states_image=(1, 3, 8), pose_hidden_states=(1, 4, 2, 8, 8),
            face_pixel_values=(1, 3, 5, 16, 16),
        ),
    ),
    "WanAnimate2Transformer3DModel": Tiny(
        {
            "text_len": 5, "in_dim": 4, "dim": 24, "ffn_dim": 32, "freq_dim": 16, "text_dim": 8, "out_dim": 4, "num_heads": 2,
            "num_layers": 1,
        },
        None,
    ),
    "WanVACETransformer3DModel": Tiny(
        WAN | {"vace_layers": [0], "vace_in_channels": 8},
        picture(*VIDEO, control_hidden_states=(1, 8, 2, 8, 8)),
    ),
    "ZImageTransformer2DModel": Tiny(
        {
            "in_channels": 4, "dim": 48, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 3, "n_kv_heads": 3, "cap_feat_dim": 8,
            "axes_dims": [4, 6, 6], "axes_lens": [64, 16, 16],
        },
        lambda: {"x": [f(4, 1, 8, 8)], "t": f(1), "cap_feats": [f(5, 8)]},
    ),
    "Cosmos3OmniTransformer": Tiny(
        {
            "head_dim": 16, "hidden_size": 32, "intermediate_size": 32, "latent_channel": 4, "num_attention_heads": 2,
            "num_hidden_layers": 1, "num_key_value_heads": 1, "patch_latent_dim": 16, "vocab_size": 16,
            "rope_scaling": {"mrope_section": [4, 2, 2], "rope_type": "default"},
        },
        None,
    ),
    "RFD4ProteinaTransformer": Tiny(
        {
            "nlayers": 2, "token_dim": 16, "nheads": 2, "dim_cond": 8, "pair_repr_dim": 8, "latent_dim": 8, "t_emb_dim": 8,
            "tri_mult_c": 8,
        },
        None,
    ),
    "UNet1DModel": Tiny(
        {
            "sample_size": 16, "extra_in_channels": 64, "block_out_channels": (32, 32),
            "down_block_types": ("DownBlock1DNoSkip", "AttnDownBlock1D"), "up_block_types": ("AttnUpBlock1D", "UpBlock1DNoSkip"),
        },
        lambda: {"sample": f(1, 2, 16), "timestep": f(1)},
    ),
    "UNet2DModel": Tiny(
        {
            "sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 8,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        },
        lambda: {"sample": f(1, 3, 8, 8), "timestep": n(1)},
    ),
    "UNet2DConditionModel": Tiny(
        UNET | {
            "attention_head_dim": 8, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        },
        lambda: {"sample": f(1, 4, 8, 8), "timestep": n(1), "encoder_hidden_states": f(1, 5, 8)},
    ),
    "UNet3DConditionModel": Tiny(
        UNET | {
            "attention_head_dim": 8, "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
            "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
        },
        lambda: {"sample": f(*VIDEO), "timestep": n(1), "encoder_hidden_states": f(1, 5, 8)},
    ),
    "DreamLiteUNetModel": Tiny(
        UNET | {
            "attention_head_dim": 8, "down_block_types": ("DreamLiteCrossAttnNoSelfAttnDownBlock2D",) * 2,
            "up_block_types": ("DreamLiteCrossAttnNoSelfAttnUpBlock2D",) * 2,
        },
        lambda: {"sample": f(1, 4, 8, 8), "timestep": n(1), "encoder_hidden_states": f(1, 5, 8)},
    ),
    "I2VGenXLUNet": Tiny(
        UNET | {
            "attention_head_dim": 8, "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
            "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
        },
        lambda: {
            "sample": f(*VIDEO), "timestep": n(1), "fps": n(1), "image_latents": f(*VIDEO), "image_embeddings": f(1, 8),
            "encoder_hidden_states": f(1, 5, 8),
        },
    ),
    "Kandinsky3UNet": Tiny(
        {
            "time_embedding_dim": 8, "groups": 4, "attention_head_dim": 8, "layers_per_block": 2, "block_out_channels": (8,) * 4,
            "cross_attention_dim": 8, "encoder_hid_dim": 8,
        },
        lambda: {
            "sample": f(1, 4, 16, 16), "timestep": n(1), "encoder_hidden_states": f(1, 5, 8),
            "encoder_attention_mask": torch.ones(1, 5),
        },
    ),
    "UNetMotionModel": Tiny(
        UNET | {
            "num_attention_heads": 2, "motion_num_attention_heads": 2, "motion_max_seq_length": 4,
            "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
            "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"),
        },
        lambda: {"sample": f(*VIDEO), "timestep": n(1), "encoder_hidden_states": f(2, 5, 8)},
    ),
    "UNetSpatioTemporalConditionModel": Tiny(
        {
            "sample_size": 8, "block_out_channels": (32, 32), "layers_per_block": 1, "cross_attention_dim": 8, "num_frames": 2,
            "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 24, "num_attention_heads": (2, 2),
            "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        },
        lambda: {"sample": f(1, 2, 8, 8, 8), "timestep": n(1), "encoder_hidden_states": f(1, 5, 8), "added_time_ids": f(1, 3)},
    ),
    "StableCascadeUNet": Tiny(
        {
            "in_channels": 4, "out_channels": 4, "conditioning_dim": 16, "block_out_channels": (16, 32),
            "num_attention_heads": (0, 2), "down_num_layers_per_block": (1, 1), "up_num_layers_per_block": (1, 1),
            "clip_text_in_channels": 8, "clip_text_pooled_in_channels": 8, "clip_image_in_channels": 8, "switch_level": (False,),
            "block_types_per_layer": (
                ("SDCascadeResBlock", "SDCascadeTimestepBlock"),
                ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),
            ),
        },
        lambda: {
            "sample": f(1, 4, 8, 8), "timestep_ratio": f(1), "clip_text_pooled": f(1, 1, 8), "clip_text": f(1, 5, 8),
            "clip_img": f(1, 1, 8),
        },
    ),
    "AudioLDM2UNet2DConditionModel": Tiny(
        UNET | {
            "attention_head_dim": 8, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        },
        lambda: {"sample": f(1, 4, 8, 8), "timestep": n(1), "encoder_hidden_states": f(1, 5, 8)},
    ),
    "UniDiffuserModel": Tiny(
        HEADS | SAME | {
            "text_dim": 8, "clip_img_dim": 8, "num_text_tokens": 5, "patch_size": 2, "sample_size": 8, "num_layers": 2,
            "norm_type": "layer_norm", "block_type": "unidiffuser", "pre_layer_norm": False, "use_patch_pos_embed": False,
            "ff_final_dropout": True, "use_data_type_embedding": True,
        },
        lambda: {
            "latent_image_embeds": f(1, 4, 8, 8), "image_embeds": f(1, 1, 8), "prompt_embeds": f(1, 5, 8),
            "timestep_img": n(1), "timestep_text": n(1),
        },
    ),
    "UVit2DModel": Tiny(
        {
            "hidden_size": 16, "cond_embed_dim": 8, "micro_cond_encode_dim": 4, "micro_cond_embed_dim": 20,
            "encoder_hidden_size": 8, "vocab_size": 12, "codebook_size": 8, "in_channels": 16, "block_out_channels": 16,
            "num_res_blocks": 1, "block_num_heads": 2, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
            "sample_size": 8,
        },
        lambda: {
            "input_ids": n(1, 8, 8), "encoder_hidden_states": f(1, 5, 8), "pooled_text_emb": f(1, 8), "micro_conds": f(1, 5),
        },
    ),
}  # fmt: skip

OTHER = {  # models outside the folders of diffusers whose models do not denoise
    "AceStepAudioTokenDetokenizer": "autoencoders", "AceStepAudioTokenizer": "autoencoders",
    "AceStepConditionEncoder": "encoders of conditions", "AudioLDM2ProjectionModel": "encoders of conditions",
    "CLIPImageProjection": "encoders of conditions", "Ideogram4PromptEnhancerHead": "encoders of conditions",
    "MiniMaxMusic3RVQDepthDecoder": "language models", "MotionAdapter": "adapters", "PriorTransformer": "priors",
    "ReduxImageEncoder": "encoders of conditions", "StableAudio3DurationEmbedder": "encoders of conditions",
    "StableAudioProjectionModel": "encoders of conditions", "UniDiffuserTextDecoder": "language models",
}  # fmt: skip


@functools.cache
def exported() -> dict[str, type[nn.Module]]:
    """Every model class by the name under which `diffusers` or `diffusers.models` exports it."""
    found = {}
    for module in (diffusers, diffusers.models):
        for name in dir(module):
            cls = getattr(module, name, None)
            if inspect.isclass(cls) and issubclass(cls, diffusers.ModelMixin) and cls is not diffusers.ModelMixin:
                found[name] = cls
    return found
