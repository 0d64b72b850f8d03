"""Model folders: config.json and safetensors, plain or packed, and the checkpoints that ship with the package."""

import copy
import inspect
import json
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path

import diffusers
import torch
from diffusers import ModelMixin, SchedulerMixin

from .. import diffusion, models
from ..masking import layers
from ..masking.plain import refuse_adapters, refuse_fused
from ..models import denoisers
from ..packing import tensors
from ..packing.packed import has_packed, unpack
from ..support import files, tensorfiles
from ..support.files import replacing_folder, restore
from . import skeleton, statedict

ASSETS = Path(__file__).parent.parent / "assets"
WEIGHTS, CONFIG, CARD = "diffusion_pytorch_model.safetensors", "config.json", "README.md"
PACKED = "packed.safetensors"  # what packed weights were called before `from_pretrained` could read them
SCHEDULE = "scheduler/scheduler_config.json"  # of a pipeline
INDEX, SHARDS = f"{WEIGHTS}.index.json", "diffusion_pytorch_model-*.safetensors"  # of weights that diffusers has split

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}  # of saved weights
LOST = 0.01  # of the size of a tensor; a float16 or bfloat16 of normal size loses 0.0015 at most
TEXT, MOST_TEXT = "context_tokens", 10_000  # the number of text tokens, which UNet2DConditionModel's own config does not tell


def bundled() -> tuple[str, ...]:
    """Names of the checkpoints that ship with the package."""
    return tuple(sorted(path.parent.name for path in ASSETS.glob(f"*/{CONFIG}")))


def load(name_or_folder: str | Path) -> ModelMixin:
    """A bundled model by name, or a model folder (config.json and safetensors), in float32 and eval mode.

    The folder of a diffusers pipeline stands for its denoiser, the folder of a training run for the trained model. The config
    carries the noise schedule and prediction type as `noise_schedule`, which sampling and training then use; for a pipeline
    they come from its scheduler.

    Raises:
        ValueError: unknown name; a config, noise schedule or pruning record that makes no model; weights that are truncated,
            damaged (as the checksums tell, if there are any), not finite, or not of the model in the config. The file is named.
            No more memory is taken than the weights need.
        FileNotFoundError: the folder has no config or no weights.
    """
    folder = _folder_of(name_or_folder)
    config = read_json(folder / CONFIG)
    schedule, pruning, _ = (config.pop(key, None) for key in ("noise_schedule", "pruning", "quantization_config"))
    cls, path = _class_of(config, folder), weights_of(folder)
    text = _pop_text(config, cls, folder)
    weights = _read_weights(path)
    try:
        model = skeleton.model_of(cls, config, pruning, weights)
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from error
    if misfits := skeleton.misfits(model, weights):
        raise ValueError(f"{path} does not fit {cls.__name__} as {CONFIG} describes it: {misfits}")
    try:
        skeleton.fill(model, weights)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; fetch or save it again") from error
    model.register_to_config(**text)
    take_schedule(model, schedule, folder)
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
    """The weights file of a bundled model or model folder, or the index of several files.

    Raises:
        ValueError: there are both a weights file and an index, or as `load`.
    """
    folder = _folder_of(name_or_folder)
    names = [name for name in (PACKED, WEIGHTS, INDEX) if (folder / name).exists()]
    if names == [WEIGHTS, INDEX]:
        raise ValueError(f"{folder} holds both {WEIGHTS} and {INDEX}; remove the older one")
    return folder / (names[0] if names else WEIGHTS)


def bytes_of(name_or_folder: str | Path) -> int:
    """The size of the weights file, or of all files beside an index. Raises as `load`."""
    path = weights_of(name_or_folder)
    return sum(file.stat().st_size for file in (path.parent.glob(SHARDS) if path.name == INDEX else [path]))


def save(
    model: ModelMixin, folder: str | Path, dtype: torch.dtype | None = None, card: str | None = None, packed: bool = False
) -> None:
    """Write `load`'s folder, whole or not at all: config, weights, and `card` as README.md.

    Weights are written as `dtype`, or in their own dtype. Sparse-training layers are folded and packed layers unpacked in a copy;
    the model is not touched. With `packed` N:M sparse weights are written without their zeros (packing/tensors.py), with a card
    that tells how to load them, else as diffusers does. Equal models make equal files, with a checksum for each tensor.

    Raises:
        ValueError: no diffusers model; `folder` holds other things; the model has adapters or fused projections, which `load`
            cannot rebuild; a tensor (named) is not finite, too large for `dtype`, or so small that it would lose more than `LOST`
            of itself.
        OSError: the folder cannot be written; an earlier folder stays.
    """
    if not hasattr(model, "save_config"):
        remedy = "derive it from diffusers' ModelMixin and ConfigMixin, or save its state_dict() with torch"
        raise ValueError(f"{type(model).__name__} is no diffusers model, which a folder needs; {remedy}")
    refuse_adapters(model)
    refuse_fused(model)
    _check_replaceable(Path(folder))
    if layers.is_sparse(model):
        model = layers.folded(model)
    if has_packed(model):
        model = unpack(copy.deepcopy(model))
    with replacing_folder(folder) as temporary:
        model.save_config(temporary)
        weights = {name: _cast(name, value, dtype) for name, value in model.state_dict().items()}
        patterns = tensors.worth_packing(weights) if packed else {}
        _note_packing(temporary / CONFIG, bool(patterns))
        if patterns:
            tensors.write(temporary / WEIGHTS, weights, patterns)
        else:
            tensorfiles.save(temporary / WEIGHTS, weights)
        if card or patterns:
            (temporary / CARD).write_text(card or HOW_TO_LOAD)


HOW_TO_LOAD = """The N:M sparse weights here are packed: their zeros are left out. The Python package sparsedm reads them:

```python
import sparsedm  # before from_pretrained, which reads packed weights then

model = sparsedm.load("this folder")
```
"""


def _note_packing(config: Path, packed: bool) -> None:
    """Let a written config say whether its weights are packed, whatever the model was loaded from."""
    content = read_json(config)
    if packed or "quantization_config" in content:
        content.pop("quantization_config", None)
        content |= {"quantization_config": tensors.QUANTIZATION} if packed else {}
        config.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _cast(name: str, value: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """A tensor of a model in the dtype in which it is saved. Raises ValueError, by `name`, as `save`."""
    value = value.detach().cpu().contiguous()
    if not value.is_floating_point():
        return value
    if not skeleton.is_finite(value):
        raise ValueError(f"{name} holds NaN or infinity; a folder with it would not be loaded")
    cast, most = value.to(dtype), value.abs().max() if value.numel() else 0
    kind, remedy = str(cast.dtype).removeprefix("torch."), f"save it in {_WIDER.get(cast.dtype, 'its own dtype')}"
    if not skeleton.is_finite(cast):
        raise ValueError(f"{name} holds {most:.3g}, more than {kind} can ({torch.finfo(cast.dtype).max:.3g}); {remedy}")
    if cast.dtype != value.dtype and (cast.to(value.dtype) - value).abs().sum() > LOST * value.abs().sum():
        raise ValueError(f"{name} is so small that {kind} makes zeros of much of it ({most:.3g} at most); {remedy}")
    return cast


_WIDER = {torch.float16: "float32 or bfloat16", torch.bfloat16: "float32"}


def dtype_of(name: str) -> torch.dtype:
    """A dtype to save weights in, by its name. Raises ValueError for a name that is not in `DTYPES`."""
    if name not in DTYPES:
        raise ValueError(f"unknown dtype {name!r}; known: {', '.join(DTYPES)}")
    return DTYPES[name]


def _check_replaceable(folder: Path) -> None:
    others = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    others = {name for name in others if name not in (CONFIG, WEIGHTS, INDEX, PACKED, CARD) and not fnmatch(name, SHARDS)}
    if others or (folder.exists() and not folder.is_dir()):
        raise ValueError(
            f"{folder} is in the way and is no model folder (it holds {', '.join(sorted(others)[:3])}); name a new one"
        )


def save_packed(model: ModelMixin, folder: str | Path, dtype: torch.dtype | None = None) -> None:
    """`save` without the zeros of N:M sparse weights, in `dtype` or the model's own; `load` and `from_pretrained` read it.

    A 2:4 weight takes 9/16 of its dense bytes in float16 and bfloat16, 17/32 in float32.
    """
    save(model, folder, dtype, packed=True)


def pipeline_schedule(part: Path) -> dict | None:
    """The scheduler's config of the pipeline that `part` is a folder of, or None."""
    path = part.parent / SCHEDULE
    return read_json(path) if path.exists() else None


def read_json(path: Path) -> dict:
    """The object in a JSON file of a model folder. Raises ValueError or FileNotFoundError, with the path."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; a model folder holds {CONFIG} and {WEIGHTS}")
    return files.read_json(path, "fetch or save it again")


def _class_of(config: Mapping, folder: Path) -> type[ModelMixin]:
    name = str(config.get("_class_name", ""))
    try:
        cls = getattr(models, name, None) or getattr(diffusers, name, None)
    except Exception:  # of any kind: diffusers imports the class's module now
        cls = None
    if not (isinstance(cls, type) and issubclass(cls, ModelMixin)):
        raise ValueError(f"{folder / CONFIG} names the class {name!r}, which is neither this package's nor a diffusers model")
    return cls


def _pop_text(config: dict, cls: type[ModelMixin], folder: Path) -> dict[str, int]:
    """The number of text tokens, taken out of a config whose class does not know it; {} if the config does not tell."""
    if TEXT in inspect.signature(cls.__init__).parameters or TEXT not in config:
        return {}
    tokens = config.pop(TEXT)
    if type(tokens) is not int or not 1 <= tokens <= MOST_TEXT:
        raise ValueError(f"{folder / CONFIG}: {TEXT} is {str(tokens)[:60]!r}, no number from 1 to {MOST_TEXT}")
    return {TEXT: tokens}


def _read_weights(path: Path) -> statedict.State:
    """The tensors of a weights file or an index, checked, by their names in a state dict."""
    if not path.is_file():
        others = [file.name for file in path.parent.glob("diffusion_pytorch_model*") if not file.match(SHARDS)]
        remedy = f"; load {others[0]} with diffusers' from_pretrained and save it with sparsedm.save" if others else ""
        raise FileNotFoundError(f"{path} is missing; a model folder holds {CONFIG} and {WEIGHTS}{remedy}")
    if path.name == PACKED:
        return tensors.read(path)
    state, metadata = (statedict.read_shards if path.name == INDEX else tensorfiles.read)(path)
    return tensors.unpacked_state(path, state, metadata) if tensors.is_packed(metadata) else state


def take_schedule(model: ModelMixin, schedule: dict | None, folder: Path) -> None:
    """Note the noise schedule of the folder's config, or of its pipeline, in the model's config, after a try with samplers."""
    path = folder / CONFIG
    if schedule is None:
        path, schedule = folder.parent / SCHEDULE, pipeline_schedule(folder)
    if schedule is None:
        return
    try:
        if not isinstance(schedule, dict):
            raise ValueError(f"it is no object, but {str(schedule)[:60]}")
        model.register_to_config(noise_schedule=schedule)
        for scheduler in _schedulers(model, schedule):
            _try(scheduler)
    except Exception as error:  # of any kind: diffusers' schedulers do not check what they are given
        raise ValueError(f"{path}: its noise schedule cannot be sampled with ({str(error) or repr(error)})"[:500]) from error


def _schedulers(model: ModelMixin, schedule: dict) -> Iterator[SchedulerMixin]:
    """The schedulers that sampling and training make of a schedule; of the config of another scheduler, this scheduler."""
    steps = schedule.get("num_train_timesteps", 1)
    if type(steps) is not int or not 1 <= steps <= diffusion.MOST_STEPS:
        raise ValueError(f"num_train_timesteps is {steps!r}, no number from 1 to {diffusion.MOST_STEPS}")
    own = getattr(diffusers, str(schedule.get("_class_name")), None)
    if denoisers.of(model).flow:
        yield diffusion.training_scheduler(model)
    elif isinstance(own, type) and issubclass(own, SchedulerMixin) and own not in diffusion.SAMPLERS.values():
        yield own.from_config(schedule)
    else:
        yield from diffusion.possible_samplers(schedule)


def _try(scheduler: SchedulerMixin) -> None:
    """Take one step of a tiny picture with the samplers of this package."""
    if type(scheduler) not in diffusion.SAMPLERS.values():
        return
    scheduler.set_timesteps(min(2, scheduler.config.num_train_timesteps))
    zeros = torch.zeros(1, 1, 2, 2)
    scheduler.step(zeros, int(scheduler.timesteps[0]), zeros, generator=torch.Generator())
