"""Model folders: config.json and safetensors, plain or packed, and the checkpoints that ship with the package."""

import copy
import json
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path

import diffusers
import torch
from diffusers import ModelMixin
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .. import models
from ..masking import layers, nm
from ..packing import tensors
from ..packing.packed import has_packed, unpack
from ..pruning import structure
from ..support.files import replacing_folder, restore
from . import statedict

ASSETS = Path(__file__).parent.parent / "assets"
WEIGHTS, PACKED, CONFIG = "diffusion_pytorch_model.safetensors", "packed.safetensors", "config.json"
INDEX, SHARDS = f"{WEIGHTS}.index.json", "diffusion_pytorch_model-*.safetensors"  # of weights that diffusers has split

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}  # of saved weights


def bundled() -> tuple[str, ...]:
    """Names of the checkpoints that ship with the package."""
    return tuple(sorted(path.parent.name for path in ASSETS.glob(f"*/{CONFIG}")))


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
        for place in (folder, folder / "model"):
            restore(place)
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
    With `packed` the N:M sparse ones are written without their zeros (packing/tensors.py), else as diffusers does.

    Raises:
        ValueError: `folder` holds other things, or the model has adapters or fused projections, which `load` cannot rebuild.
        OSError: it cannot be written; an earlier folder stays.
    """
    layers.refuse_adapters(model)
    layers.refuse_fused(model)
    _check_replaceable(Path(folder))
    if layers.is_sparse(model):
        model = layers.folded(model)
    if has_packed(model):
        model = unpack(copy.deepcopy(model))
    with replacing_folder(folder) as temporary:
        model.save_config(temporary)
        weights = {k: v.detach().to(dtype if v.is_floating_point() else None).contiguous() for k, v in model.state_dict().items()}
        if packed:
            tensors.write(temporary / PACKED, weights, _worth_packing(model, weights))
        else:
            metadata = {"format": "pt", tensors.CHECKSUMS: tensors.checksums(weights)}
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
    return {k: p for k, p in found.items() if p.density * (bits[k] + tensors.position_bits(p)) < bits[k]}


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
    cls = getattr(models, name, None) or getattr(diffusers, name, None)
    if not (isinstance(cls, type) and issubclass(cls, ModelMixin)):
        raise ValueError(f"{folder / CONFIG} names the class {name!r}, which is neither this package's nor a diffusers model")
    return cls


def _load_weights(model: ModelMixin, path: Path) -> None:
    if not path.exists():
        others = [each.name for each in path.parent.glob("diffusion_pytorch_model*") if not each.match(SHARDS)]
        remedy = f"; load {others[0]} with diffusers' from_pretrained and save it with sparsedm.save" if others else ""
        raise FileNotFoundError(f"{path} is missing; a model folder holds {CONFIG} and {WEIGHTS}{remedy}")
    readers = {PACKED: tensors.read, WEIGHTS: _read_plain, INDEX: statedict.read_shards}
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
    if tensors.CHECKSUMS in metadata:
        tensors.check(path, weights, metadata[tensors.CHECKSUMS])
    return weights
