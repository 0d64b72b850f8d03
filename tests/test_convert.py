"""Official checkpoints: the converted model computes what the original one does; files that are not such are refused by name."""

import json
import math
import os
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention, AttnProcessor
from safetensors.torch import save_file
from torch import nn

import sparsedm
from sparsedm.checkpoints import convert, folders
from sparsedm.models import papers
from sparsedm.models.uvit import UViTModel
from sparsedm.pruning import diffpruning


def scrambled(model: nn.Module) -> nn.Module:
    """No weight is zero or one as it was made, so that none can go astray unseen."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def equal(a: nn.Module, b: nn.Module) -> bool:
    return a.state_dict().keys() == b.state_dict().keys() and all(
        torch.equal(value, b.state_dict()[name]) for name, value in a.state_dict().items()
    )


# --- U-ViT ------------------------------------------------------------------------------------------------------------


def make_uvit(**changes) -> UViTModel:
    config = {"sample_size": 8, "patch_size": 2, "embed_dim": 128, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0}
    return scrambled(UViTModel(**config | changes))


UVITS = {
    "unconditional": ({}, {}),
    "classes, no last convolution": ({"num_classes": 11, "conv": False, "in_channels": 4}, {}),
    "text": ({"context_dim": 12, "context_tokens": 77, "patch_size": 1}, {"context_tokens": 77}),
    "60 tokens on 9x9": ({"context_dim": 12, "context_tokens": 60, "patch_size": 1, "sample_size": 9}, {"context_tokens": 60}),
    "SparseDM's bias": ({"qkv_bias": True}, {}),
    "other heads": ({"num_heads": 8, "patch_size": 4}, {"num_heads": 8}),
    "other norms": ({"norm_eps": 1e-2}, {"norm_eps": 1e-2}),
}


@pytest.mark.parametrize("name", UVITS)
@torch.no_grad()
def test_uvit_comes_back_bit_for_bit_with_its_config(name, tmp_path):
    changes, options = UVITS[name]
    model = make_uvit(**changes)
    torch.save(model.state_dict(), tmp_path / "nnet_ema.pth")
    converted = convert.load(tmp_path / "nnet_ema.pth", **{"num_heads": 2} | options)
    expected = {key: value for key, value in model.config.items() if not key.startswith("_")}
    assert {key: converted.config[key] for key in expected} == expected
    size = model.config.sample_size
    x, t, kwargs = torch.randn(2, model.config.in_channels, size, size), torch.tensor([3.0, 700.5]), {}
    if "num_classes" in changes:
        kwargs["class_labels"] = torch.tensor([1, 10])
    if "context_dim" in changes:
        kwargs["encoder_hidden_states"] = torch.randn(2, model.config.context_tokens, 12)
    assert torch.equal(converted(x, t, **kwargs).sample, model(x, t, **kwargs).sample) and not converted.training


@pytest.mark.parametrize("name", [name for name, paper in papers.PAPER_MODELS.items() if paper.cls is UViTModel])
def test_official_uvits_are_known_by_their_sizes(name, monkeypatch):
    with torch.device("meta"):
        model = papers.build(name)
        monkeypatch.setattr(convert, "read", lambda path: model.state_dict())
        monkeypatch.setattr(convert, "fill", lambda model, *rest: model)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # nothing is assumed
            converted = convert.uvit("file")
    assert {key: converted.config[key] for key in model.config if key[0] != "_"} == {
        key: value for key, value in model.config.items() if key[0] != "_"
    }


@torch.no_grad()
def test_another_scale_of_attention_goes_into_the_queries(tmp_path):
    model = make_uvit(qkv_bias=True)
    torch.save(model.state_dict(), tmp_path / "nnet_ema.pth")
    monkey, x, t = F.scaled_dot_product_attention, torch.randn(2, 3, 8, 8), torch.tensor([3.0, 700.5])
    plain = model(x, t).sample
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", lambda q, k, v: monkey(q, k, v, scale=0.5))  # 0.125 by default
        expected = model(x, t).sample
    converted = convert.load(tmp_path / "nnet_ema.pth", num_heads=2, qk_scale=0.5)
    torch.testing.assert_close(converted(x, t).sample, expected, rtol=1e-4, atol=1e-5)
    assert (plain - expected).abs().max() > 1e-2


TEXT = {"context_dim": 12, "context_tokens": 60, "patch_size": 1, "sample_size": 9}


@pytest.mark.parametrize(("changes", "options", "message"), [
    ({"num_heads": 4}, {}, r"does not tell the number of heads of its width 128; give num_heads \(--heads\)"),
    (TEXT, {"num_heads": 2}, r"does not tell how many of its 142 tokens are text; give context_tokens \(--context-tokens\)"),
    ({}, {"num_heads": 2, "context_tokens": 77}, "without text.*leave context_tokens out"),
    (TEXT, {"num_heads": 2, "context_tokens": 59}, "82 of the 142 rows of pos_embed are left for patches, which is no square"),
    ({}, {"num_heads": 3}, "num_heads must divide the width 128, 3 does not"),
    ({}, {"num_heads": 0}, "num_heads must divide the width 128, 0 does not"),
    ({}, {"num_heads": "two"}, "num_heads takes a number, not 'two'"),
    ({}, {"num_heads": 2, "norm_eps": -1.0}, "norm_eps must be positive, it is -1.0"),
    ({}, {"num_heads": 2, "qk_scale": math.nan}, "qk_scale must be positive"),
    ({}, {"sample_size": 8}, "converted with num_heads, context_tokens, norm_eps, qk_scale, not with sample_size"),
])  # fmt: skip
def test_what_the_file_of_a_uvit_does_not_tell_is_asked_for(changes, options, message, tmp_path):
    torch.save(make_uvit(**changes).state_dict(), tmp_path / "nnet_ema.pth")
    with pytest.raises(ValueError, match=message):
        convert.load(tmp_path / "nnet_ema.pth", **options)


# --- the DDIM code ----------------------------------------------------------------------------------------------------


def make_ddpm(attention=(1,), blocks=1) -> UNet2DModel:
    """UNet2DModel as papers.md 3.4 describes the checkpoints' network: 32 and 64 channels."""
    kinds = ["AttnDownBlock2D" if level in attention else "DownBlock2D" for level in range(2)]
    model = UNet2DModel(
        sample_size=32, block_out_channels=(32, 64), layers_per_block=blocks, down_block_types=kinds,
        up_block_types=[kind.replace("Down", "Up") for kind in reversed(kinds)], attention_head_dim=None,
        downsample_padding=0, flip_sin_to_cos=False, freq_shift=1, norm_eps=1e-6,
    )  # fmt: skip
    return scrambled(model)


def ddim_layout(model: UNet2DModel) -> dict[str, torch.Tensor]:
    """Its tensors as the DDIM code names and shapes them, module by module."""
    found = {}

    def put(name: str, module: nn.Module) -> None:
        found[f"{name}.weight"], found[f"{name}.bias"] = module.weight.detach(), module.bias.detach()

    def resnet(name: str, block: nn.Module) -> None:
        for theirs, ours in (("norm1", block.norm1), ("conv1", block.conv1), ("temb_proj", block.time_emb_proj)):
            put(f"{name}.{theirs}", ours)
        put(f"{name}.norm2", block.norm2)
        put(f"{name}.conv2", block.conv2)
        if block.conv_shortcut is not None:
            put(f"{name}.nin_shortcut", block.conv_shortcut)

    def attention(name: str, layer: nn.Module) -> None:
        put(f"{name}.norm", layer.group_norm)
        for theirs, ours in (("q", layer.to_q), ("k", layer.to_k), ("v", layer.to_v), ("proj_out", layer.to_out[0])):
            put(f"{name}.{theirs}", ours)
            found[f"{name}.{theirs}.weight"] = ours.weight.detach()[:, :, None, None]

    put("temb.dense.0", model.time_embedding.linear_1)
    put("temb.dense.1", model.time_embedding.linear_2)
    for theirs, ours in (("conv_in", model.conv_in), ("norm_out", model.conv_norm_out), ("conv_out", model.conv_out)):
        put(theirs, ours)
    for way, levels in (("down", model.down_blocks), ("up", list(reversed(model.up_blocks)))):
        for level, blocks in enumerate(levels):
            for i, block in enumerate(blocks.resnets):
                resnet(f"{way}.{level}.block.{i}", block)
            for i, layer in enumerate(getattr(blocks, "attentions", None) or []):
                attention(f"{way}.{level}.attn.{i}", layer)
            for sampler in getattr(blocks, f"{way}samplers") or []:
                put(f"{way}.{level}.{way}sample.conv", sampler.conv)
    resnet("mid.block_1", model.mid_block.resnets[0])
    attention("mid.attn_1", model.mid_block.attentions[0])
    resnet("mid.block_2", model.mid_block.resnets[1])
    return found


def ddim_forward(state: dict[str, torch.Tensor], x: torch.Tensor, t: torch.Tensor, levels: int = 2, blocks: int = 1):
    """The DDIM code's network, written from the description in papers.md 3.4."""

    def linear(name, x):
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def conv(name, x, **kwargs):
        return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], **kwargs)

    def norm(name, x):
        return F.group_norm(x, 32, state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-6)

    def resnet(name, x):
        h = conv(f"{name}.conv1", F.silu(norm(f"{name}.norm1", x)), padding=1)
        h = h + linear(f"{name}.temb_proj", F.silu(temb))[:, :, None, None]
        h = conv(f"{name}.conv2", F.silu(norm(f"{name}.norm2", h)), padding=1)
        return h + (conv(f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in state else x)

    def attention(name, x):
        if f"{name}.q.weight" not in state:
            return x
        q, k, v = (conv(f"{name}.{part}", norm(f"{name}.norm", x)).flatten(2) for part in "qkv")  # [B, C, HW]
        weights = (torch.einsum("bci,bcj->bij", q, k) / math.sqrt(q.shape[1])).softmax(dim=2)
        return x + conv(f"{name}.proj_out", torch.einsum("bij,bcj->bci", weights, v).view(x.shape))

    half = state["temb.dense.0.weight"].shape[1] // 2
    angles = t[:, None] * torch.exp(-math.log(10000) * torch.arange(half) / (half - 1))
    temb = linear("temb.dense.1", F.silu(linear("temb.dense.0", torch.cat([angles.sin(), angles.cos()], 1))))
    skips = [conv("conv_in", x, padding=1)]
    for level in range(levels):
        for block in range(blocks):
            skips.append(attention(f"down.{level}.attn.{block}", resnet(f"down.{level}.block.{block}", skips[-1])))
        if level < levels - 1:
            skips.append(conv(f"down.{level}.downsample.conv", F.pad(skips[-1], (0, 1, 0, 1)), stride=2))
    h = resnet("mid.block_2", attention("mid.attn_1", resnet("mid.block_1", skips[-1])))
    for level in reversed(range(levels)):
        for block in range(blocks + 1):
            h = attention(f"up.{level}.attn.{block}", resnet(f"up.{level}.block.{block}", torch.cat([h, skips.pop()], 1)))
        if level:
            h = conv(f"up.{level}.upsample.conv", h.repeat_interleave(2, 2).repeat_interleave(2, 3), padding=1)
    return conv("conv_out", F.silu(norm("norm_out", h)), padding=1)


@pytest.mark.parametrize("blocks", [1, 2])
@torch.no_grad()
def test_ddim_unet_comes_back_and_computes_what_the_original_does(blocks, tmp_path):
    model = make_ddpm(blocks=blocks)
    state = ddim_layout(model)
    torch.save(state, tmp_path / "ema.ckpt")
    converted = convert.load(tmp_path / "ema.ckpt", sample_size=32)
    assert equal(converted, model) and converted.config.sample_size == 32
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([3, 700])
    torch.testing.assert_close(converted(x, t).sample, ddim_forward(state, x, t, blocks=blocks), rtol=1e-4, atol=1e-4)
    assert torch.equal(converted(x, t).sample, model(x, t).sample)


@pytest.mark.parametrize("attention", [(), (1,), (0, 1)])
def test_unets_of_other_than_official_sizes_need_the_size_of_their_pictures(attention, tmp_path):
    model = make_ddpm(attention)
    torch.save(ddim_layout(model), tmp_path / "ema.ckpt")
    with pytest.raises(ValueError, match=r"ema.ckpt: .*size of the pictures; give sample_size \(--sample-size\)"):
        convert.ddim(tmp_path / "ema.ckpt")
    with pytest.raises(ValueError, match="sample_size 31 cannot be halved 1 times"):
        convert.ddim(tmp_path / "ema.ckpt", sample_size=31)
    assert equal(convert.ddim(tmp_path / "ema.ckpt", sample_size=32), model)


@torch.no_grad()
def test_another_norm_eps_is_taken(tmp_path):
    model = make_ddpm()
    torch.save(ddim_layout(model), tmp_path / "ema.ckpt")
    converted = convert.load(tmp_path / "ema.ckpt", sample_size=32, norm_eps=0.1)
    for module in model.modules():
        if isinstance(module, nn.GroupNorm):
            module.eps = 0.1
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([3, 700])
    assert torch.equal(converted(x, t).sample, model(x, t).sample) and converted.config.norm_eps == 0.1


@pytest.mark.parametrize("ema", [True, False])
def test_training_checkpoints_give_the_averaged_weights_if_there_are_some(ema, tmp_path):
    raw, averaged = make_ddpm(), scrambled(make_ddpm())
    parallel = {f"module.{name}": value for name, value in ddim_layout(raw).items()}
    content = [parallel, {"state": {}, "param_groups": [{"lr": 0.1}]}, 3, 500] + [ddim_layout(averaged)] * ema
    torch.save(content, tmp_path / "ckpt.pth")
    assert equal(convert.ddim(tmp_path / "ckpt.pth", sample_size=32), averaged if ema else raw)


@pytest.mark.parametrize("name", ["ddpm-cifar10", "ddpm-celeba64", "ddpm-lsun256-church"])
def test_official_sizes_are_those_of_the_zoo(name, tmp_path, monkeypatch):
    """Shapes alone, on the meta device: the config of the zoo, whose parameters and MACs are the published ones."""
    with torch.device("meta"):
        model = papers.build(name)
        monkeypatch.setattr(convert, "read", lambda path: ddim_layout(model))
        monkeypatch.setattr(convert, "fill", lambda model, *rest: model)
        converted = convert.ddim("file")
    assert {key: converted.config[key] for key in model.config if key[0] != "_"} == {
        key: value for key, value in model.config.items() if key[0] != "_"
    }


# --- folders of Diff-Pruning ------------------------------------------------------------------------------------------


def make_pruned(make_model, tmp_path, ratio=0.5, **changes):
    """A pruned model, and the folder that Diff-Pruning's script makes of it: the dense config and the pruned weights."""
    dense = scrambled(make_model("unet", num_class_embeds=None, **changes))
    pruned = diffpruning.prune(dense, ratio, score="magnitude")
    folder = tmp_path / "ddpm_pruned"
    (folder / "unet").mkdir(parents=True)
    (folder / "scheduler").mkdir()
    dense.save_config(folder / "unet")
    (folder / "scheduler" / "scheduler_config.json").write_text('{"beta_end": 0.03, "prediction_type": "epsilon"}')
    torch.save(pruned.state_dict(), folder / "unet" / "diffusion_pytorch_model.bin")
    return dense, pruned, folder


X, T = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(5)), torch.tensor([3, 700])


@pytest.mark.parametrize("kind", ["bin", "safetensors", "shards", "pth", "old names"])
@torch.no_grad()
def test_a_pruned_unet_gets_its_widths_from_its_weights(kind, make_model, tmp_path):
    dense, pruned, folder = make_pruned(make_model, tmp_path)
    stored = folder / "unet" / "diffusion_pytorch_model.bin"
    state = torch.load(stored, weights_only=True)
    if kind == "safetensors":
        save_file(state, folder / "unet" / folders.WEIGHTS)
        stored.write_bytes(b"older")
    elif kind == "shards":
        names = sorted(state)
        parts = {f"diffusion_pytorch_model-{i}.safetensors": names[i::2] for i in (0, 1)}
        for file, part in parts.items():
            save_file({name: state[name] for name in part}, folder / "unet" / file)
        files = {name: file for file, part in parts.items() for name in part}
        (folder / "unet" / folders.INDEX).write_text(json.dumps({"weight_map": files}))
        stored.unlink()
    elif kind == "pth":
        (folder / "pruned").mkdir()
        stored.rename(folder / "pruned" / "unet_pruned.pth")
    elif kind == "old names":
        for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            state = {name.replace(f".{new}.", f".{old}."): value for name, value in state.items()}
        torch.save(state, stored)
    converted = convert.load(folder, attention_scale="pruned")
    assert equal(converted, pruned) and torch.equal(converted(X, T).sample, pruned(X, T).sample)
    assert sum(p.numel() for p in converted.parameters()) < 0.5 * sum(p.numel() for p in dense.parameters())
    assert converted.config.noise_schedule["beta_end"] == 0.03
    sparsedm.save(converted, tmp_path / "saved")
    again = sparsedm.load(tmp_path / "saved")
    assert torch.equal(again(X, T).sample, pruned(X, T).sample)


@torch.no_grad()
def test_attention_scaled_by_the_dense_width_is_scaled_so_again(make_model, tmp_path):
    dense, pruned, folder = make_pruned(make_model, tmp_path)
    for name, module in pruned.named_modules():
        if isinstance(module, Attention):  # diffusers on torch 1.13: the scale stays as it was built
            module.set_processor(AttnProcessor())
            module.scale = dense.get_submodule(name).scale
    with pytest.raises(ValueError, match=r"attentions.0 is pruned, .* give attention_scale='dense' \(torch 1.13\)"):
        convert.diff_pruning(folder)
    expected = pruned(X, T).sample
    converted = convert.diff_pruning(folder, attention_scale="dense")
    torch.testing.assert_close(converted(X, T).sample, expected, rtol=1e-4, atol=1e-5)
    other = convert.diff_pruning(folder, attention_scale="pruned")
    assert (other(X, T).sample - expected).abs().max() > 1e-3


def test_an_unpruned_folder_needs_no_record(make_model, tmp_path):
    dense, _, folder = make_pruned(make_model, tmp_path)
    torch.save(dense.state_dict(), folder / "unet" / "diffusion_pytorch_model.bin")
    converted = convert.diff_pruning(folder)
    assert equal(converted, dense) and "pruning" not in converted.config


# --- what is refused --------------------------------------------------------------------------------------------------


class Trap:
    """Pickled code that would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_pickled_code_is_named_and_not_run(make_model, tmp_path):
    _, pruned, folder = make_pruned(make_model, tmp_path)
    (folder / "unet" / "diffusion_pytorch_model.bin").unlink()
    (folder / "pruned").mkdir()
    torch.save(pruned, folder / "pruned" / "unet_pruned.pth")
    with pytest.raises(ValueError, match=r"unet_pruned.pth holds pickled code \(diffusers.*UNet2DModel\).*state_dict"):
        convert.load(folder)
    content, trap = {"pos_embed": Trap(tmp_path / "sprung")}, tmp_path / "trap.pth"
    for save in (torch.save, lambda content, path: path.write_bytes(pickle.dumps(content, protocol=2))):
        save(content, trap)
        with pytest.raises(ValueError, match=r"trap.pth holds pickled code \(\w+.mkdir\), which is not run here"):
            convert.load(trap)
    assert not (tmp_path / "sprung").exists()


def edited(state, **changes):
    return {name: value for name, value in {**state, **changes}.items() if value is not None}


UVIT, DDIM = make_uvit().state_dict(), ddim_layout(make_ddpm())
NORM, Q = "out_blocks.0.norm1.weight", "up.1.attn.0.q.weight"
NO_SKIPS = {name: value for name, value in UVIT.items() if ".skip_linear." not in name}
NO_CONVOLUTIONS = {name: value for name, value in DDIM.items() if "sample.conv" not in name}


@pytest.mark.parametrize(("content", "message"), [
    (edited(UVIT, **{NORM: None}), "out_blocks.0.norm1.weight is missing"),
    (edited(UVIT, extra=torch.ones(1)), "extra is not of UViTModel"),
    (edited(UVIT, **{NORM: torch.full((128,), torch.nan)}), "out_blocks.0.norm1.weight holds NaN or infinity"),
    (edited(DDIM, **{Q: torch.full((64, 64, 1, 1), torch.inf).half()}), "up.1.attn.0.q.weight holds NaN or infinity"),
    (edited(UVIT, **{"time_embed.0.weight": torch.ones(512, 128)}), "made with the option mlp_time_embed=True"),
    (NO_SKIPS, "made with the option skip=False"),
    (NO_CONVOLUTIONS, "made with the option resamp_with_conv=False"),
    (edited(UVIT, **{NORM: torch.ones(3)}), r"out_blocks.0.norm1.weight has shape \[3\], not \[128\]"),
    (edited(UVIT, pos_embed=None), "pos_embed is missing"),
    (edited(UVIT, pos_embed=torch.ones(17, 128)), r"pos_embed has shape \[17, 128\], not 3 axes"),
    (edited(UVIT, pos_embed=torch.ones(1, 12, 128)), "11 of the 12 rows of pos_embed are left for patches, which is no square"),
    (edited(DDIM, **{Q: None}), "up.1.attn.0.q.weight is missing"),
    (edited(DDIM, **{Q: torch.ones(64, 32, 1, 1)}), r"up.1.attn.0.q.weight has shape \[64, 32, 1, 1\], not \[64, 64\]"),
    (edited(DDIM, **{"conv_in.weight": None}), "conv_in.weight is missing"),
    (edited(DDIM, **{"down.0.block.0.conv1.weight": torch.ones(48, 32, 3, 3)}), r"widths \[48, 64\] are not multiples of 32"),
    (edited(DDIM, **{"mid.block_1.conv_shortcut.bias": torch.ones(1)}), "mid.block_1.conv_shortcut.bias is not of UNet2DModel"),
    ({"conv.weight": torch.ones(1), "fc.bias": torch.ones(1)}, "neither of U-ViT nor of the DDIM code.*conv.weight, fc.bias"),
    ({"step": 3}, "holds no state dict, but a dict"),
    ({}, "holds no state dict, but a dict"),
    ([1, 2], "holds no state dict, but a int"),
    (torch.ones(3), "holds no state dict, but a Tensor"),
])  # fmt: skip
def test_wrong_contents_are_one_line_with_the_file_and_the_name(content, message, tmp_path):
    torch.save(content, tmp_path / "file.pth")
    names = content if isinstance(content, dict) else {}
    options = {"num_heads": 2} if "norm.weight" in names else {"sample_size": 32} if "conv_out.weight" in names else {}
    with pytest.raises(ValueError, match=message) as caught:
        convert.load(tmp_path / "file.pth", **options)
    assert "file.pth" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", b"PK\x03\x04 half a zip", b"\x80\x02}"], ids=str)
@pytest.mark.parametrize("name", ["file.pth", "file.safetensors"])
def test_files_that_are_no_checkpoints(content, name, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} is not a checkpoint that can be read as tensors") as caught:
        convert.load(tmp_path / name)
    assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match="none.pth"):
        convert.load(tmp_path / "none.pth")


def test_truncated_checkpoints(tmp_path):
    torch.save(UVIT, tmp_path / "file.pth")
    (tmp_path / "file.pth").write_bytes((tmp_path / "file.pth").read_bytes()[:-1000])
    with pytest.raises(ValueError, match="file.pth is not a checkpoint"):
        convert.load(tmp_path / "file.pth")


def test_what_is_assumed_of_a_model_of_other_than_official_sizes_is_said_with_its_option(tmp_path, recwarn):
    torch.save(UVIT, tmp_path / "uvit.pth")
    torch.save(DDIM, tmp_path / "ddim.ckpt")
    with pytest.warns(UserWarning, match=r"uvit.pth: norm_eps 1e-05 and qk_scale 1 / sqrt.*--norm-eps.*--qk-scale"):
        convert.load(tmp_path / "uvit.pth", num_heads=2)
    with pytest.warns(UserWarning, match=r"uvit.pth: qk_scale 1 / sqrt\(width of a head\) .*give qk_scale"):
        convert.load(tmp_path / "uvit.pth", num_heads=2, norm_eps=1e-6)
    with pytest.warns(UserWarning, match=r"ddim.ckpt: norm_eps 1e-06 .*\(--norm-eps\)"):
        convert.load(tmp_path / "ddim.ckpt", sample_size=32)
    recwarn.clear()
    convert.load(tmp_path / "uvit.pth", num_heads=2, norm_eps=1e-6, qk_scale=0.1)
    convert.load(tmp_path / "ddim.ckpt", sample_size=32, norm_eps=1e-6)
    assert not recwarn.list


@pytest.mark.parametrize(("content", "options"), [("UVIT", {"num_heads": 2}), ("DDIM", {"sample_size": 32})])
def test_a_checkpoint_is_read_once(content, options, tmp_path, monkeypatch):
    reads, read = [], convert.read
    monkeypatch.setattr(convert, "read", lambda path: reads.append(path) or read(path))
    torch.save(globals()[content], tmp_path / "file.pth")
    convert.load(tmp_path / "file.pth", **options)
    assert len(reads) == 1


def _edit_weights(folder, **changes):
    path = folder / "unet" / "diffusion_pytorch_model.bin"
    torch.save(edited(torch.load(path, weights_only=True), **changes), path)


def _edit_config(folder, **changes):
    path = folder / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(("damage", "message"), [
    (lambda f: _edit_weights(f, **{"conv_in.weight": None}), "conv_in.weight is missing"),
    (lambda f: _edit_weights(f, extra=torch.ones(1)), "extra is not of UNet2DModel"),
    (lambda f: _edit_weights(f, **{"conv_in.weight": torch.ones(4, 2, 3, 3)}), r"conv_in.weight has shape \[4, 2, 3, 3\]"),
    (lambda f: _edit_weights(f, **{"conv_out.weight": torch.ones(2, 4, 3, 3)}), r"conv_out.weight has shape \[2, 4, 3, 3\]"),
    (lambda f: _edit_weights(f, **{"conv_in.weight": torch.ones(3, 3, 3, 3), "conv_in.bias": torch.ones(3)}), "do not fit each"),
    (lambda f: (f / "unet" / "diffusion_pytorch_model.bin").unlink(), "ddpm_pruned holds no weights; Diff-Pruning's have unet/"),
    (lambda f: _edit_config(f, _class_name="UNet2DConditionModel"), "names the class 'UNet2DConditionModel', not 'UNet2DModel'"),
    (lambda f: _edit_config(f, block_out_channels="many"), "config.json: block_out_channels is .many., but .* takes a list"),
    (lambda f: _edit_config(f, layers_per_block=10**6), "config.json: layers_per_block is 1000000, but there are"),
    (lambda f: _edit_config(f, block_out_channels=[2**20, 2**20], norm_num_groups=2), "conv_shortcut.* is not of UNet2DModel"),
])  # fmt: skip
def test_damaged_folders_are_named(damage, message, make_model, tmp_path):
    _, _, folder = make_pruned(make_model, tmp_path, in_channels=3, out_channels=3)
    damage(folder)
    with pytest.raises(ValueError, match=message) as caught:
        convert.load(folder, attention_scale="pruned")
    assert "ddpm_pruned" in str(caught.value)
    with pytest.raises(ValueError, match="unknown attention_scale 'both'; known: dense, pruned"):
        convert.load(folder, attention_scale="both")
