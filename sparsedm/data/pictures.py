"""A folder of pictures as a data set."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
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
            if not path.is_file():  # a pipe or a device would be waited for
                raise ValueError("it is no file")
            with Image.open(path) as file:
                image = rgb(file)
        except Exception as error:  # of any kind: Pillow's readers let struct.error, IndexError and EOFError through
            raise ValueError(f"cannot read the picture {path}: {str(error) or repr(error)}; remove or replace it") from error
        return to_float(fit(image, self.size)), self._labels[index]


def rgb(image: Image.Image) -> Image.Image:
    """The image in RGB with 8 bits a channel; grey of 16 bits is scaled, where Pillow would clip it to white.

    Raises:
        ValueError: grey of 32 bits, whose range is not known.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):  # older versions of Pillow call it "I"
        image = Image.fromarray((np.asarray(image).astype(np.float32) / 257).round().astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError("its grey has 32 bits, of unknown range; save it with 8 or 16")
    return image.convert("RGB")


def fit(image: Image.Image, size: int) -> torch.Tensor:
    """Resize the shorter side to `size` and crop the centre: uint8 [3, size, size]. Only the kept pixels are computed."""
    scale = size / min(image.size)
    whole = [max(size, round(side * scale)) for side in image.size]  # of the resized picture
    starts = [(length - size) // 2 for length in whole]
    ends = [start + size for start in starts]
    box = [at * side / length for at, side, length in zip((*starts, *ends), image.size * 2, whole * 2, strict=True)]
    image = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)  # [size, size, 3] to [3, size, size]
