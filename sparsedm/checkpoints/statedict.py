"""State dicts in files of other programs: read as tensors only, and loaded into a model by name and shape."""

import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from diffusers import ModelMixin

from ..support import tensorfiles
from ..support.files import parse_json

State = dict[str, torch.Tensor]


def read(path: str | Path) -> State:
    """The state dict in a file of torch.save or safetensors, or in the files of an index (`read_shards`), in float32.

    A training checkpoint (a list, as the DDIM code saves it) gives the averaged weights, or else the raw weights.

    Raises:
        ValueError: the file holds pickled code, is no state dict, or has a tensor with NaN or infinity (named).
        FileNotFoundError: there is no such file.
    """
    try:
        if str(path).endswith(".index.json"):
            content, _ = read_shards(path)
        elif str(path).endswith(".safetensors"):
            content, _ = tensorfiles.read(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # torch.load and safetensors have many
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code:
            remedy = "save its state_dict() with the program that made it"
            raise ValueError(f"{path} holds pickled code ({code[1]}), which is not run here; {remedy}") from error
        reason = "no pickle of tensors" if isinstance(error, pickle.UnpicklingError) else str(error).strip().split("\n")[0][:100]
        raise ValueError(f"{path} is not a checkpoint that can be read as tensors ({reason})") from error
    if isinstance(content, (list, tuple)) and content:
        content = content[-1] if _is_state(content[-1]) else content[0]
    if not _is_state(content):
        raise ValueError(f"{path} holds no state dict, but a {type(content).__name__}")
    parallel = all(name.startswith("module.") for name in content)  # nn.DataParallel
    state = {name.removeprefix("module.") if parallel else name: value.float() for name, value in content.items()}
    for name, value in state.items():
        if not value.isfinite().all():
            raise ValueError(f"{path}: {name} holds NaN or infinity; the training has diverged, take an earlier checkpoint")
    return state


def read_shards(index: str | Path) -> tuple[State, dict]:
    """The tensors of a large checkpoint that diffusers has split, and the metadata of the first file.

    These are the tensors of all safetensors files that `index` lists, which lie beside it.

    Raises:
        ValueError: no such index, or a file that cannot be read or does not hold just the tensors that the index says.
        FileNotFoundError: a file is not there.
    """
    index, state, metadata = Path(index), {}, {}
    try:
        files = parse_json(index.read_text())["weight_map"]
        names = sorted(set(files.values()))
        plain = all(Path(name).name == name and name.endswith(".safetensors") for name in names)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is not an index of safetensors files ({error!r}); fetch or save it again") from error
    if not plain:
        raise ValueError(f"{index} lists other files than safetensors files beside it")
    for name in names:
        path, listed = index.with_name(name), {tensor for tensor, file in files.items() if file == name}
        try:
            tensors, told = tensorfiles.read(path, part=True)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{path} is missing, which {index.name} lists") from error
        if other := sorted(listed ^ set(tensors)):
            raise ValueError(f"{path}: {other[0]} is {'missing' if other[0] in listed else f'not listed in {index.name}'}")
        state, metadata = state | tensors, metadata or told
    return state, metadata


def _is_state(content) -> bool:
    return isinstance(content, Mapping) and bool(content) and all(isinstance(x, torch.Tensor) for x in content.values())


def shape(state: State, name: str, axes: int, path: str | Path) -> tuple[int, ...]:
    """The shape of a tensor with `axes` axes. Raises ValueError, with file and name, if the tensor is missing or has others."""
    if name not in state:
        raise ValueError(f"{path}: {name} is missing")
    if state[name].dim() != axes:
        raise ValueError(f"{path}: {name} has shape {list(state[name].shape)}, not {axes} axes")
    return tuple(state[name].shape)


def count(state: State, pattern: str) -> int:
    """One more than the largest number that `pattern` matches at the start of a name; 0 if no name matches."""
    return max((int(match[1]) + 1 for match in map(re.compile(pattern).match, state) if match), default=0)


def check_names(model: ModelMixin, state: State, path: str | Path, official: Callable[[str], str] = str) -> None:
    """Raise ValueError, with its name, for a tensor of the model that `state` lacks, or of `state` that the model lacks."""
    names = dict.fromkeys(map(official, model.state_dict()))
    for name in names:
        if name not in state:
            raise ValueError(f"{path}: {name} is missing")
    unexpected = [name for name in state if name not in names]
    if unexpected:
        raise ValueError(f"{path}: {', '.join(unexpected[:3])} is not of {type(model).__name__}")


def fill(model: ModelMixin, state: State, path: str | Path, official: Callable[[str], str] = str) -> ModelMixin:
    """Load `state`, in which the tensors are called `official(name)`, into `model`; 1x1 convolutions may become linear.

    Raises:
        ValueError: a tensor that is missing, unexpected or of another shape, by its name in the file.
    """
    model.load_state_dict(fitted(model, state, path, official))
    return model.eval()


def fitted(model: ModelMixin, state: State, path: str | Path, official: Callable[[str], str] = str) -> State:
    """The tensors of `state` by their names in `model`, in its shapes. Raises ValueError as `fill`."""
    check_names(model, state, path, official)
    taken = {}
    for name, value in model.state_dict().items():
        tensor = state[official(name)]
        if tensor.shape == (*value.shape, 1, 1):
            tensor = tensor.flatten(1)
        if tensor.shape != value.shape:
            raise ValueError(f"{path}: {official(name)} has shape {list(tensor.shape)}, not {list(value.shape)}")
        taken[name] = tensor
    return taken
