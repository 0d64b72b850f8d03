"""Scores of generated pictures.

Distances between sets come from torch-fidelity: FID, KID, precision and recall on Inception features where its weights are
at hand, or the same formulas on the features of a bundled classifier (judges.py), then called FD-glyph or FD-face, never FID.
SSIM compares two models' pictures from the same noise; readability and attribute accuracy are how much of what was asked the
classifier reads.
"""

import io

import torch
import torch.nn.functional as F
import torch_fidelity
from torch.utils.data import Dataset
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from .. import data
from ..checkpoints import statedict
from . import judges
from .judges import Judge

INCEPTION = "sparsedm-inception"
KID_SUBSET = 1000
MIN_SAMPLES = {"fd": 2048, "kd": KID_SUBSET, "readability": 36, "attribute_accuracy": 36}


class TooFewSamples(ValueError):
    """A score was asked for with fewer samples than it needs; the message says how many."""


def require(score: str, n: int, needed: int) -> None:
    """Raise TooFewSamples if `score` needs more samples than `n`."""
    if n < needed:
        raise TooFewSamples(f"{score} needs at least {needed} samples, there are {n}")


class _Inception(FeatureExtractorInceptionV3):
    """torch-fidelity's Inception, its weights read as tensors alone: torch-fidelity itself would run code pickled with them."""

    def __init__(self, name, features_list, feature_extractor_weights_path, **kwargs):
        state, weights = statedict.read(feature_extractor_weights_path), io.BytesIO()
        torch.save(state, weights)
        weights.seek(0)
        try:
            super().__init__(name, features_list, weights, **kwargs)
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise ValueError(f"{feature_extractor_weights_path} does not hold torch-fidelity's Inception: {reason}") from error


torch_fidelity.register_feature_extractor(INCEPTION, _Inception)


def check_inception(weights: str) -> None:
    """Raise OSError or ValueError, with the file's name, if `weights` are not torch-fidelity's Inception weights."""
    _Inception(INCEPTION, ["2048"], weights)


class _Rgb(Dataset):
    """Pictures as torch-fidelity wants them, one by one: uint8 [3, H, W]."""

    def __init__(self, images: torch.Tensor | Dataset):
        if isinstance(images, torch.Tensor) and (images.dtype != torch.uint8 or images.dim() != 4):
            raise ValueError(f"pictures are uint8 [n, C, H, W], not {images.dtype} {list(images.shape)}")
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor:
        item = self.images[index]
        picture = item if isinstance(item, torch.Tensor) else data.to_uint8(item[0])
        return picture.expand(3, -1, -1)


def frechet(
    images: torch.Tensor, reference: torch.Tensor | Dataset, weights: str | None = None, judge: Judge = judges.GLYPHS
) -> dict[str, float]:
    """Distances between two sets of pictures, uint8 [n, C, H, W].

    Args:
        reference: pictures, or a data set of `data.load`, which is read picture by picture.
        weights: path of torch-fidelity's Inception weights; without them the judge's classifier gives the features.
        judge: of the pictures' kind.

    Returns:
        "fid" and "kid" with Inception, "fd_glyph" and "kd_glyph" (or "_face") with the classifier; "precision" and "recall"
        (of the feature manifold, both ways), and "n".

    Raises:
        TooFewSamples: fewer than 2,048 pictures on either side.
        OSError: the file of `weights` cannot be read.
        ValueError: `weights` are no tensors, or not Inception's.
    """
    n = min(len(images), len(reference))
    require("a Fréchet distance", n, MIN_SAMPLES["fd"])
    chosen = {"feature_extractor": INCEPTION, "feature_extractor_weights_path": weights}
    scores = torch_fidelity.calculate_metrics(
        input1=_Rgb(images), input2=_Rgb(reference), cuda=torch.cuda.is_available(), verbose=False, cache=False,
        save_cpu_ram=True,  # no worker processes
        fid=True, kid=True, prc=True, kid_subset_size=KID_SUBSET, batch_size=256,
        **(chosen if weights else {"feature_extractor": judge.extractor}),
    )  # fmt: skip
    fd, kd = ("fid", "kid") if weights else (f"fd_{judge.name}", f"kd_{judge.name}")
    return {
        fd: scores["frechet_inception_distance"],
        kd: scores["kernel_inception_distance_mean"],
        "precision": scores["precision"],
        "recall": scores["recall"],
        "n": n,
    }


def readability(images: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of pictures [n, C, H, W] in which the classifier reads the asked class [n]. At least 36 pictures."""
    require("readability", len(images), MIN_SAMPLES["readability"])
    return judges.GLYPHS.share_read(images, labels)


def attribute_accuracy(images: torch.Tensor, asked: torch.Tensor) -> float:
    """Share of the asked attributes [n, 10] (`data.faces.row`) that the classifier reads in pictures [n, 3, H, W]."""
    require("attribute accuracy", len(images), MIN_SAMPLES["attribute_accuracy"])
    return judges.FACES.share_read(images, asked)


def ssim(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Structural similarity [n] of pictures [n, C, H, W] in [-1, 1] (or both uint8), mean over channels and pixels.

    Wang et al. 2004 with their Gaussian window, 11 pixels and sigma 1.5, only where it fits into the picture; the window
    shrinks to the picture if that is smaller. Diff-Pruning 4.1 (arXiv 2305.10924) uses it for consistency with the original.
    """
    if a.shape != b.shape or a.dim() != 4:
        raise ValueError(f"SSIM compares equal shapes [n, C, H, W], not {list(a.shape)} and {list(b.shape)}")
    a, b = ((x.float() / 255 if x.dtype == torch.uint8 else (x.float().clamp(-1, 1) + 1) / 2) for x in (a, b))
    n, channels, height, width = a.shape
    size = min(11, height, width)
    size -= 1 - size % 2  # odd
    offsets = torch.arange(size, dtype=a.dtype, device=a.device) - size // 2
    window = torch.exp(-(offsets**2) / (2 * 1.5**2))
    window = window / window.sum()

    def blur(x: torch.Tensor) -> torch.Tensor:
        x = x.reshape(n * channels, 1, height, width)
        return F.conv2d(F.conv2d(x, window.view(1, 1, 1, -1)), window.view(1, 1, -1, 1))

    mean_a, mean_b = blur(a), blur(b)
    variance_a, variance_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    covariance = blur(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    similarity = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    similarity = similarity / ((mean_a**2 + mean_b**2 + c1) * (variance_a + variance_b + c2))
    return similarity.reshape(n, -1).mean(1)
