"""Data sets, all under one short name each: `load("glyphs")`, `load("digits")`, `load("folder:PATH")`, `load("cifar10")` ...

Every set yields `(image, label)`: a float tensor [C, H, W] in [-1, 1] and an int. Item i depends on nothing but the set's
arguments and i, so runs repeat with any number of workers. Random flips, the papers' only augmentation, belong to the
training step (`distill.train(flip=True)`).
"""

import functools
import string
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError
from torch.utils.data import Dataset

GLYPHS = string.digits + string.ascii_uppercase
_FONTS = (
    "DejaVuSans-Bold",
    "DejaVuSans-BoldOblique",
    "DejaVuSansMono-Bold",
    "DejaVuSerif-Bold",
    "DejaVuSerif-BoldItalic",
    "STIXGeneralBol",
)
_SPLITS = {"train": 0, "test": 1}
_SUPERSAMPLE = 4
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff"}


def to_float(images: torch.Tensor) -> torch.Tensor:
    """uint8 in 0..255 to float in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Float in [-1, 1] (clamped) to uint8 in 0..255: what is shown, saved and scored."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


class Glyphs(Dataset):
    """Digits and capital letters (36 classes) in the bold fonts that matplotlib ships, drawn from a seed.

    Each picture has a random font, size, shift and rotation (up to 10 degrees): white ink on black, one channel; with
    `rgb=True` random ink and paper, three channels. Drawn on first use, then kept as uint8.

    Args:
        n: number of pictures; the class of picture i is i mod 36.
        size: height and width in pixels.
        split: "train" or "test": different pictures from the same distribution.
    """

    classes = tuple(GLYPHS)

    def __init__(self, n: int = 40_000, size: int = 16, seed: int = 0, split: str = "train", rgb: bool = False):
        if split not in _SPLITS:
            raise ValueError(f"split is 'train' or 'test', not {split!r}")
        if n < 1 or size < 8:
            raise ValueError(f"glyphs need n >= 1 and size >= 8, not n={n}, size={size}")
        self.size, self.seed, self.split, self.rgb = size, seed, split, rgb
        self.channels = 3 if rgb else 1
        self._images = torch.zeros(n, self.channels, size, size, dtype=torch.uint8)
        self._drawn = np.zeros(n, dtype=bool)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        label = index % len(GLYPHS)
        if not self._drawn[index]:
            rng = np.random.default_rng((self.seed, _SPLITS[self.split], index))
            self._images[index] = _draw_glyph(GLYPHS[label], self.size, self.rgb, rng)
            self._drawn[index] = True
        return to_float(self._images[index]), label


@functools.lru_cache(maxsize=512)
def _font(name: str, pixels: int) -> ImageFont.FreeTypeFont:
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", f"{name}.ttf")), pixels)


def _draw_glyph(char: str, size: int, rgb: bool, rng: np.random.Generator) -> torch.Tensor:
    """One picture [C, size, size], uint8. Drawn enlarged, centred on its ink, rotated, then reduced by averaging."""
    canvas = size * _SUPERSAMPLE
    name = _FONTS[rng.integers(len(_FONTS))]
    pixels = int(canvas * rng.uniform(0.86, 1.08))
    left, top, right, bottom = _font(name, pixels).getbbox(char)
    overflow = max(right - left, bottom - top) / (canvas * 0.88)
    if overflow > 1:  # a W as wide as the picture
        pixels = int(pixels / overflow)
        left, top, right, bottom = _font(name, pixels).getbbox(char)
    shift = rng.uniform(-1, 1, 2) * size / 16 * _SUPERSAMPLE
    image = Image.new("L", (canvas, canvas))
    corner = ((canvas - left - right) / 2 + shift[0], (canvas - top - bottom) / 2 + shift[1])
    ImageDraw.Draw(image).text(corner, char, fill=255, font=_font(name, pixels))
    image = image.rotate(rng.uniform(-10, 10), Image.Resampling.BILINEAR)
    ink = np.asarray(image.resize((size, size), Image.Resampling.BOX), dtype=np.float32)[None] / 255
    if not rgb:
        return torch.from_numpy((ink * 255).round().astype(np.uint8))
    paper, pen = _contrasting_colours(rng)
    return torch.from_numpy((ink * pen + (1 - ink) * paper).round().astype(np.uint8))


def _contrasting_colours(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Two RGB colours [3, 1, 1] whose luma differs by at least 90 of 255."""
    while True:
        colours = rng.uniform(0, 255, (2, 3))
        if abs(np.diff(colours @ (0.299, 0.587, 0.114))[0]) >= 90:
            return colours[0][:, None, None], colours[1][:, None, None]


class Digits(Dataset):
    """The 1,797 real handwritten digits inside scikit-learn, 8x8, one channel; every fifth one is in the test split."""

    classes = tuple(string.digits)
    channels, size = 1, 8

    def __init__(self, split: str = "train"):
        from sklearn.datasets import load_digits

        if split not in _SPLITS:
            raise ValueError(f"split is 'train' or 'test', not {split!r}")
        bunch = load_digits()
        chosen = (np.arange(len(bunch.target)) % 5 == 4) == (split == "test")
        self._images = torch.from_numpy(bunch.images[chosen]).float()[:, None] / 8 - 1
        self._labels = bunch.target[chosen]

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self._images[index], int(self._labels[index])


class ImageFolder(Dataset):
    """Pictures under a folder, shorter side resized to `size`, centre cropped, RGB; sub-folders, if any, are the classes.

    Raises:
        FileNotFoundError: the folder does not exist or holds no picture.
        ValueError: a picture cannot be read, naming the file (when it is reached).
    """

    channels = 3

    def __init__(self, root: str | Path, size: int = 32):
        self.root, self.size = Path(root), size
        if not self.root.is_dir():
            raise FileNotFoundError(f"data folder {self.root} does not exist; folder:PATH takes a folder of pictures")
        self._paths = sorted(p for p in self.root.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
        if not self._paths:
            kinds = ", ".join(sorted(IMAGE_SUFFIXES))
            raise FileNotFoundError(f"data folder {self.root} holds no picture ({kinds})")
        self.classes = tuple(sorted({self._class_of(p) for p in self._paths}))
        index = {name: i for i, name in enumerate(self.classes)}
        self._labels = [index[self._class_of(p)] for p in self._paths]

    def _class_of(self, path: Path) -> str:
        parts = path.relative_to(self.root).parts
        return parts[0] if len(parts) > 1 else ""

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        path = self._paths[index]
        try:
            with Image.open(path) as file:
                image = file.convert("RGB")
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
            raise ValueError(f"cannot read the picture {path}: {error}; remove or replace it") from error
        return to_float(_fit(image, self.size)), self._labels[index]


def _fit(image: Image.Image, size: int) -> torch.Tensor:
    """Resize the shorter side to `size` and crop the centre: uint8 [3, size, size]."""
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return torch.from_numpy(np.array(image.crop((left, top, left + size, top + size)))).permute(2, 0, 1)


class _TorchVision(Dataset):
    """A torchvision data set as (float tensor in [-1, 1], int); `crop` is the papers' box before resizing."""

    channels = 3

    def __init__(self, inner: Dataset, size: int, crop: tuple[int, int, int, int] | None = None):
        self.inner, self.size, self._crop = inner, size, crop
        self.classes = tuple(getattr(inner, "classes", ("",)))

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image, label = self.inner[index]
        image = image.convert("RGB")
        if self._crop:
            image = image.crop(self._crop)
        return to_float(_fit(image, self.size)), label if isinstance(label, int) else 0


def _torchvision_set(name: str, root: Path, split: str, size: int | None, download: bool) -> Dataset:
    from torchvision import datasets

    try:
        if name == "cifar10":
            return _TorchVision(datasets.CIFAR10(str(root), train=split == "train", download=download), size or 32)
        if name == "celeba":
            # Aligned CelebA, 128x128 box centred at (x 89, y 121): DDIM's and both papers' crop.
            inner = datasets.CelebA(str(root), split=split, download=download)
            return _TorchVision(inner, size or 64, (25, 57, 153, 185))
        category = name.removeprefix("lsun-")
        inner = datasets.LSUN(str(root), classes=[f"{category}_{'train' if split == 'train' else 'val'}"])
        return _TorchVision(inner, size or 256)
    except (RuntimeError, OSError, ImportError) as error:
        once = f"""fetch it once: python -c "from sparsedm import data; data.load({name!r}, download=True)\""""
        hint = once if name in ("cifar10", "celeba") else "LSUN must be fetched by hand"
        raise FileNotFoundError(f"data set {name!r} was not found under {root} ({error}); {hint}") from error


TORCHVISION_SETS = ("cifar10", "celeba", "lsun-church_outdoor", "lsun-bedroom")
NAMES = ("glyphs", "glyphs-rgb", "digits", *TORCHVISION_SETS, "folder:PATH", "latents:PATH")


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
        n, seed: number and seed of the glyphs; other sets ignore them.
        root, download: where torchvision's sets lie, and whether they may be fetched. Nothing is downloaded unless asked.

    Raises:
        ValueError: the name is unknown (the message lists the known ones).
        FileNotFoundError: the files are not there.
    """
    if not isinstance(name, str):
        return name
    if name in ("glyphs", "glyphs-rgb"):
        return Glyphs(40_000 if n is None else n, size or 16, seed, split, rgb=name == "glyphs-rgb")
    if name == "digits":
        return Digits(split)
    if name.startswith("folder:"):
        return ImageFolder(name.removeprefix("folder:"), size or 32)
    if name.startswith("latents:"):
        from .latents import Latents

        return Latents(name.removeprefix("latents:"))
    if name in TORCHVISION_SETS:
        return _torchvision_set(name, Path(root), split, size, download)
    raise ValueError(f"unknown data set {name!r}; known: {', '.join(NAMES)}")


def word_labels(word: str) -> torch.Tensor:
    """Class labels [len(word)] that spell `word` with glyphs; letters in either case.

    Raises:
        ValueError: empty, or characters outside the 36 classes (the message names them).
    """
    word = word.strip().upper()
    wrong = sorted(set(word) - set(GLYPHS))
    if wrong or not word:
        found = f"{' '.join(map(repr, wrong))} cannot be drawn" if wrong else "the word is empty"
        raise ValueError(f"{found}; use the letters A-Z and the digits 0-9")
    return torch.tensor([GLYPHS.index(c) for c in word])


def stack(dataset: Dataset, n: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The first n items as tensors: images [n, C, H, W] in [-1, 1] and labels [n]."""
    n = len(dataset) if n is None else n
    if n > len(dataset):
        raise ValueError(f"asked for {n} items, the data set has {len(dataset)}")
    items = [dataset[i] for i in range(n)]
    return torch.stack([image for image, _ in items]), torch.tensor([label for _, label in items])


class StepSampler:
    """Batches of indices as a function of (seed, step) alone: epoch e is the permutation drawn from (seed, e).

    Starting at step s gives what an uninterrupted run would see from s on, which makes resumed runs exact.
    """

    def __init__(self, n: int, batch_size: int, seed: int, start: int, stop: int):
        if batch_size > n:
            raise ValueError(f"batch size {batch_size} is larger than the data set ({n} pictures)")
        self.n, self.batch_size, self.seed, self.start, self.stop = n, batch_size, seed, start, stop

    def __len__(self) -> int:
        return max(0, self.stop - self.start)

    def __iter__(self):
        per_epoch = self.n // self.batch_size
        order, drawn = None, -1
        for step in range(self.start, self.stop):
            epoch, position = divmod(step, per_epoch)
            if epoch != drawn:
                generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
                order, drawn = torch.randperm(self.n, generator=generator).tolist(), epoch
            yield order[position * self.batch_size : (position + 1) * self.batch_size]
