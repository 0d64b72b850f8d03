"""Which layers stay dense by default: by the list of the model's family, or by a rule for any denoiser.

The families' lists come from the papers and stand in `models/denoisers.py`. The general rule looks for the repeated blocks,
where nearly all the time goes. Outside of the blocks are the embeddings, and the first and last layers, whose patches and
pixels have too few channels to spare. Within the blocks are modulations (adaLN): a modulation follows from the timestep, steers
every token, and runs once a picture, so that its time does not count.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn

from .nm import NMPattern
from .plain import weight_layers
from .srste import SPARSE_CLASS, NMLayer

Rule = Callable[[str], str | None]  # a layer's name to the reason why it stays dense, or None

_FAMILIES: dict[str, tuple[str, ...]] = {}
_STEERING = re.compile(
    r"norm|emb(ed|_|$)|(^|_)mod(ulation)?s?(_|$)|ada_?ln|scale_(shift|bias)|film|mapper|caption_proj", re.IGNORECASE
)


def register(class_name: str, globs: tuple[str, ...]) -> None:
    """From now on `globs` of layer names stay dense by default in models of this class and its subclasses."""
    _FAMILIES[class_name] = globs


def default_rule(model: nn.Module) -> Rule:
    """The rule for `model`: the globs of its class or the nearest registered parent class, else the general rule."""
    globs = next((_FAMILIES[cls.__name__] for cls in type(model).__mro__ if cls.__name__ in _FAMILIES), None)
    return _general(model) if globs is None else by_globs(globs)


def by_globs(globs: Iterable[str]) -> Rule:
    """Layers whose name matches one of `globs` stay dense."""

    def rule(name: str) -> str | None:
        glob = next((glob for glob in globs if fnmatchcase(name, glob)), None)
        return glob and f"excluded by rule {glob}"

    return rule


def _general(model: nn.Module) -> Rule:
    blocks = set(_blocks(model))

    def rule(name: str) -> str | None:
        parts = name.split(".")
        steering = next((part for part in parts if _STEERING.search(part)), None)
        if steering:
            return f"modulation or embedding: part of {steering}"
        outside = blocks.isdisjoint(".".join(parts[:i]) for i in range(1, len(parts)))
        return "first, last or conditioning layer: outside the repeated blocks" if outside else None

    return rule if blocks else lambda name: None


def _blocks(model: nn.Module) -> Iterable[str]:
    """Names of the modules in a ModuleList, bare layers apart, and of the block in the middle."""
    for name, module in model.named_modules():
        parent, _, last = name.rpartition(".")
        repeated = name and isinstance(model.get_submodule(parent), nn.ModuleList)
        if (repeated or last.startswith("mid")) and list(module.children()):
            yield name


def check_globs(globs: Sequence[str], layers: Mapping[str, nn.Module]) -> None:
    """Raise ValueError if a glob matches the name of no layer."""
    for glob in globs:
        if glob != "*" and not any(fnmatchcase(name, glob) for name in layers):
            raise ValueError(f"{glob!r} matches no layer; the layers are {', '.join(list(layers)[:8])} ...")


def why_dense(name: str, module: nn.Module, pattern: NMPattern, include: Sequence[str], excluded: Rule) -> str | None:
    """Why a layer cannot or must not be sparse, or None for a layer that will be."""
    if not any(fnmatchcase(name, glob) for glob in include):
        return "not included"
    if reason := excluded(name):
        return reason
    if type(module) not in SPARSE_CLASS and not isinstance(module, NMLayer):
        return f"class {type(module).__name__} is not plain Linear or Conv2d"
    if getattr(module, "groups", 1) != 1:
        return f"grouped convolution ({module.groups} groups)"
    axis = module.weight.shape[1]
    if axis % pattern.m:
        return f"{axis} inputs, not a multiple of {pattern.m}"
    return None


def shared_weights(model: nn.Module) -> dict[str, str]:
    """Layers whose weight other modules use, too: the others would see the dense weight until `fold`, then the zeros."""
    users: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            users.setdefault(id(parameter), []).append(name)
    shared = ((name, users.get(id(module.weight), ())) for name, module in weight_layers(model))
    return {name: f"its weight is used by {' and '.join(names)}" for name, names in shared if len(names) > 1}
