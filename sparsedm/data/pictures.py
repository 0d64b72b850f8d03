"""A folder of pictures as a data set."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset

from .base import to_float

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff"}


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
        return to_float(fit(image, self.size)), self._labels[index]


def fit(image: Image.Image, size: int) -> torch.Tensor:
    """Resize the shorter side to `size` and crop the centre: uint8 [3, size, size]."""
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return torch.from_numpy(np.array(image.crop((left, top, left + size, top + size)))).permute(2, 0, 1)
