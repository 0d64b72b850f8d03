"""A packed denoiser in diffusers' own pipelines draws the pictures of the folded one. Random tiny components; no network."""

import copy

import diffusers
import pytest
import torch

import sparsedm
from sparsedm.checkpoints import folders
from sparsedm.masking import layers
from sparsedm.packing import kernels, packed

pytestmark = pytest.mark.skipif(not kernels.available(), reason="no C++ compiler for the packed kernels")


def _vae():
    return diffusers.AutoencoderKL(block_out_channels=(8,), latent_channels=4, norm_num_groups=4, sample_size=8).eval()


def _unet(make_model):
    return make_model("unet", num_class_embeds=None, in_channels=3, out_channels=3)


def ddpm(make_model):
    pipeline = diffusers.DDPMPipeline(_unet(make_model), diffusers.DDPMScheduler())
    return pipeline, "unet", {"batch_size": 2, "num_inference_steps": 3}


def ddim(make_model):
    pipeline = diffusers.DDIMPipeline(_unet(make_model), diffusers.DDIMScheduler())
    return pipeline, "unet", {"batch_size": 2, "num_inference_steps": 3}


def dit(make_model):
    transformer = diffusers.DiTTransformer2DModel(
        2, 8, in_channels=4, out_channels=8, num_layers=2, sample_size=8, num_embeds_ada_norm=1000
    )
    pipeline = diffusers.DiTPipeline(transformer.eval(), _vae(), diffusers.DDIMScheduler())
    return pipeline, "transformer", {"class_labels": [1, 7], "num_inference_steps": 3}


def stable_diffusion(make_model):
    transformers = pytest.importorskip("transformers")
    unet = diffusers.UNet2DConditionModel(
        8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, attention_head_dim=8, cross_attention_dim=24,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    words = ["<start>", "<|endoftext|>", *"abcdef", *(f"{letter}</w>" for letter in "abcdef")]
    tokens = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "vocab_size": len(words)}
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text_encoder = transformers.CLIPTextModel(transformers.CLIPTextConfig(**sizes, **tokens)).eval()
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = transformers.CLIPTokenizer(vocabulary, [], bos_token="<start>", model_max_length=77)
    pipeline = diffusers.StableDiffusionPipeline(
        _vae(), text_encoder, tokenizer, unet.eval(), diffusers.DDIMScheduler(), None, None, requires_safety_checker=False
    )
    return pipeline, "unet", {"prompt": ["a bad cab", "dead"], "num_inference_steps": 3, "height": 8, "width": 8}


def draw(pipeline, options) -> torch.Tensor:
    """Pictures in [0, 1], always from the same noise."""
    pipeline.set_progress_bar_config(disable=True)
    return torch.from_numpy(pipeline(**options, generator=torch.manual_seed(1), output_type="np").images)


@pytest.mark.parametrize("build", [ddpm, ddim, dit, stable_diffusion], ids=lambda build: build.__name__)
def test_a_packed_denoiser_draws_the_pictures_of_the_folded_one(build, make_model, tmp_path):
    pipeline, part, options = build(make_model)
    dense = draw(pipeline, options)
    folded = layers.fold(layers.sparsify(getattr(pipeline, part)))
    expected = draw(pipeline, options)
    assert expected.std() > 0 and (expected - dense).abs().max() > 1e-3  # pictures, and others than the dense model's
    fast = sparsedm.pack(copy.deepcopy(folded), backend="kernel")
    assert packed.has_packed(fast)
    pipeline.register_modules(**{part: fast})
    torch.testing.assert_close(draw(pipeline, options), expected, rtol=0, atol=1e-4)
    pipeline.save_pretrained(tmp_path)
    again = type(pipeline).from_pretrained(tmp_path)
    torch.testing.assert_close(draw(again, options), expected, rtol=0, atol=1e-4)
    assert all(torch.equal(value, folders.load(tmp_path).state_dict()[key]) for key, value in folded.state_dict().items())
