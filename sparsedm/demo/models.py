"""The models that the page offers: the bundled ones, the dense ones with masks and no training, and the owner's folders."""

import copy
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from .. import data
from ..checkpoints import folders
from ..experiments.recipes import RECIPES
from ..masking import layers
from ..measure import macs
from ..models import denoisers
from ..packing import packed

ONE_SHOT = ("2:4", "1:4", "3:4", "4:8", "7:8", "15:16")
PACK_BATCH = 6  # pictures that packing times layers with: a word of six letters
ROLES = {"teacher": "dense", "2x4": "2:4 SparseDM", "diffpruned": "Diff-Pruning"}  # of bundled models, as people read them


@dataclass(frozen=True)
class Entry:
    """A model on offer.

    Attributes:
        title: what people read.
        source: what `sparsedm.load` takes: a bundled name or a folder.
        role: one of `ROLES`, "masked" for a teacher masked without training, or "own" for a folder.
        base: the bundled teacher that it is or was made of; "" for a folder.
        pattern: N:M to mask it with; "" for a model that stays as it is stored.
    """

    title: str
    source: str | Path
    role: str
    base: str = ""
    pattern: str = ""


BUNDLED = {
    name: Entry(f"{found.backbone}, {ROLES[found.role]}", name, found.role, found.base or name)
    for name, found in RECIPES.items()
    if found.bundle
}
BASES = {name: RECIPES[name].backbone for name, entry in BUNDLED.items() if entry.role == "teacher"}


@dataclass(frozen=True)
class Variant:
    """A model with the figures that do not change from run to run: MACs, parameters, bytes of weights in memory."""

    title: str
    model: nn.Module
    macs: macs.Macs
    parameters: int
    nonzero: int
    bytes: int
    kernels: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a picture: (channels, height, width)."""
        return tuple(denoisers.of(self.model).shape(self.model))

    @property
    def classes(self) -> int:
        """How many there are to ask for; 0 for a model without classes."""
        return denoisers.null_label(self.model) or 0

    @property
    def spells(self) -> bool:
        """Whether its classes are the letters and digits."""
        return self.classes == len(data.GLYPHS) and self.shape == (1, 16, 16)


@dataclass
class Catalogue:
    """Models by key, loaded when first asked for and kept.

    Keys are the bundled names, `NAME@N:M` for a dense bundled model masked without training, and the names of `folders`.
    """

    folders: Sequence[Path] = ()
    device: str = "cpu"
    _loaded: dict[str, Variant] = field(default_factory=dict, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def __post_init__(self):
        own = {folder.resolve().name: folder for folder in self.folders}
        if len(own) < len(self.folders):
            raise ValueError("two folders have the same name: rename one")
        self.entries = {name: Entry(name, folder, "own") for name, folder in own.items()} | BUNDLED
        for base, backbone in BASES.items():
            for pattern in ONE_SHOT:
                title = f"{backbone}, {pattern} without training"
                self.entries[f"{base}@{pattern}"] = Entry(title, base, "masked", base, pattern)

    def choices(self, *roles: str) -> list[tuple[str, str]]:
        """Titles and keys, as a list to choose from takes them: of these roles, or of all."""
        return [(entry.title, key) for key, entry in self.entries.items() if not roles or entry.role in roles]

    def rival(self, key: str) -> str:
        """What a model is first compared with: a teacher with its 2:4 student, others with themselves."""
        return student(key) if self.entries[key].role == "teacher" else key

    def load(self, key: str) -> Variant:
        """The model of a key of `entries`, packed where that is faster. Raises ValueError or OSError for a folder without one."""
        with self._lock:
            if key not in self._loaded:
                self._loaded[key] = self._load(key)
            return self._loaded[key]

    def _load(self, key: str) -> Variant:
        entry = self.entries[key]
        model = folders.load(entry.source)
        if entry.pattern:
            layers.fold(layers.sparsify(model, entry.pattern))
        model = nn.Module.to(model, self.device)
        parameters = list(model.parameters())
        nonzero = sum(int(p.count_nonzero()) for p in parameters)
        if layers.patterns(model):
            packed.pack(model, batch=PACK_BATCH)
        size = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
        counts = macs.count(model)
        return Variant(entry.title, model, counts, sum(p.numel() for p in parameters), nonzero, size, kernels(model))


def student(base: str) -> str:
    """The bundled 2:4 student of a bundled teacher."""
    return next(name for name, entry in BUNDLED.items() if entry.base == base and entry.role == "2x4")


def kernels(model: nn.Module) -> str:
    """What runs each class of layers: "Linear 25 packed, 4 dense"."""
    found: dict[str, list[int]] = {}
    for module in model.modules():
        if packed.is_packed(module) or isinstance(module, layers.WEIGHTED):
            counts = found.setdefault(type(module).__name__.removeprefix("Packed"), [0, 0])
            counts[0 if packed.is_packed(module) else 1] += 1
    parts = []
    for name, counts in found.items():
        words = [f"{count} {word}" for count, word in zip(counts, ("packed", "dense"), strict=True) if count]
        parts.append(f"{name} {', '.join(words)}")
    return "; ".join(parts)


def copy_of(variant: Variant) -> nn.Module:
    """Its model with ordinary layers, to change."""
    return packed.unpack(copy.deepcopy(variant.model))


def device_of(asked: str) -> str:
    """A device's name, checked; "auto" is the GPU if there is one. Raises ValueError."""
    if asked == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=asked)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"the device {asked!r} cannot be used: {str(error).splitlines()[0]}") from error
    return asked
