"""Every class of denoiser goes the whole way, at tiny size: sparsify, finetune, fold, pack, save, load, count, report.

`python tests/test_denoisers.py` prints the table of the README from what is tested here.
"""

import copy
import re
from dataclasses import dataclass
from pathlib import Path

import diffusers
import pytest
import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import Dataset
from torch.utils.flop_counter import FlopCounterMode

import sparsedm
from sparsedm import diffusion
from sparsedm.checkpoints import folders
from sparsedm.masking import layers
from sparsedm.measure import macs
from sparsedm.models import denoisers
from sparsedm.models.denoisers import each
from sparsedm.models.uvit import UViTModel
from sparsedm.packing import kernels, packed, tuning
from sparsedm.pruning import diffpruning
from sparsedm.training import distill

BLOCKS = r"(single_)?transformer_blocks\.\d+\.(attn\d?\..*|ff(_context)?\..*|proj_mlp|proj_out)"
EDGES = r"(?!conv_in|conv_out|.*temp_convs).*"
_TEXT_UNET = {
    "sample_size": 8, "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8, "attention_head_dim": 8,
    "cross_attention_dim": 24,
}  # fmt: skip
_SPATIAL = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}  # fmt: skip
_HEADS = {"num_attention_heads": 2, "in_channels": 4, "num_layers": 2}
_PATCHES = {"sample_size": 8, "patch_size": 2}


@dataclass(frozen=True)
class Case:
    """A class, its tiny config, and the names of the layers that are sparse by default."""

    cls: type
    config: dict
    sparse: str
    picture: tuple[int, ...] = (4, 8, 8)


CASES = {
    "UViTModel": Case(
        UViTModel, {"sample_size": 8, "in_channels": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 5},
        r".*blocks?\..*",
    ),
    "UNet2DModel": Case(
        diffusers.UNet2DModel,
        {
            "sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": (8, 16), "layers_per_block": 1,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            "norm_num_groups": 4, "attention_head_dim": 8,
        },
        EDGES,
    ),
    "UNet2DConditionModel (SD 1, 2)": Case(diffusers.UNet2DConditionModel, _TEXT_UNET | _SPATIAL, EDGES),
    "UNet2DConditionModel (SDXL)": Case(
        diffusers.UNet2DConditionModel,
        _TEXT_UNET | _SPATIAL | {
            "addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 64,
            "use_linear_projection": True, "transformer_layers_per_block": (1, 2),
        },
        EDGES,
    ),
    "DiTTransformer2DModel": Case(
        diffusers.DiTTransformer2DModel,
        _HEADS | _PATCHES | {"attention_head_dim": 8, "out_channels": 8, "num_embeds_ada_norm": 10},
        BLOCKS,
    ),
    "PixArtTransformer2DModel": Case(
        diffusers.PixArtTransformer2DModel,
        _HEADS | _PATCHES | {
            "attention_head_dim": 12, "caption_channels": 16, "cross_attention_dim": 24, "use_additional_conditions": True,
        },
        BLOCKS,
    ),
    "SD3Transformer2DModel": Case(
        diffusers.SD3Transformer2DModel,
        _HEADS | _PATCHES | {
            "attention_head_dim": 8, "joint_attention_dim": 24, "caption_projection_dim": 16, "pooled_projection_dim": 24,
            "out_channels": 4, "pos_embed_max_size": 8, "qk_norm": "rms_norm", "dual_attention_layers": (0,),
        },
        BLOCKS,
    ),
    "FluxTransformer2DModel": Case(
        diffusers.FluxTransformer2DModel,
        {
            "num_attention_heads": 2, "in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16,
            "joint_attention_dim": 24, "pooled_projection_dim": 24, "axes_dims_rope": (4, 4, 8), "guidance_embeds": True,
        },
        BLOCKS,
    ),
    "UNet3DConditionModel": Case(
        diffusers.UNet3DConditionModel,
        _TEXT_UNET | {
            "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"), "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
        },
        EDGES, (4, 2, 8, 8),
    ),
    "UNet1DModel": Case(
        diffusers.UNet1DModel,
        {
            "sample_size": 16, "extra_in_channels": 64, "block_out_channels": (32, 32),
            "down_block_types": ("DownBlock1DNoSkip", "AttnDownBlock1D"), "up_block_types": ("AttnUpBlock1D", "UpBlock1DNoSkip"),
        },
        r".*attentions.*", (2, 16),
    ),
}  # fmt: skip
FLOWS = ("SD3Transformer2DModel", "FluxTransformer2DModel")
every_class = pytest.mark.parametrize("name", CASES)
needs_kernels = pytest.mark.skipif(not kernels.available(), reason="no C++ compiler for the packed kernels")


def make(name: str, **changes) -> nn.Module:
    torch.manual_seed(0)
    return CASES[name].cls(**CASES[name].config | changes).eval()


def conditioning(model: nn.Module, batch: int) -> dict:
    """Random values for what conditions `model`, with 6 tokens of text."""
    generator = torch.Generator().manual_seed(1)
    found = denoisers.of(model).conditioning(model, lambda *shape: torch.rand(batch, *shape, generator=generator))
    return each(lambda x: x[:, :6] if x.dim() == 3 else x, found)


def call(name: str, model: nn.Module, batch: int = 2) -> torch.Tensor:
    x = torch.randn(batch, *CASES[name].picture, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return denoisers.of(model).predict(model, x, torch.tensor([3, 700, 31])[:batch], conditioning(model, batch))


def small_inputs(name: str, model: nn.Module) -> dict:
    """The inputs of one call, as example_inputs, for the sizes of this file."""
    kind, zeros = denoisers.of(model), torch.zeros
    picture = {kind.picture: zeros(1, *CASES[name].picture), "timestep": torch.zeros(1)} | conditioning(model, 1)
    if name == "FluxTransformer2DModel":
        picture |= {"hidden_states": zeros(1, 16, 16), "img_ids": zeros(16, 3), "txt_ids": zeros(6, 3)}
    return picture


class Pictures(Dataset):
    """Noise as pictures with random conditioning; labels where the model takes just these."""

    def __init__(self, name: str, model: nn.Module, n: int = 4):
        self.pictures = torch.randn(n, *CASES[name].picture, generator=torch.Generator().manual_seed(3))
        self.conditioning, self.labels = conditioning(model, n), denoisers.null_label(model) is not None

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int):
        return self.pictures[index], 1 if self.labels else each(lambda x: x[index], self.conditioning)


STEP = {"steps": 1, "batch_size": 4, "lr": 1e-2}


# --- the whole way ----------------------------------------------------------------------------------------------------


@every_class
def test_edges_and_embeddings_stay_dense(name):
    model = layers.sparsify(make(name))
    expected = {layer for layer, _ in layers.weight_layers(model) if re.fullmatch(CASES[name].sparse, layer)}
    assert {layer for layer, _ in layers.nm_layers(model)} == expected and expected
    assert all(module.dense_reason for layer, module in layers.weight_layers(model) if layer not in expected)


@every_class
def test_finetune_fold_save_load_count_and_report(name, tmp_path):
    teacher = make(name)
    student = layers.sparsify(copy.deepcopy(teacher))
    before = {layer: module.weight.clone() for layer, module in layers.nm_layers(student)}
    (state,) = distill.finetune(student, teacher, Pictures(name, teacher), **STEP)
    assert state.terms["noise"] > 0 and state.terms["teacher"] > 0
    for layer, weight in before.items():
        assert not torch.equal(student.get_submodule(layer).weight, weight), layer
    expected, inputs = call(name, student), small_inputs(name, teacher)
    folded = layers.fold(student)
    assert torch.equal(call(name, folded), expected) and not torch.equal(call(name, teacher), expected)
    folders.save(folded, tmp_path / "plain")
    folders.save_packed(folded, tmp_path / "packed")
    for folder in ("plain", "packed"):
        assert torch.equal(call(name, folders.load(tmp_path / folder)), expected)
    counts, rows = macs.count(folded, inputs), sparsedm.report(folded, inputs).rows
    assert {row.name for row in rows if row.state == "folded"} == set(before)
    assert len(rows) == sum(1 for _ in layers.weight_layers(folded)) and all(row.note for row in rows if row.state == "dense")
    halves = sum(counts.by_name[layer].dense for layer in before) / 2
    assert counts.sparse == counts.dense - halves and halves > 0


@needs_kernels
@every_class
def test_packed_models_draw_the_same_and_unpack_exactly(name):
    folded = layers.fold(layers.sparsify(make(name)))
    fast, inputs = sparsedm.pack(copy.deepcopy(folded), backend="kernel"), small_inputs(name, folded)
    assert sum(map(packed.is_packed, fast.modules())) == len(layers.patterns(folded))
    torch.testing.assert_close(call(name, fast), call(name, folded), rtol=1e-4, atol=1e-5)
    assert macs.count(fast, inputs).executed == macs.count(folded, inputs).sparse
    back = sparsedm.unpack(fast).state_dict()
    assert all(torch.equal(value, back[key]) for key, value in folded.state_dict().items())


@every_class
def test_calibration_errs_less_than_magnitude(name):
    model, teacher = make(name), make(name)
    magnitude = layers.fold(layers.sparsify(make(name)))
    states = list(sparsedm.calibrate(model, Pictures(name, model, n=32), n=64, batch_size=32, packages=6))
    assert {s.name for s in states} == set(layers.patterns(magnitude)) == set(layers.patterns(model))
    assert sum(s.after for s in states) < 0.8 * sum(s.before for s in states)
    outputs = [call(name, m, batch=3) for m in (teacher, model, magnitude)]
    assert F.mse_loss(outputs[0], outputs[1]) < F.mse_loss(outputs[0], outputs[2])


def test_text_models_are_calibrated_on_their_own_trajectories():
    name = "UNet2DConditionModel (SDXL)"
    model, given = make(name), conditioning(make(name), 6)
    options = {"conditioning": given, "negative": each(torch.zeros_like, given), "guidance": 1.5, "steps": 3, "batch_size": 4}
    states = list(sparsedm.calibrate(model, weights="obs-diff", packages=2, **options))
    assert sum(s.after for s in states) < 0.8 * sum(s.before for s in states)
    with pytest.raises(ValueError, match="needs encoder_hidden_states, .*; pass it in conditioning="):
        next(sparsedm.calibrate(make(name)))
    with pytest.raises(ValueError, match="predicts a flow; sample it with its diffusers pipeline"):
        next(sparsedm.calibrate(make("SD3Transformer2DModel")))


@needs_kernels
@pytest.mark.parametrize("name", ["UNet2DConditionModel (SDXL)", "FluxTransformer2DModel"])
def test_auto_times_models_with_nested_and_unbatched_inputs(name, monkeypatch):
    shapes = []

    def record(key, variants, **options):
        if key[0] == CASES[name].cls.__name__:
            shapes.extend(variant().sample.shape for variant in variants().values())
        return tuning.Times(2.0, 1.0, 2.0)

    monkeypatch.setattr(tuning, "times", record)
    model = layers.fold(layers.sparsify(make(name)))
    with torch.no_grad():
        sparsedm.pack(model, batch=3, inputs=small_inputs(name, model))
    assert len(shapes) == 2 and {shape[0] for shape in shapes} == {3}


# --- MACs -------------------------------------------------------------------------------------------------------------


@every_class
def test_macs_are_half_of_torch_flop_counter(name):
    model = make(name)
    inputs = small_inputs(name, model)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**inputs)
    assert 2 * macs.count(model, inputs).dense == counter.get_total_flops()


def test_attention_by_hand():
    def attention(name):
        model = make(name)
        return macs.count(model, small_inputs(name, model)).attention

    patches, text = 16, 6
    assert attention("PixArtTransformer2DModel") == 2 * (2 * patches * patches * 24 + 2 * patches * text * 24)  # self and cross
    joint = 2 * (patches + text) ** 2
    assert attention("SD3Transformer2DModel") == 2 * joint * 16 + 2 * patches**2 * 16  # the first block has two of them
    assert attention("FluxTransformer2DModel") == 2 * joint * 32


@pytest.mark.parametrize(("depth", "dim", "heads", "published"), [
    (12, 384, 6, "1.4"), (12, 768, 12, "5.6"), (24, 1024, 16, "19.7"), (28, 1152, 16, "29.1"),
], ids=["S", "B", "L", "XL"])  # fmt: skip
def test_dit_has_the_published_macs(depth, dim, heads, published):
    """Table 1 of arXiv 2212.09748: Gflops (which are MACs) of DiT at patch 4 on 32x32 latents."""
    with torch.device("meta"):
        model = diffusers.DiTTransformer2DModel(heads, dim // heads, out_channels=8, num_layers=depth, patch_size=4)
    assert f"{macs.count(model).dense / 1e9:.1f}" == published


@pytest.mark.parametrize("name", [name for name in CASES if name != "UNet3DConditionModel"])
def test_example_inputs_are_taken_by_the_model(name):
    model = make(name, sample_size=16) if "sample_size" in CASES[name].config else make(name)
    inputs = denoisers.example_inputs(model.half(), 3)
    assert all(x.shape[0] == 3 for key, x in inputs.items() if isinstance(x, torch.Tensor) and not key.endswith("_ids"))
    assert inputs[denoisers.of(model).picture].dtype == torch.float16
    shadow = copy.deepcopy(model).to("meta")
    assert shadow(**each(lambda x: x.to("meta"), inputs)).sample.shape[0] == 3
    assert macs.count(model).dense > 0


# --- what they predict ------------------------------------------------------------------------------------------------


def first_step(name, student, teacher, **options):
    """The first state of finetune, and what it drew: pictures, noise and timesteps."""
    pictures = Pictures(name, teacher)
    state = next(distill.finetune(student, teacher, pictures, **STEP | {"p_uncond": 0.0} | options))
    scheduler = diffusion.training_scheduler(teacher)
    order = torch.randperm(4, generator=torch.Generator().manual_seed(0))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.rand(4 if pictures.labels else 0)
        t = diffusion.draw_timesteps(scheduler, 4)
        noise = torch.randn(pictures.pictures.shape)
    kwargs = each(lambda x: x[order], pictures.conditioning) if not pictures.labels else {"class_labels": torch.ones(4).long()}
    return state, scheduler, pictures.pictures[order], noise, t, kwargs


def test_a_learned_variance_is_taught_by_the_teacher_alone():
    name = "DiTTransformer2DModel"
    teacher = make(name)
    student = layers.sparsify(copy.deepcopy(teacher))
    untrained = copy.deepcopy(student)
    state, scheduler, x0, noise, t, kwargs = first_step(name, student, teacher)
    noisy = scheduler.add_noise(x0, noise, t)
    with torch.no_grad():
        output, expected = (m(noisy, timestep=t, **kwargs).sample for m in (untrained, teacher))
    assert output.shape[1] == 8
    assert state.terms["noise"] == pytest.approx(F.mse_loss(output[:, :4], noise).item(), rel=1e-5)
    assert state.terms["teacher"] == pytest.approx(F.mse_loss(output, expected).item(), rel=1e-5)


@pytest.mark.parametrize("name", FLOWS)
def test_flow_models_learn_noise_minus_picture(name):
    teacher = make(name)
    student = layers.sparsify(copy.deepcopy(teacher))
    untrained = copy.deepcopy(student)
    state, scheduler, x0, noise, t, kwargs = first_step(name, student, teacher)
    sigma = (t / 1000).view(-1, 1, 1, 1)
    assert isinstance(scheduler, diffusers.FlowMatchEulerDiscreteScheduler) and 0 < sigma.min() < sigma.max() <= 1
    with torch.no_grad():
        output = denoisers.of(teacher).predict(untrained, (1 - sigma) * x0 + sigma * noise, t, kwargs)
    assert state.terms["noise"] == pytest.approx(F.mse_loss(output, noise - x0).item(), rel=1e-4)


def test_flow_timesteps_are_logit_normal_on_the_schedule_of_the_config():
    model = make("SD3Transformer2DModel")
    model.register_to_config(noise_schedule={"shift": 3.0})
    scheduler = diffusion.training_scheduler(model)
    t = diffusion.draw_timesteps(scheduler, 20_000) / 1000
    assert scheduler.config.shift == 3.0
    u = torch.logit(t / (3 - 2 * t))  # the shift undone
    assert abs(u.mean()) < 0.03 and abs(u.std() - 1) < 0.03


def test_flux_takes_the_patches_and_positions_of_its_pipeline():
    seen = {}

    class Echo(nn.Module):
        config = make("FluxTransformer2DModel").config

        def forward(self, hidden_states, timestep, **kwargs):
            seen.update(kwargs, tokens=hidden_states, timestep=timestep)
            return (hidden_states,)

    x, kind = torch.randn(2, 4, 6, 8), denoisers.of(make("FluxTransformer2DModel"))
    back = kind.predict(Echo(), x, torch.tensor(250.0), {"encoder_hidden_states": torch.zeros(2, 5, 24)})
    assert torch.equal(back, x) and seen["timestep"].tolist() == [0.25, 0.25] and seen["txt_ids"].shape == (5, 3)
    for token, (_, row, column) in enumerate(seen["img_ids"].long().tolist()):
        assert (row, column) == divmod(token, 4)
        patch = x[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        assert torch.equal(seen["tokens"][:, token], patch.flatten(1))


def test_the_blocks_of_a_dit_see_one_label_in_training():
    """Left alone, each of them drops labels by itself, and the teacher none."""
    name = "DiTTransformer2DModel"
    teacher = make(name)
    teacher.transformer_blocks[0].norm1.emb.class_embedder.dropout_prob = 0.9
    state, *_ = first_step(name, copy.deepcopy(teacher), teacher)
    assert state.terms["teacher"] == 0


def test_labels_of_a_dit_are_dropped_to_the_last_row_of_its_table():
    model = make("DiTTransformer2DModel")
    table = model.transformer_blocks[0].norm1.emb.class_embedder.embedding_table
    assert denoisers.null_label(model) == 10 == len(table.weight) - 1
    assert denoisers.null_label(make("PixArtTransformer2DModel")) is None


def test_a_class_is_known_through_subclasses_and_compilation():
    dit = make("DiTTransformer2DModel")
    assert denoisers.of(torch.compile(dit)) is denoisers.of(dit) is denoisers.of(type("Mine", (type(dit),), {})(**dit.config))


def test_a_dit_is_sampled_with_labels_and_guidance():
    model = make("DiTTransformer2DModel")
    noise = diffusion.start_noise(model, 2)
    pictures = diffusion.generate(model, noise, steps=3, class_labels=torch.tensor([1, 2]), guidance=1.0)
    assert pictures.shape == noise.shape and not torch.equal(pictures[0], pictures[1])
    free = diffusion.generate(model, noise, steps=3, class_labels=torch.tensor([1, 2]))
    assert not torch.equal(pictures, free)


@pytest.mark.parametrize("name", ["UNet2DConditionModel (SDXL)", "PixArtTransformer2DModel"])
@torch.no_grad()
def test_text_models_are_sampled_with_what_conditions_them_and_guidance(name):
    model = make(name)
    noise, given = diffusion.start_noise(model, 2), conditioning(model, 2)
    text = given["encoder_hidden_states"]
    scheduler, kind = diffusers.DDIMScheduler(clip_sample=True), denoisers.of(model)
    scheduler.set_timesteps(2)
    x = noise
    for t in scheduler.timesteps:
        cond, uncond = (
            kind.predict(model, x, t, {**given, "encoder_hidden_states": some})[:, :4] for some in (text, torch.zeros_like(text))
        )
        x = scheduler.step(cond + 1.5 * (cond - uncond), t, x).prev_sample
    options = {"steps": 2, "conditioning": given, "negative": {"encoder_hidden_states": torch.zeros_like(text)}}
    torch.testing.assert_close(diffusion.generate(model, noise, guidance=1.5, **options), x, rtol=1e-3, atol=1e-4)
    assert (diffusion.generate(model, noise, **options) - x).abs().max() > 1e-2


def test_pictures_of_any_number_of_axes_are_flipped_whole():
    for shape in ((3, 16), (3, 5, 4, 4)):
        pictures = torch.arange(64 * 3 * 16.0).view(64, *shape) if len(shape) == 2 else torch.randn(64, *shape)
        draw = distill.StepDraw(make("UNet1DModel"), diffusion.make_scheduler("ddpm"), _FLIP, distill.Accelerator())
        flipped, *_ = draw(pictures, torch.zeros(64))
        turned = [torch.equal(a, b.flip(-1)) for a, b in zip(flipped, pictures)]
        assert flipped.shape == pictures.shape and 0 < sum(turned) < 64
        assert all(turn or torch.equal(a, b) for turn, a, b in zip(turned, flipped, pictures))


_FLIP = distill.TrainConfig(steps=1, flip=True)


# --- what is refused --------------------------------------------------------------------------------------------------


class Labelled(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return torch.zeros(4, 8, 8), 0


def train(name, **options):
    next(distill.train(make(name), Labelled(), **STEP, **options))


def sample(name, **changes):
    model = make(name, **changes)
    diffusion.generate(model, torch.zeros(1, 4, 8, 8), steps=1)


def wrap(model):
    """`model` with one layer in an adapter, as peft does it."""
    adapter = nn.Module()
    adapter.base_layer, adapter.lora_A = model.mid_block.attentions[0].proj_in, nn.Linear(32, 4)
    model.mid_block.attentions[0].proj_in = adapter
    return model


def fuse(name):
    model = make(name)
    model.fuse_qkv_projections()
    return model


def fuse_in_training():
    model = layers.sparsify(make(UNET))
    model.fuse_qkv_projections()
    return model


UNET = "UNet2DConditionModel (SD 1, 2)"


@pytest.mark.parametrize(("action", "message"), [
    (lambda tmp: train(UNET), "UNet2DConditionModel needs encoder_hidden_states; let the data set yield"),
    (lambda tmp: train("UNet2DConditionModel (SDXL)"), "needs encoder_hidden_states, added_cond_kwargs;"),
    (lambda tmp: train("SD3Transformer2DModel"), "SD3Transformer2DModel needs encoder_hidden_states, pooled_projections"),
    (lambda tmp: train("FluxTransformer2DModel"), "FluxTransformer2DModel needs encoder_hidden_states, .*guidance"),
    (lambda tmp: train("DiTTransformer2DModel"), "DiTTransformer2DModel predicts a variance, .*use finetune with one"),
    (lambda tmp: train("SD3Transformer2DModel", scheduler=diffusers.DDPMScheduler()), "SD3.* a flow; pass a FlowMatch.*DDPM"),
    (lambda tmp: sample("SD3Transformer2DModel"), "SD3Transformer2DModel predicts a flow; sample it with its diffusers pipeline"),
    (lambda tmp: sample(UNET), "UNet2DConditionModel needs encoder_hidden_states; pass it in conditioning="),
    (lambda tmp: macs.count(make("UNet3DConditionModel")), "UNet3DConditionModel does not tell the number of frames; pass"),
    (lambda tmp: macs.count(make(UNET, class_embed_type="timestep")), "class_embed_type 'timestep' is not known here; pass"),
    (lambda tmp: layers.sparsify(wrap(make(UNET))), r"mid_block.attentions.0.proj_in is wrapped by an adapter \(Module\); merge"),
    (lambda tmp: folders.save(wrap(layers.sparsify(make(UNET))), tmp), "mid_block.attentions.0.proj_in is wrapped by an adapter"),
    (lambda tmp: layers.sparsify(fuse(UNET)), "transformer_blocks.0.attn1 has fused projections beside its own; load"),
    (lambda tmp: layers.sparsify(fuse("SD3Transformer2DModel")), "transformer_blocks.0.attn has fused projections"),
    (lambda tmp: layers.fold(fuse_in_training()), "attn1 has fused projections"),
    (lambda tmp: folders.save(fuse(UNET), tmp), "attn1 has fused projections"),
])  # fmt: skip
def test_refusals_name_the_class_or_layer_and_the_remedy(action, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        action(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_projections_fused_after_folding_stay_sparse():
    folded = layers.fold(layers.sparsify(make(UNET)))
    expected = call(UNET, folded)
    folded.fuse_qkv_projections()
    torch.testing.assert_close(call(UNET, folded), expected)
    assert str(layers.patterns(folded)["mid_block.attentions.0.transformer_blocks.0.attn1.to_qkv"]) == "2:4"


# --- classes without a family (test_classes.py has the others) ----------------------------------------------------------

ATTENTION = r"(to_[qkv]|add_[qkv]_proj|to_out\.0|to_add_out)"
_UNET_BLOCKS = r"(resnets\.\d+\.conv(1|2|_shortcut)|attentions\..*|(down|up)samplers\.0\.conv)"
UNKNOWN = {  # models that do not denoise, tiny, and the names of the layers that the general rule leaves for sparsity
    "PriorTransformer": (
        {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "embedding_dim": 8, "num_embeddings": 7},
        rf"transformer_blocks\.\d\.(attn1\.{ATTENTION}|ff\..*)",
    ),
    "ControlNetModel": (
        {
            "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8, "attention_head_dim": 8,
            "cross_attention_dim": 24, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "conditioning_embedding_out_channels": (16, 32),
        },
        rf"(down_blocks\.\d|mid_block)\.{_UNET_BLOCKS}",
    ),
    "AutoencoderKL": (
        {
            "block_out_channels": (16, 32), "down_block_types": ("DownEncoderBlock2D",) * 2, "norm_num_groups": 8,
            "up_block_types": ("UpDecoderBlock2D",) * 2, "sample_size": 8,
        },
        rf"(encoder|decoder)\.(down_blocks\.\d|mid_block|up_blocks\.\d)\.{_UNET_BLOCKS}",
    ),
}  # fmt: skip
every_unknown_class = pytest.mark.parametrize("name", UNKNOWN)


def make_unknown(name: str) -> nn.Module:
    return getattr(diffusers, name)(**UNKNOWN[name][0]).eval()


@every_unknown_class
def test_first_and_last_layers_embeddings_and_modulations_of_any_class_stay_dense(name):
    model = sparsedm.sparsify(make_unknown(name))
    sparse = {layer for layer, _ in layers.nm_layers(model)}
    assert sparse == {layer for layer, _ in layers.weight_layers(model) if re.fullmatch(UNKNOWN[name][1], layer)} and sparse
    dense = [row for row in sparsedm.report(layers.fold(model)).rows if row.name not in sparse]
    assert all(re.match("first, last|modulation or embedding|grouped convolution", row.note) for row in dense) and dense


@pytest.mark.parametrize("action", [
    lambda model, out: next(sparsedm.finetune(model, model, Labelled(), steps=1, out=out)),
    lambda model, out: next(sparsedm.train(model, "glyphs", steps=1, out=out)),
    lambda model, out: next(sparsedm.sample(model, torch.zeros(1, 4, 8, 8))),
    lambda model, out: diffusion.start_noise(model, 1),
    lambda model, out: next(diffpruning.importance(model, torch.zeros(1, 4, 8, 8))),
    lambda model, out: sparsedm.count(model),
], ids=["finetune", "train", "sample", "start_noise", "importance", "count"])  # fmt: skip
@every_unknown_class
def test_what_cannot_be_called_is_refused_by_name_before_anything_changes(name, action, tmp_path):
    model = make_unknown(name).requires_grad_(False)
    remedy = "(train it|sample it|the scores magnitude|pass inputs)"
    with pytest.raises(ValueError, match=rf"{name} is none of the classes .*UNet2DModel.*; {remedy}"):
        action(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not model.training and not any(p.requires_grad for p in model.parameters())


def test_diffusers_subclass_of_a_known_class_is_not_taken_for_its_parent():
    """DreamLiteUNetModel has the forward of UNet2DConditionModel and predicts a flow."""
    with pytest.raises(ValueError, match="DreamLiteUNetModel is none of"):
        denoisers.refuse_unknown(object.__new__(diffusers.DreamLiteUNetModel), "")


def test_a_class_of_your_own_is_called_with_picture_and_timestep():
    class Net(diffusers.ModelMixin, diffusers.ConfigMixin):
        @register_to_config
        def __init__(self, sample_size=8, in_channels=4):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x, t):
            return (self.conv(x),)

    class Encoder(Net):
        def forward(self, x):
            return self.conv(x)

    class Child(diffusers.DiTTransformer2DModel):
        pass

    assert next(distill.train(Net(), Labelled(), **STEP)).loss > 0
    assert sparsedm.generate(Net(), torch.zeros(1, 4, 8, 8), steps=1).shape == (1, 4, 8, 8)
    denoisers.refuse_unknown(torch.compile(Child(**CASES["DiTTransformer2DModel"].config)), "")
    with pytest.raises(ValueError, match="Encoder is none of the classes"):
        next(distill.train(Encoder(), Labelled(), **STEP))


@pytest.mark.parametrize(("parts", "sparse"), [
    ({"many": nn.ModuleList([nn.Linear(8, 8)])}, {"first", "embed", "many.0"}),  # no block: any layer may be the bulk
    ({"many": nn.ModuleList([nn.Sequential(nn.Linear(8, 8))])}, {"many.0.0"}),
    ({"middle_block": nn.Sequential(nn.Linear(8, 8))}, {"middle_block.0"}),
    ({"many": nn.ModuleList([nn.ModuleDict({"ff": nn.Linear(8, 8), "temb": nn.Linear(8, 8)})])}, {"many.0.ff"}),
], ids=["none", "list", "middle", "modulated"])  # fmt: skip
def test_the_general_rule_goes_by_repeated_blocks(parts, sparse):
    net = nn.ModuleDict({"first": nn.Linear(8, 8), "embed": nn.Linear(8, 8), **copy.deepcopy(parts)})
    assert {name for name, _ in layers.nm_layers(layers.sparsify(net))} == sparse


def test_a_class_that_is_not_known_asks_for_inputs_and_reports_without_macs():
    model = layers.sparsify(make_unknown("ControlNetModel"))
    with pytest.raises(ValueError, match="ControlNetModel is none of the classes .*; pass inputs="):
        macs.count(model)
    assert sparsedm.report(model).dense_macs is None


# --- the table for people ---------------------------------------------------------------------------------------------


def table() -> str:
    """Markdown: what was tested above, class by class."""
    lines = ["| class | sparse by default | trained on | the data brings |", "|---|---|---|---|"]
    for name in CASES:
        model = layers.sparsify(make(name))
        count = sum(1 for _ in layers.nm_layers(model)), sum(1 for _ in layers.weight_layers(model))
        kind = denoisers.of(model)
        trained = "flow" if kind.flow else "noise, velocity or picture"
        trained += ", variance from the teacher" if denoisers.predicts_variance(model) else ""
        brings = ", ".join(f"`{key}`" for key in conditioning(model, 1)) or "nothing"
        lines.append(f"| {name} | {count[0]} of {count[1]} layers | {trained} | {brings} |")
    return "\n".join(lines)


def test_the_table_of_docs_models_is_what_was_tested():
    page = (Path(__file__).parent.parent / "docs" / "models.md").read_text()
    assert table() == page.split("-->\n", 1)[1].split("\n<!-- /models -->", 1)[0]


if __name__ == "__main__":
    print(table())
