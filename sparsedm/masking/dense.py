"""Which layers stay dense by default: by the list of the model's family, or by a rule for any denoiser.

The families' lists come from the papers and stand in `models/denoisers.py`. The general rule looks for the repeated blocks,
where nearly all the time goes. Outside of the blocks are the embeddings, and the first and last layers, whose patches and
pixels have too few channels to spare. Within the blocks are modulations (adaLN): a modulation follows from the timestep, steers
every token, and runs once a picture, so that its time does not count.
"""

import re
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase

from torch import nn

Rule = Callable[[str], str | None]  # a layer's name to the reason why it stays dense, or None

_FAMILIES: dict[str, tuple[str, ...]] = {}
_STEERING = re.compile(r"norm|emb(ed|_|$)|(^|_)mod(ulation)?s?(_|$)|ada_?ln|scale_shift|mapper|caption_proj", re.IGNORECASE)


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
