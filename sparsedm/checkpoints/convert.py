"""Official checkpoints as models of this package: U-ViT, UNets of the DDIM code, and folders of Diff-Pruning.

Sizes are read off the shapes. Pickled code in the files is refused, never run.
"""

import inspect
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from diffusers import ModelMixin, UNet2DModel
from diffusers.models.attention_processor import Attention
from torch import nn

from ..models import papers
from ..models.uvit import UViTModel
from ..pruning import structure
from . import folders
from .statedict import State, check_names, count, fill, read, shape

HEAD_WIDTH = 64  # of U-ViT's official models, but for the Huge ones
ATTENTION_SIDE = 16  # the DDIM code's models attend where the picture is 16x16
ATTENTION_SCALES = ("dense", "pruned")
_WEIGHTS = (
    f"unet/{folders.WEIGHTS}", f"unet/{folders.INDEX}", "unet/diffusion_pytorch_model.bin", folders.WEIGHTS, folders.INDEX,
    "diffusion_pytorch_model.bin",
    "pruned/unet_ema_pruned.pth", "pruned/unet_pruned.pth",
)  # fmt: skip


def load(path: str | Path, **options) -> ModelMixin:
    """The model in an official checkpoint, whichever of `uvit`, `ddim` and `diff_pruning` it is for; options as theirs.

    Raises:
        ValueError: it is for none of them, an option that is not of the one it is for, or as they do.
    """
    converter = diff_pruning if Path(path).is_dir() else _converter(path)
    _, *known = inspect.signature(converter).parameters
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(f"{path} is converted with {', '.join(known)}, not with {unknown[0]}")
    return converter(path, **options)


def _converter(path: str | Path) -> Callable[..., ModelMixin]:
    state = read(path)
    for convert, name in ((uvit, "patch_embed.proj.weight"), (ddim, "temb.dense.0.weight")):
        if name in state:
            return convert
    raise ValueError(f"{path} is neither of U-ViT nor of the DDIM code; it begins with {', '.join(list(state)[:3])}")


def uvit(path: str | Path, *, num_heads: int | None = None, context_tokens: int = 77) -> UViTModel:
    """U-ViT from `nnet_ema.pth`, or `nnet.pth`.

    The file does not tell the noise schedule. This package's default fits the models that the official code trains in
    continuous time; for the Huge and the text-to-image ones set the config's `noise_schedule` to Stable Diffusion's.

    Args:
        num_heads: by default those of the official model of that width, else heads 64 wide.
        context_tokens: of text, for text-to-image models.

    Raises:
        ValueError: as `read`, or a tensor that is missing, unexpected or of another shape (named).
    """
    state = read(path)
    _, tokens, dim = shape(state, "pos_embed", 3, path)
    _, channels, patch, _ = shape(state, "patch_embed.proj.weight", 4, path)
    text, labels = "context_embed.weight" in state, "label_emb.weight" in state
    patches = tokens - 1 - labels - context_tokens * text
    side = math.isqrt(max(patches, 0))
    if side**2 != patches or not patches:
        raise ValueError(f"{path}: {patches} of the {tokens} rows of pos_embed are left for patches, which is no square")
    official = {m.config["embed_dim"]: m.config["num_heads"] for m in papers.PAPER_MODELS.values() if m.cls is UViTModel}
    heads = num_heads or official.get(dim) or dim // HEAD_WIDTH
    if not heads:
        raise ValueError(f"{path}: width {dim} is below {HEAD_WIDTH}; give num_heads")
    model = UViTModel(
        sample_size=side * patch,
        in_channels=channels,
        patch_size=patch,
        embed_dim=dim,
        depth=2 * count(state, r"in_blocks\.(\d+)\."),
        num_heads=heads,
        mlp_ratio=shape(state, "mid_block.mlp.fc1.weight", 2, path)[0] / dim,
        qkv_bias="mid_block.attn.qkv.bias" in state,
        num_classes=shape(state, "label_emb.weight", 2, path)[0] if labels else None,
        context_dim=shape(state, "context_embed.weight", 2, path)[1] if text else None,
        context_tokens=context_tokens,
        conv="final_layer.weight" in state,
    )
    return fill(model, state, path)


def ddim(path: str | Path, *, sample_size: int | None = None) -> UNet2DModel:
    """The UNet of the DDIM code (`ema_diffusion_cifar10_model-790000.ckpt` and others), and of DDPM converted to it.

    Args:
        sample_size: of the pictures; by default attention is taken to be at 16x16, as in the official models.

    Raises:
        ValueError: as `uvit`, or a `sample_size` that must be given.
    """
    state = read(path)
    levels = range(max(1, count(state, r"down\.(\d+)\.")))
    widths = tuple(shape(state, f"down.{level}.block.0.conv1.weight", 4, path)[0] for level in levels)
    attention = tuple(level for level in levels if f"down.{level}.attn.0.q.weight" in state)
    if sample_size is None and len(attention) != 1:
        raise ValueError(f"{path}: give sample_size; with attention at {len(attention)} levels the file does not tell it")
    if any(width % papers.DDPM_GROUPS for width in widths):
        raise ValueError(
            f"{path}: widths {list(widths)} are not multiples of {papers.DDPM_GROUPS}; a pruned model needs its folder"
        )
    config = papers.ddpm_config(
        sample_size or ATTENTION_SIDE * 2 ** attention[0], widths, attention, count(state, r"down\.0\.block\.(\d+)\.")
    )
    channels = {
        "in_channels": shape(state, "conv_in.weight", 4, path)[1],
        "out_channels": shape(state, "conv_out.weight", 4, path)[0],
    }
    return fill(UNet2DModel(**config, **channels), state, path, lambda name: _ddim_name(name, len(levels)))


_DDIM_NAMES = (
    (r"time_embedding\.linear_1", "temb.dense.0"), (r"time_embedding\.linear_2", "temb.dense.1"),
    (r"conv_norm_out", "norm_out"), (r"down_blocks\.", "down."), (r"downsamplers\.0", "downsample"),
    (r"upsamplers\.0", "upsample"), (r"mid_block\.attentions\.0", "mid.attn_1"), (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"), (r"resnets", "block"), (r"attentions", "attn"), (r"time_emb_proj", "temb_proj"),
    (r"conv_shortcut", "nin_shortcut"), (r"group_norm", "norm"), (r"to_out\.0", "proj_out"), (r"to_([qkv])", r"\1"),
)  # fmt: skip


def _ddim_name(name: str, levels: int) -> str:
    """What a tensor of UNet2DModel is called in the DDIM code, which counts the levels on the way up from the finest, too."""
    name = re.sub(r"up_blocks\.(\d+)", lambda match: f"up.{levels - 1 - int(match[1])}", name)
    for pattern, theirs in _DDIM_NAMES:
        name = re.sub(pattern, theirs, name)
    return name


def diff_pruning(folder: str | Path, *, attention_scale: str | None = None) -> UNet2DModel:
    """The pruned UNet in a pipeline folder of Diff-Pruning's diffusers scripts, from the plain weights in its `unet`.

    Its config is that of the dense model; the widths are read off the weights. The config's pruning record then names the
    first channels of every layer: which ones they were in the dense model is not known, and does not matter.

    Args:
        attention_scale: what attention was scaled by, if queries were pruned: the "dense" width (in torch 1.13, which these
            scripts ask for) or the "pruned" one (torch 2). The file does not tell.

    Raises:
        ValueError: as `uvit`; the folder has pickled modules only; widths that do not fit each other; an `attention_scale`
            that must be given.
    """
    folder = Path(folder)
    if attention_scale not in (None, *ATTENTION_SCALES):
        raise ValueError(f"unknown attention_scale {attention_scale!r}; known: {', '.join(ATTENTION_SCALES)}")
    path = next((folder / name for name in _WEIGHTS if (folder / name).exists()), None)
    if path is None:
        raise ValueError(f"{folder} holds no weights; Diff-Pruning's have unet/{folders.WEIGHTS} or {', '.join(_WEIGHTS[-2:])}")
    state = {_new_attention_name(name): value for name, value in read(path).items()}
    part = folder / "unet" if (folder / "unet" / folders.CONFIG).exists() else folder
    config = folders.read_json(part / folders.CONFIG)
    if config.get("_class_name") != "UNet2DModel":
        raise ValueError(f"{part / folders.CONFIG} names the class {config.get('_class_name')!r}, not 'UNet2DModel'")
    model = UNet2DModel.from_config(config)
    scales = {name: module.scale for name, module in model.named_modules() if isinstance(module, Attention)}
    check_names(model, state, path)
    record = _widths(model, state)
    if record:
        try:
            structure.apply(model, record)
        except ValueError as error:
            raise ValueError(f"{path}: its widths do not fit each other ({error})") from error
    _rescale(model, state, scales, attention_scale, path)
    fill(model, state, path)
    schedule = folders.pipeline_schedule(part)
    if schedule is not None:
        model.register_to_config(noise_schedule=schedule)
    return model


def _new_attention_name(name: str) -> str:
    """diffusers before 0.17 called the layers of attention otherwise."""
    for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")):
        name = re.sub(rf"(attentions\.\d+)\.{old}\.", rf"\1.{new}.", name)
    return name


def _widths(model: nn.Module, state: State) -> structure.Record:
    """A pruning record that gives the layers the widths of the weights in `state`, where these are smaller."""
    record: structure.Record = {}
    for name, module in model.named_modules():
        weight, axes = state.get(f"{name}.weight"), {"out": 0, "in": 1}
        if weight is None or not isinstance(module, (nn.Conv2d, nn.Linear, nn.GroupNorm)):
            continue
        if isinstance(module, nn.GroupNorm) or name == "conv_in":
            axes.pop("in")
        if name == "conv_out":
            axes.pop("out")
        smaller = {axis: i for axis, i in axes.items() if weight.dim() > i and 0 < weight.shape[i] < module.weight.shape[i]}
        if smaller:
            record[name] = {axis: f"0-{weight.shape[i] - 1}" for axis, i in smaller.items()}
    return record


def _rescale(model: nn.Module, state: State, scales: Mapping[str, float], chosen: str | None, path: Path) -> None:
    """Write the ratio of the two scales of pruned attention into its queries, if it was not scaled as torch 2 does."""
    for name, dense in scales.items():
        ratio = dense / model.get_submodule(name).scale
        if ratio == 1:
            continue
        if chosen is None:
            hint = "the file does not tell whether attention was scaled by the dense or the pruned width"
            raise ValueError(f"{path}: {name} is pruned, and {hint}; give attention_scale='dense' (torch 1.13) or 'pruned'")
        for key in (f"{name}.to_q.weight", f"{name}.to_q.bias"):
            if chosen == "dense" and key in state:
                state[key] = state[key] * ratio
