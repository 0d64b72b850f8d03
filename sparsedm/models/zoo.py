"""Named models: the papers' configurations with their published figures, and the checkpoints that ship with the package."""

import copy
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

import diffusers
import torch
from diffusers import ModelMixin
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .. import layers, nm, packing, statedict, structure
from ..files import replacing_folder
from ..packed import is_packed, unpack
from . import classifier, uvit

ASSETS = Path(__file__).parent.parent / "assets"
WEIGHTS, PACKED, CONFIG = "diffusion_pytorch_model.safetensors", "packed.safetensors", "config.json"
INDEX, SHARDS = f"{WEIGHTS}.index.json", "diffusion_pytorch_model-*.safetensors"  # of weights that diffusers has split

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}  # of saved weights


@dataclass(frozen=True)
class PaperModel:
    """A configuration from a paper, with what was published: millions of parameters, G MACs, FID ("" where not found)."""

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
    "uvit-s2-cifar10": PaperModel(uvit.UViTModel, _uvit(32, 2, 3, 512, 12, 8), 44, 12.20, 3.11, _UVIT_README),
    "uvit-s4-celeba64": PaperModel(uvit.UViTModel, _uvit(64, 4, 3, 512, 12, 8), 44, 12.21, 2.87, _UVIT_README),
    "uvit-m4-imagenet64": PaperModel(uvit.UViTModel, _uvit(64, 4, 3, 768, 16, 12, 1001), 131, 35.24, 5.85, _UVIT_README),
    "uvit-l4-imagenet64": PaperModel(uvit.UViTModel, _uvit(64, 4, 3, 1024, 20, 16, 1001), 287, 76.47, 4.26, _UVIT_README),
    "uvit-l2-imagenet256": PaperModel(uvit.UViTModel, _uvit(32, 2, 4, 1024, 20, 16, 1001), 287, 77, 3.40, _UVIT_README),
    "uvit-h2-imagenet256": PaperModel(
        uvit.UViTModel, _uvit(32, 2, 4, 1152, 28, 16, 1001, conv=False), 501, 133, 2.29, _UVIT_README
    ),
    "uvit-l4-imagenet512": PaperModel(uvit.UViTModel, _uvit(64, 4, 4, 1024, 20, 16, 1001), 287, 76.48, 4.67, _UVIT_README),
    "uvit-h4-imagenet512": PaperModel(
        uvit.UViTModel, _uvit(64, 4, 4, 1152, 28, 16, 1001, conv=False), 501, 133.23, 4.05, _UVIT_README
    ),
    "uvit-s2-coco": PaperModel(uvit.UViTModel, _uvit(32, 2, 4, 512, 12, 8, **_TEXT), 45, 16.23, 5.95, _UVIT_README),
    "uvit-s2-deep-coco": PaperModel(uvit.UViTModel, _uvit(32, 2, 4, 512, 16, 8, **_TEXT), 58, 21.24, 5.48, _UVIT_README),
    "ddpm-cifar10": PaperModel(diffusers.UNet2DModel, _ddpm(32, (1, 2, 2, 2), 1), 35.7, 6.1, 4.19, _DP_TABLE),
    "ddpm-celeba64": PaperModel(diffusers.UNet2DModel, _ddpm(64, (1, 2, 2, 2, 4), 2), 78.7, 23.9, 6.48, _DP_TABLE),
    "ddpm-lsun256-church": PaperModel(diffusers.UNet2DModel, _ddpm(256, (1, 1, 2, 2, 4, 4), 4), 113.7, 248.7, 10.6, _DP_TABLE),
    "ddpm-lsun256-bedroom": PaperModel(diffusers.UNet2DModel, _ddpm(256, (1, 1, 2, 2, 4, 4), 4), 113.7, 248.7, 6.9, _DP_TABLE),
    "ddpm-cifar10-sparsedm": PaperModel(diffusers.UNet2DModel, _SPARSEDM_UNET, 92.7, 4.99, None, "SparseDM code (counted)"),
}

_CLASSES = {"UViTModel": uvit.UViTModel, "GlyphClassifier": classifier.GlyphClassifier}


def bundled() -> tuple[str, ...]:
    """Names of the checkpoints that ship with the package."""
    return tuple(sorted(path.parent.name for path in ASSETS.glob(f"*/{CONFIG}")))


def build(name: str) -> ModelMixin:
    """A paper's model with fresh random weights. Raises ValueError for a name that is not in `PAPER_MODELS`."""
    if name not in PAPER_MODELS:
        raise ValueError(f"unknown paper model {name!r}; known: {', '.join(PAPER_MODELS)}")
    model = PAPER_MODELS[name].cls(**PAPER_MODELS[name].config)
    return model.eval()


def load(name_or_folder: str | Path) -> ModelMixin:
    """A bundled model by name, or a model folder (config.json and safetensors), in float32 and eval mode.

    The folder of a diffusers pipeline stands for its denoiser, that of a training run for the model it has made. The config
    carries the noise schedule and prediction type as `noise_schedule`, which sampling and training then use; for a pipeline
    they are those of its scheduler.

    Raises:
        ValueError: unknown name, or a config or weights file that is truncated, renamed or of another shape (named).
        FileNotFoundError: the folder has no config or no weights.
    """
    folder = _folder_of(name_or_folder)
    config = read_json(folder / CONFIG)
    schedule, pruning = config.pop("noise_schedule", None), config.pop("pruning", None)
    model = _class_of(config, folder).from_config(config)
    if pruning:
        structure.apply(model, pruning)
    _load_weights(model, weights_of(folder))
    schedule = pipeline_schedule(folder) if schedule is None else schedule
    if schedule is not None:
        model.register_to_config(noise_schedule=schedule)
    return model.eval()


def _folder_of(name_or_folder: str | Path) -> Path:
    folder = ASSETS / str(name_or_folder)
    if not (folder / CONFIG).exists():
        folder = Path(name_or_folder)
    if not folder.is_dir():
        raise ValueError(f"unknown model {str(name_or_folder)!r}; bundled: {', '.join(bundled())}; or give a folder")
    parts = (folder / part for part in ("unet", "transformer", "model"))  # of a pipeline, or of a run
    return next((part for part in parts if (part / CONFIG).exists()), folder)


def weights_of(name_or_folder: str | Path) -> Path:
    """The weights file of a bundled model or model folder, the packed one if there is one, or the index of several.

    Raises:
        ValueError: there are both, or as `load`.
    """
    folder = _folder_of(name_or_folder)
    there = [name for name in (PACKED, WEIGHTS, INDEX) if (folder / name).exists()]
    if there == [WEIGHTS, INDEX]:
        raise ValueError(f"{folder} holds both {WEIGHTS} and {INDEX}; remove the older one")
    return folder / (there[0] if there else WEIGHTS)


def bytes_of(name_or_folder: str | Path) -> int:
    """The size of the weights file, or of all that it lists. Raises as `load`."""
    path = weights_of(name_or_folder)
    return sum(each.stat().st_size for each in (path.parent.glob(SHARDS) if path.name == INDEX else [path]))


def save(
    model: ModelMixin, folder: str | Path, dtype: torch.dtype | None = None, card: str | None = None, packed: bool = False
) -> None:
    """Write `load`'s folder, whole or not at all: config, weights, and `card` as README.md.

    Weights are written as `dtype`, or as they are; those of sparse-training layers are folded, those of
    packed layers unpacked; the model is not touched.
    With `packed` the N:M sparse ones are written without their zeros (packing.py), else as diffusers does.

    Raises:
        ValueError: `folder` holds other things, or the model has adapters or fused projections, which `load` cannot rebuild.
        OSError: it cannot be written; an earlier folder stays.
    """
    layers.refuse_adapters(model)
    layers.refuse_fused(model)
    _check_replaceable(Path(folder))
    if any(True for _ in layers.nm_layers(model)):
        model = layers.folded(model)
    if any(map(is_packed, model.modules())):
        model = unpack(copy.deepcopy(model))
    with replacing_folder(folder) as temporary:
        model.save_config(temporary)
        weights = {k: v.detach().to(dtype if v.is_floating_point() else None).contiguous() for k, v in model.state_dict().items()}
        if packed:
            packing.write(temporary / PACKED, weights, _worth_packing(model, weights))
        else:
            metadata = {"format": "pt", packing.CHECKSUMS: packing.checksums(weights)}
            save_file(weights, temporary / WEIGHTS, metadata=metadata)
        if card:
            (temporary / "README.md").write_text(card)


def dtype_of(name: str) -> torch.dtype:
    """A dtype to save weights in, by its name. Raises ValueError for one that is not in `DTYPES`."""
    if name not in DTYPES:
        raise ValueError(f"unknown dtype {name!r}; known: {', '.join(DTYPES)}")
    return DTYPES[name]


def _check_replaceable(folder: Path) -> None:
    others = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    others = {name for name in others if name not in (CONFIG, WEIGHTS, INDEX, PACKED, "README.md") and not fnmatch(name, SHARDS)}
    if others or (folder.exists() and not folder.is_dir()):
        raise ValueError(
            f"{folder} is in the way and is no model folder (it holds {', '.join(sorted(others)[:3])}); name a new one"
        )


def save_packed(model: ModelMixin, folder: str | Path, dtype: torch.dtype | None = torch.float16) -> None:
    """`save` without the zeros of N:M sparse weights: at 2:4 in float16 9/16 of the dense bytes. `load` reads it."""
    save(model, folder, dtype, packed=True)


def _worth_packing(model: ModelMixin, weights: Mapping[str, torch.Tensor]) -> dict[str, nm.NMPattern]:
    """The patterns of the weights that get smaller by packing (31:32 does not)."""
    found = {f"{name}.weight": pattern for name, pattern in layers.patterns(model).items()}
    bits = {name: 8 * weights[name].element_size() for name in found}
    return {k: p for k, p in found.items() if p.density * (bits[k] + packing.position_bits(p)) < bits[k]}


def pipeline_schedule(part: Path) -> dict | None:
    """The scheduler's config of the pipeline that `part` is a folder of, or None."""
    path = part.parent / "scheduler" / "scheduler_config.json"
    return read_json(path) if path.exists() else None


def read_json(path: Path) -> dict:
    """The object in a JSON file of a model folder. Raises ValueError or FileNotFoundError, with the path."""
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; a model folder holds {CONFIG} and {WEIGHTS}")
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a JSON object")
    return content


def _class_of(config: Mapping, folder: Path) -> type[ModelMixin]:
    name = str(config.get("_class_name", ""))
    cls = _CLASSES.get(name) or getattr(diffusers, name, None)
    if not (isinstance(cls, type) and issubclass(cls, ModelMixin)):
        raise ValueError(f"{folder / CONFIG} names the class {name!r}, which is neither this package's nor a diffusers model")
    return cls


def _load_weights(model: ModelMixin, path: Path) -> None:
    if not path.exists():
        others = [each.name for each in path.parent.glob("diffusion_pytorch_model*") if not each.match(SHARDS)]
        remedy = f"; load {others[0]} with diffusers' from_pretrained and save it with sparsedm.save" if others else ""
        raise FileNotFoundError(f"{path} is missing; a model folder holds {CONFIG} and {WEIGHTS}{remedy}")
    readers = {PACKED: packing.read, WEIGHTS: _read_plain, INDEX: statedict.read_shards}
    try:
        weights = readers[path.name](path)
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error}); fetch or save it again") from error
    weights = {k: v.float() if v.is_floating_point() else v for k, v in weights.items()}
    try:
        model.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit {type(model).__name__} as {CONFIG} describes it: {error}") from error


def _read_plain(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, checked if it has checksums (this package writes them)."""
    with safe_open(path, "pt") as file:
        metadata, weights = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if packing.CHECKSUMS in metadata:
        packing.check(path, weights, metadata[packing.CHECKSUMS])
    return weights
