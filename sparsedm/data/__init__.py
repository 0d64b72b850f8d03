"""Data sets, all under one short name each: `load("glyphs")`, `load("digits")`, `load("folder:PATH")`, `load("cifar10")` ...

Every set yields `(image, label)`: a float tensor [C, H, W] in [-1, 1] and an int, or a dict of the arguments that condition
a model. Item i depends on nothing but the set's
arguments and i, so runs repeat with any number of workers. Random flips, the papers' only augmentation, belong to the
training step (`sparsedm.train(flip=True)`).
"""

from pathlib import Path

from torch.utils.data import Dataset

from . import torchvision_sets
from .base import StepSampler, stack, to_float, to_uint8
from .digits import Digits
from .faces import Faces
from .glyphs import GLYPHS, Glyphs, word_labels
from .latents import Latents
from .pictures import IMAGE_SUFFIXES, ImageFolder

__all__ = [
    "GLYPHS", "IMAGE_SUFFIXES", "NAMES", "Digits", "Faces", "Glyphs", "ImageFolder", "Latents", "StepSampler", "kind", "load",
    "stack",
    "to_float", "to_uint8", "word_labels",
]  # fmt: skip

NAMES = ("glyphs", "glyphs-rgb", "faces", "digits", *torchvision_sets.NAMES, "folder:PATH", "latents:PATH")


def kind(name: str) -> str:
    """What the data set called `name` holds: "glyphs" (in grey or in colour), "folder", "latents", or the name itself."""
    return "glyphs" if name in ("glyphs", "glyphs-rgb") else name.partition(":")[0]


def load(
    name: str | Dataset,
    *,
    split: str = "train",
    size: int | None = None,
    n: int | None = None,
    seed: int = 0,
    root: str | Path = "data",
    download: bool = False,
) -> Dataset:
    """The data set called `name` (one of `NAMES`); a Dataset is returned as it is.

    Args:
        split: "train" or "test" (ignored by folder:PATH and latents:PATH, which are one set).
        size: height and width in pixels; each set has its own default.
        n: number of glyphs or faces; other sets ignore this argument.
        seed: of the glyphs or faces; other sets ignore this argument.
        root: the folder of torchvision's sets.
        download: whether torchvision's sets may be fetched; nothing is downloaded otherwise.

    Raises:
        ValueError: the name is unknown (the message lists the known ones).
        FileNotFoundError: the files are not there.
    """
    if not isinstance(name, str):
        return name
    if kind(name) == "glyphs":
        return Glyphs(40_000 if n is None else n, size or 16, seed, split, rgb=name == "glyphs-rgb")
    if name == "faces":
        return Faces(40_000 if n is None else n, size or 32, seed, split)
    if name == "digits":
        return Digits(split)
    if kind(name) == "folder":
        return ImageFolder(name.removeprefix("folder:"), size or 32)
    if kind(name) == "latents":
        return Latents(name.removeprefix("latents:"))
    if name in torchvision_sets.NAMES:
        return torchvision_sets.load(name, Path(root), split, size, download)
    raise ValueError(f"unknown data set {name!r}; known: {', '.join(NAMES)}")
