"""Official checkpoints as models of this package: U-ViT, UNets of the DDIM code, and folders of Diff-Pruning.

Sizes are read off the shapes. The caller gives the settings that a file does not tell, except for the official models, which are
known by their sizes. Pickled code in the files is refused, never run.
"""

import inspect
import math
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

from diffusers import ModelMixin, UNet2DModel
from diffusers.models.attention_processor import Attention
from torch import nn

from ..models import papers
from ..models.denoisers import CLIP_TOKENS
from ..models.uvit import UViTModel
from ..pruning import structure
from . import folders, skeleton
from .statedict import State, check_names, count, fill, fitted, read, shape

ATTENTION_SCALES = ("dense", "pruned")
UVIT_EPS, DDIM_EPS = 1e-5, 1e-6  # of the norms in the official codes
_OPTIONS = {
    "num_heads": "a number",
    "context_tokens": "a number",
    "norm_eps": "a number",
    "qk_scale": "a number",
    "sample_size": "a number",
    "attention_scale": " or ".join(ATTENTION_SCALES),
}
_WEIGHTS = (
    f"unet/{folders.WEIGHTS}",
    f"unet/{folders.INDEX}",
    "unet/diffusion_pytorch_model.bin",
    folders.WEIGHTS,
    folders.INDEX,
    "diffusion_pytorch_model.bin",
    "pruned/unet_ema_pruned.pth",
    "pruned/unet_pruned.pth",
)


def load(path: str | Path, **options) -> ModelMixin:
    """The model in an official checkpoint, read by `uvit`, `ddim` or `diff_pruning`, whose options it takes.

    Raises:
        ValueError: a checkpoint for none of these functions, an option that the function does not have or of another type, or as
            the function.
    """
    state = None if Path(path).is_dir() else read(path)
    converter = diff_pruning if state is None else _converter(state, path)
    known = {
        name: parameter.annotation for name, parameter in inspect.signature(converter).parameters.items() if name in _OPTIONS
    }
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(f"{path} is converted with {', '.join(known)}, not with {unknown[0]}")
    for name, value in options.items():
        if isinstance(value, bool) or not isinstance(value, known[name]):
            raise ValueError(f"{name} takes {_OPTIONS[name]}, not {value!r}")
    return converter(path, **options) if state is None else converter(path, **options, state=state)


def _converter(state: State, path: str | Path) -> Callable[..., ModelMixin]:
    for convert, name in ((uvit, "patch_embed.proj.weight"), (ddim, "temb.dense.0.weight")):
        if name in state:
            return convert
    raise ValueError(f"{path} is neither of U-ViT nor of the DDIM code; it begins with {', '.join(list(state)[:3])}")


def uvit(
    path: str | Path,
    *,
    num_heads: int | None = None,
    context_tokens: int | None = None,
    norm_eps: float | int | None = None,
    qk_scale: float | int | None = None,
    state: State | None = None,
) -> UViTModel:
    """U-ViT from `nnet_ema.pth`, or `nnet.pth`.

    The file does not tell the noise schedule. This package's default fits the models that the official code trains in
    continuous time; for the Huge and the text-to-image ones set the config's `noise_schedule` to Stable Diffusion's.

    Args:
        num_heads: heads of each attention; must be given unless an official model is as wide and as deep.
        context_tokens: number of text tokens of a text-to-image model; must be given unless an official model has as many.
        norm_eps: the epsilon of the layer norms, by default as in the official code: 1e-5.
        qk_scale: the factor of queries times keys in attention, by default as in the official code: 1 / sqrt(width of a head).
        state: what `read` gives, if the file has been read.

    A warning names the defaults that are taken, unless the model is an official one.

    Raises:
        ValueError: as `read`, a tensor that is missing, unexpected or of another shape (named), an argument that must be given
            or that the file contradicts, or an option of the official code that `UViTModel` does not have.
    """
    state = read(path) if state is None else state
    _refuse_uvit_options(state, path)
    _, tokens, dim = shape(state, "pos_embed", 3, path)
    _, channels, patch, _ = shape(state, "patch_embed.proj.weight", 4, path)
    text, labels = "context_embed.weight" in state, "label_emb.weight" in state
    depth = 2 * count(state, r"in_blocks\.(\d+)\.")
    official = [m.config for m in papers.PAPER_MODELS.values() if m.cls is UViTModel]
    official = [config for config in official if (config["embed_dim"], config["depth"]) == (dim, depth)]
    if text and context_tokens is None:
        context_tokens = _official_text(official, tokens, patch, path)
    if not text and context_tokens is not None:
        raise ValueError(f"{path} is of a model without text (context_embed.weight is missing); leave context_tokens out")
    patches = tokens - 1 - labels - (context_tokens or 0)
    side = math.isqrt(max(patches, 0))
    if side**2 != patches or not patches:
        raise ValueError(f"{path}: {patches} of the {tokens} rows of pos_embed are left for patches, which is no square")
    heads = official[0]["num_heads"] if num_heads is None and official else num_heads
    if heads is None:
        raise ValueError(f"{path}: the file does not tell the number of heads of its width {dim}; give num_heads (--heads)")
    if heads < 1 or dim % heads:
        raise ValueError(f"{path}: num_heads must divide the width {dim}, {heads} does not")
    model = UViTModel(
        sample_size=side * patch,
        in_channels=channels,
        patch_size=patch,
        embed_dim=dim,
        depth=depth,
        num_heads=heads,
        mlp_ratio=shape(state, "mid_block.mlp.fc1.weight", 2, path)[0] / dim,
        qkv_bias="mid_block.attn.qkv.bias" in state,
        num_classes=shape(state, "label_emb.weight", 2, path)[0] if labels else None,
        context_dim=shape(state, "context_embed.weight", 2, path)[1] if text else None,
        context_tokens=context_tokens or CLIP_TOKENS,
        conv="final_layer.weight" in state,
        norm_eps=_positive("norm_eps", UVIT_EPS if norm_eps is None else norm_eps),
    )
    fill(model, state, path)
    if qk_scale is not None:
        _scale_queries(model, _positive("qk_scale", qk_scale) * math.sqrt(dim // heads))
    if heads not in [config["num_heads"] for config in official]:
        _tell_defaults(path, norm_eps=(norm_eps, UVIT_EPS), qk_scale=(qk_scale, "1 / sqrt(width of a head)"))
    return model


def _refuse_uvit_options(state: State, path: str | Path) -> None:
    """Raise ValueError for a model made with an option of the official code that UViTModel does not have."""
    without_skips = any(name.startswith("out_blocks.") for name in state) and not any(".skip_linear." in name for name in state)
    for option, made_with in (("mlp_time_embed=True", "time_embed.0.weight" in state), ("skip=False", without_skips)):
        if made_with:
            raise ValueError(f"{path} is of a U-ViT made with the option {option}, which UViTModel does not have")


def _official_text(official: list[dict], tokens: int, patch: int, path: str | Path) -> int:
    """The number of text tokens of the official model with as many `tokens` in all."""
    for config in official:
        text = config.get("context_tokens", 0)
        if text and config["patch_size"] == patch and 1 + text + (config["sample_size"] // patch) ** 2 == tokens:
            return text
    hint = f"the file does not tell how many of its {tokens} tokens are text"
    raise ValueError(f"{path}: {hint}; give context_tokens (--context-tokens)")


def _scale_queries(model: UViTModel, ratio: float) -> None:
    """Attention here scales by 1 / sqrt(width of a head); another scale goes into the queries, the first third of qkv."""
    for name, parameter in model.named_parameters():
        if ".qkv." in name:
            parameter.data[: len(parameter) // 3] *= ratio


def _tell_defaults(path: str | Path, **settings: tuple[float | None, float | str]) -> None:
    """Warn of the settings, each with what was given and the default, that the file does not tell and that were not given."""
    taken = {name: default for name, (given, default) in settings.items() if given is None}
    if taken:
        words = " and ".join(f"{name} {default}" for name, default in taken.items())
        options = ", ".join(f"{name} (--{name.replace('_', '-')})" for name in taken)
        warnings.warn(f"{path}: {words} of the official code are assumed; if the model has others, give {options}", stacklevel=3)


def _positive(name: str, value: float) -> float:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive, it is {value}")
    return value


def ddim(
    path: str | Path, *, sample_size: int | None = None, norm_eps: float | int | None = None, state: State | None = None
) -> UNet2DModel:
    """The UNet of the DDIM code (`ema_diffusion_cifar10_model-790000.ckpt` and others), and of DDPM converted to it.

    Args:
        sample_size: height and width of the pictures; must be given unless an official model has the same widths and attention.
        norm_eps: the epsilon of the group norms, by default as in the official code: 1e-6. A warning tells it, unless the model
            is an official one.
        state: what `read` gives, if the file has been read.

    Raises:
        ValueError: as `uvit`.
    """
    state = read(path) if state is None else state
    levels = range(max(1, count(state, r"down\.(\d+)\.")))
    widths = tuple(shape(state, f"down.{level}.block.0.conv1.weight", 4, path)[0] for level in levels)
    attention = tuple(level for level in levels if f"down.{level}.attn.0.q.weight" in state)
    if any(width % papers.DDPM_GROUPS for width in widths):
        raise ValueError(
            f"{path}: widths {list(widths)} are not multiples of {papers.DDPM_GROUPS}; a pruned model needs its folder"
        )
    if len(widths) > 1 and not any(".downsample." in name for name in state):
        raise ValueError(f"{path} is of a UNet made with the option resamp_with_conv=False, which UNet2DModel does not have")
    sizes = papers.ddpm_config(sample_size, widths, attention, count(state, r"down\.0\.block\.(\d+)\."))
    official = _official_sizes(sizes)
    if sample_size is None and not official:
        raise ValueError(f"{path}: the file does not tell the size of the pictures; give sample_size (--sample-size)")
    size = official[0] if sample_size is None else sample_size
    if size < 1 or size % 2 ** (len(widths) - 1):
        raise ValueError(f"{path}: pictures of sample_size {size} cannot be halved {len(widths) - 1} times")
    config = sizes | {"sample_size": size, "norm_eps": _positive("norm_eps", DDIM_EPS if norm_eps is None else norm_eps)}
    channels = {
        "in_channels": shape(state, "conv_in.weight", 4, path)[1],
        "out_channels": shape(state, "conv_out.weight", 4, path)[0],
    }
    model = fill(UNet2DModel(**config, **channels), state, path, lambda name: _ddim_name(name, len(levels)))
    if not official:
        _tell_defaults(path, norm_eps=(norm_eps, DDIM_EPS))
    return model


def _official_sizes(sizes: dict) -> list[int]:
    """The sizes of the pictures of the official UNets with these widths and attention."""
    official = [paper.config for paper in papers.PAPER_MODELS.values() if paper.cls is UNet2DModel]
    return [config["sample_size"] for config in official if {**sizes, "sample_size": config["sample_size"]} == config]


_DDIM_NAMES = (
    (r"time_embedding\.linear_1", "temb.dense.0"), (r"time_embedding\.linear_2", "temb.dense.1"),
    (r"conv_norm_out", "norm_out"), (r"down_blocks\.", "down."), (r"downsamplers\.0", "downsample"),
    (r"upsamplers\.0", "upsample"), (r"mid_block\.attentions\.0", "mid.attn_1"), (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"), (r"resnets", "block"), (r"attentions", "attn"), (r"time_emb_proj", "temb_proj"),
    (r"conv_shortcut", "nin_shortcut"), (r"group_norm", "norm"), (r"to_out\.0", "proj_out"), (r"to_([qkv])", r"\1"),
)  # fmt: skip


def _ddim_name(name: str, levels: int) -> str:
    """The name of a tensor of UNet2DModel in the DDIM code, which counts the levels from the finest on the way up, too."""
    name = re.sub(r"up_blocks\.(\d+)", lambda match: f"up.{levels - 1 - int(match[1])}", name)
    for pattern, official in _DDIM_NAMES:
        name = re.sub(pattern, official, name)
    return name


def diff_pruning(folder: str | Path, *, attention_scale: str | None = None) -> UNet2DModel:
    """The pruned UNet in a pipeline folder of Diff-Pruning's diffusers scripts, from the plain weights in its `unet`.

    The folder's config describes the dense model; the widths are read off the weights. The pruning record of the new config then
    names the first channels of every layer: which channels of the dense model were kept is not known, and does not matter.

    Args:
        attention_scale: the width by which attention was scaled, if queries were pruned: the "dense" width (in torch 1.13, which
            these scripts ask for) or the "pruned" width (torch 2). The file does not tell.

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
    try:
        model = skeleton.model_of(UNet2DModel, config, None, state)
    except ValueError as error:
        raise ValueError(f"{part / folders.CONFIG}: {error}") from error
    scales = {name: module.scale for name, module in model.named_modules() if isinstance(module, Attention)}
    check_names(model, state, path)
    record = _widths(model, state)
    if record:
        try:
            structure.apply(model, record)
        except ValueError as error:
            raise ValueError(f"{path}: its widths do not fit each other ({error})") from error
    _rescale(model, state, scales, attention_scale, path)
    skeleton.fill(model, fitted(model, state, path))
    schedule = folders.pipeline_schedule(part)
    if schedule is not None:
        model.register_to_config(noise_schedule=schedule)
    return model.eval()


def _new_attention_name(name: str) -> str:
    """The present name of a tensor: diffusers before 0.17 named the layers of attention in another way."""
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
    """Write the ratio of the two scales of pruned attention into its queries, if attention was not scaled as in torch 2."""
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
