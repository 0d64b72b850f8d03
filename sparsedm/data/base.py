"""Pixel values, splits and batches, for all data sets."""

import torch
from torch.utils.data import Dataset, default_collate

from ..support import seeds

SPLITS = {"train": 0, "test": 1}


def check_split(split: str) -> None:
    """Raise ValueError unless `split` is one of `SPLITS`."""
    if split not in SPLITS:
        raise ValueError(f"split is 'train' or 'test', not {split!r}")


def to_float(images: torch.Tensor) -> torch.Tensor:
    """uint8 in 0..255 to float in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Float in [-1, 1] (clamped) to uint8 in 0..255: the pictures that are shown, saved and scored."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def stack(dataset: Dataset, n: int | None = None) -> tuple[torch.Tensor, torch.Tensor | dict[str, torch.Tensor]]:
    """The first n items as tensors: images [n, C, H, W] in [-1, 1], and labels [n] or a dict of conditions [n, ...]."""
    n = len(dataset) if n is None else n
    if n > len(dataset):
        raise ValueError(f"asked for {n} items, the data set has {len(dataset)}")
    images, labels = default_collate([dataset[i] for i in range(n)])
    return images, labels


class StepSampler:
    """Batches of indices as a function of (seed, step) alone: epoch e is the permutation drawn from (seed, e).

    Started at step s it gives the batches that an uninterrupted run would see from s on, which makes resumed runs exact.
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
                generator = torch.Generator().manual_seed(seeds.numbered(self.seed, epoch))
                order, drawn = torch.randperm(self.n, generator=generator).tolist(), epoch
            yield order[position * self.batch_size : (position + 1) * self.batch_size]
