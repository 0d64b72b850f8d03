"""Real handwritten digits, small enough to train on in a minute."""

import string

import numpy as np
import torch
from torch.utils.data import Dataset

from .base import check_split


class Digits(Dataset):
    """The 1,797 real handwritten digits inside scikit-learn, 8x8, one channel; every fifth one is in the test split."""

    classes = tuple(string.digits)
    channels, size = 1, 8

    def __init__(self, split: str = "train"):
        from sklearn.datasets import load_digits

        check_split(split)
        bunch = load_digits()
        chosen = (np.arange(len(bunch.target)) % 5 == 4) == (split == "test")
        self._images = torch.from_numpy(bunch.images[chosen]).float()[:, None] / 8 - 1
        self._labels = bunch.target[chosen]

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self._images[index], int(self._labels[index])
