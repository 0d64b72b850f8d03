"""The bundled classifiers that judge pictures of the drawn data sets: one reads characters, one the attributes of faces."""

import functools
from dataclasses import dataclass

import torch
import torch_fidelity
from torch_fidelity.feature_extractor_base import FeatureExtractorBase

from ..checkpoints import folders
from ..data import kind
from ..models.classifier import FEATURES, FaceClassifier, GlyphClassifier


@dataclass(frozen=True)
class Judge:
    """A classifier and the names of its scores.

    Attributes:
        name: of what it reads; its Fréchet distance is called FD-`name`, never FID.
        data: the kind of data set that it reads (`data.kind`).
        accuracy: name of the score that says how often it reads what was asked.
        asset: its bundled checkpoint.
    """

    name: str
    data: str
    accuracy: str
    asset: str

    @property
    def extractor(self) -> str:
        """Name of its features for torch-fidelity."""
        return f"sparsedm-{self.data}"

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Features [B, 64] of pictures [B, C, H, W] in [-1, 1]."""
        classifier = classifier_of(self.asset)
        return classifier.features(_channels(images, classifier.channels))

    def read(self, images: torch.Tensor) -> torch.Tensor:
        """What pictures [n, C, H, W] (float in [-1, 1], or uint8) show: classes [n], or values of attributes [n, 10]."""
        if images.dtype == torch.uint8:
            images = images.float() / 127.5 - 1
        classifier = classifier_of(self.asset)
        with torch.no_grad():
            chunks = _channels(images.clamp(-1, 1), classifier.channels).split(1024)
            return torch.cat([classifier.read(chunk.cpu()) for chunk in chunks])

    def share_read(self, images: torch.Tensor, asked: torch.Tensor) -> float:
        """The share of what was asked, [n] or [n, 10], that the classifier reads in the pictures; -1 asks for nothing."""
        right = self.read(images) == asked.cpu()
        return right[asked.cpu() >= 0].float().mean().item()


JUDGES = (
    Judge("glyph", "glyphs", "readability", "glyph-classifier"),
    Judge("face", "faces", "attribute_accuracy", "face-classifier"),
)
GLYPHS, FACES = JUDGES


def of(dataset: str) -> Judge | None:
    """The judge of a data set's pictures by its name; None for data sets that are scored with Inception."""
    return next((judge for judge in JUDGES if kind(dataset) == judge.data), None)


@functools.cache
def classifier_of(asset: str) -> GlyphClassifier | FaceClassifier:
    """A bundled classifier, loaded once."""
    return folders.load(asset)


def _channels(images: torch.Tensor, channels: int) -> torch.Tensor:
    """Pictures [B, C, H, W] with as many channels as a classifier takes: their mean, or copies."""
    if channels == 1:
        return images.mean(1, keepdim=True)
    return images.expand(-1, channels, -1, -1)


class _Features(FeatureExtractorBase):
    """A judge as a torch-fidelity extractor: uint8 RGB [B, 3, H, W] to features [B, 64]."""

    judge: Judge

    def __init__(self, name, features_list, **kwargs):
        super().__init__(name, features_list)

    @staticmethod
    def get_provided_features_list():
        return (str(FEATURES),)

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return str(FEATURES)

    @staticmethod
    def can_be_compiled():
        return False

    @staticmethod
    def get_dummy_input_for_compile():
        return torch.zeros(1, 3, 16, 16, dtype=torch.uint8)

    def forward(self, images):
        return (self.judge.features(images.float() / 127.5 - 1),)


for _judge in JUDGES:
    torch_fidelity.register_feature_extractor(_judge.extractor, type(f"_{_judge.name}", (_Features,), {"judge": _judge}))
