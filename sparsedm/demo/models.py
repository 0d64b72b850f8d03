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
from ..experiments.recipes import RECIPES, Recipe
from ..masking import layers
from ..masking.plain import WEIGHTED
from ..measure import drawing, macs, sizes
from ..models import denoisers, students
from ..packing import packed
from ..support import processes

ONE_SHOT = ("2:4", "1:4", "3:4", "4:8", "7:8", "15:16")
PACK_BATCH = 6  # pictures that packing times layers with: a word of six letters
LETTERS, FACES = "glyphs", "faces"  # data sets
ROLES = {  # of bundled models, as people read them
    "teacher": "dense", "2x4": "2:4 SparseDM", "2x4-from-calibrated": "2:4 calibrated, then trained",
    "2x4-calibrated": "2:4 calibrated, no training", "diffpruned": "Diff-Pruning",
}  # fmt: skip
STUDENTS = ("2x4", "2x4-from-calibrated", "2x4-calibrated")  # roles of 2:4 students, those to show first before the others


@dataclass(frozen=True)
class Entry:
    """A model on offer.

    Attributes:
        title: the name that people read.
        source: a bundled name or a folder, as `sparsedm.load` takes it.
        role: one of `ROLES`, "masked" for a teacher masked without training, or "own" for a folder.
        base: the bundled teacher itself, or the student's bundled teacher; "" for a folder.
        pattern: N:M to mask the model with; "" for a model that stays as stored.
        data: the data set that it draws, "glyphs" or "faces"; "" for a folder.
    """

    title: str
    source: str | Path
    role: str
    base: str = ""
    pattern: str = ""
    data: str = ""


def _called(recipe: Recipe) -> str:
    return f"Face {recipe.backbone}" if recipe.data == FACES else recipe.backbone


BUNDLED = {
    name: Entry(f"{_called(recipe)}, {ROLES[recipe.role]}", name, recipe.role, recipe.base or name, data=recipe.data)
    for name, recipe in RECIPES.items()
    if recipe.bundle and name in folders.bundled()
}
BASES = {name: _called(RECIPES[name]) for name, entry in BUNDLED.items() if entry.role == "teacher"}
LETTER_BASES = {name: title for name, title in BASES.items() if RECIPES[name].data == LETTERS}


@dataclass(frozen=True)
class Variant:
    """A model and the numbers that do not change from run to run.

    Attributes:
        title: the name that people read.
        model: the model, packed where that is faster.
        macs: MACs of a call.
        parameters: all parameters.
        nonzero: parameters that are not zero.
        bytes: of the weights in memory.
        kernels: how many layers of each class run packed and dense, in words.
    """

    title: str
    model: nn.Module
    macs: macs.Macs
    parameters: int
    nonzero: int
    bytes: int
    kernels: str

    @property
    def shape(self) -> tuple[int, ...]:
        """(channels, height, width) of a picture."""
        return tuple(denoisers.of(self.model).shape(self.model))

    @property
    def classes(self) -> int:
        """The number of classes; 0 for a model without classes."""
        return denoisers.null_label(self.model) or 0

    @property
    def spells(self) -> bool:
        """Whether the classes are the letters and digits."""
        return self.classes == len(data.GLYPHS) and self.shape == (1, 16, 16)

    @property
    def draws_faces(self) -> bool:
        """Whether the model draws faces from words."""
        return drawing.draws_faces(self.model)


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
                self.entries[f"{base}@{pattern}"] = Entry(title, base, "masked", base, pattern, RECIPES[base].data)

    def choices(self, *roles: str, data: str = "") -> list[tuple[str, str]]:
        """Titles and keys of the models of these roles (or all) that draw `data` (or anything), for a list to choose from.

        Folders may draw anything.
        """
        return [
            (entry.title, key)
            for key, entry in self.entries.items()
            if (not roles or entry.role in roles) and (not data or entry.data in ("", data))
        ]

    def rival(self, key: str) -> str:
        """The model to compare with first: a teacher's 2:4 student, or the model itself."""
        return student(key) or key if self.entries[key].role == "teacher" else key

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
            layers.fold(students.sparsify(model, entry.pattern))
        model = nn.Module.to(model, self.device)
        parameters, nonzero = sizes.parameters(model), sizes.nonzero(model)
        if layers.patterns(model):
            packed.pack(model, batch=PACK_BATCH)
        return Variant(entry.title, model, macs.count(model), parameters, nonzero, sizes.memory(model), kernels(model))


def student(base: str) -> str:
    """The bundled 2:4 student of a bundled teacher, by the order of `STUDENTS`; "" if there is none."""
    students = {entry.role: name for name, entry in BUNDLED.items() if entry.base == base}
    return next((students[role] for role in STUDENTS if role in students), "")


def pairs() -> dict[str, tuple[str, str]]:
    """The first bundled teacher with a 2:4 student for every data set, faces first, and this student."""
    found = {entry.data: (name, student(name)) for name, entry in reversed(BUNDLED.items()) if name in BASES and student(name)}
    return {data: found[data] for data in (FACES, LETTERS) if data in found}


def kernels(model: nn.Module) -> str:
    """How many layers of each class run packed and dense: "Linear 25 packed, 4 dense"."""
    layer_counts: dict[str, list[int]] = {}
    for module in model.modules():
        if packed.is_packed(module) or isinstance(module, WEIGHTED):
            counts = layer_counts.setdefault(type(module).__name__.removeprefix("Packed"), [0, 0])
            counts[0 if packed.is_packed(module) else 1] += 1
    parts = []
    for name, counts in layer_counts.items():
        words = [f"{count} {word}" for count, word in zip(counts, ("packed", "dense"), strict=True) if count]
        parts.append(f"{name} {', '.join(words)}")
    return "; ".join(parts)


def copy_of(variant: Variant) -> nn.Module:
    """A copy of the model with ordinary layers, to change."""
    return packed.unpack(copy.deepcopy(variant.model))


def device_of(asked: str) -> str:
    """A checked device name; "auto" is the GPU if there is one. Raises ValueError for a device that cannot be used."""
    if asked == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return str(processes.device(asked))
