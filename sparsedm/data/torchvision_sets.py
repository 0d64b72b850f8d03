"""torchvision's data sets, cropped and scaled as the papers do."""

from pathlib import Path

import torch
from torch.utils.data import Dataset
from torchvision import datasets

from .base import to_float
from .pictures import fit

NAMES = ("cifar10", "celeba", "lsun-church_outdoor", "lsun-bedroom")


class TorchVisionSet(Dataset):
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
        return to_float(fit(image, self.size)), label if isinstance(label, int) else 0


def load(name: str, root: Path, split: str, size: int | None, download: bool) -> Dataset:
    """One of `NAMES` from the files under `root`; arguments as `sparsedm.data.load`.

    Raises:
        FileNotFoundError: the files are not there, or cannot be read.
    """
    try:
        if name == "cifar10":
            return TorchVisionSet(datasets.CIFAR10(str(root), train=split == "train", download=download), size or 32)
        if name == "celeba":
            # Aligned CelebA, 128x128 box centred at (x 89, y 121): DDIM's and both papers' crop.
            inner = datasets.CelebA(str(root), split=split, download=download)
            return TorchVisionSet(inner, size or 64, (25, 57, 153, 185))
        category = name.removeprefix("lsun-")
        inner = datasets.LSUN(str(root), classes=[f"{category}_{'train' if split == 'train' else 'val'}"])
        return TorchVisionSet(inner, size or 256)
    except (RuntimeError, OSError, ImportError) as error:
        once = f"""fetch it once: python -c "from sparsedm import data; data.load({name!r}, download=True)\""""
        hint = once if name in ("cifar10", "celeba") else "LSUN must be fetched by hand"
        raise FileNotFoundError(f"data set {name!r} was not found under {root} ({error}); {hint}") from error
