"""Small classifiers of the drawn data sets: they read generated pictures, and their features replace Inception's."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn

FEATURES = 64


class _Classifier(ModelMixin, ConfigMixin):
    """A stack of convolutions, then the `FEATURES` numbers that Fréchet distances are computed on, then the logits."""

    channels: int
    size: int

    def _build(self, widths: Sequence[int], outputs: int) -> None:
        """A convolution for each width; every second one halves the picture."""
        layers, inputs = [], self.channels
        for i, width in enumerate(widths):
            layer = nn.Conv2d(inputs, width, 3, 1 + i % 2, padding=1, bias=False)
            layers.append(nn.Sequential(layer, nn.BatchNorm2d(width), nn.ReLU()))
            inputs = width
        side = self.size >> len(widths) // 2
        self.body = nn.Sequential(*layers, nn.Flatten())
        self.neck = nn.Linear(inputs * side * side, FEATURES)
        self.head = nn.Linear(FEATURES, outputs)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] in [-1, 1], resized to the classifier's size if need be, to [B, 64]."""
        if images.shape[-2:] != (self.size, self.size):
            images = F.interpolate(images, (self.size, self.size), mode="area")
        return self.neck(self.body(images))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(F.relu(self.features(images)))


class GlyphClassifier(_Classifier):
    """Grey pictures [B, 1, 16, 16] in [-1, 1] to class logits [B, classes]."""

    channels, size = 1, 16

    @register_to_config
    def __init__(self, width: int = 32, classes: int = 36):
        super().__init__()
        self._build((width, width, 2 * width, 2 * width), classes)

    def loss(self, images: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        """Cross entropy, mean over the pictures [B, 1, H, W] and their classes [B]."""
        return F.cross_entropy(self(images), classes)

    def read(self, images: torch.Tensor) -> torch.Tensor:
        """The most likely class [B]."""
        return self(images).argmax(1)


class FaceClassifier(_Classifier):
    """Colour pictures [B, 3, 32, 32] in [-1, 1] to the logits of all attributes' values, one after the other.

    Args:
        width: channels of the first convolutions.
        options: how many values each attribute has.
    """

    channels, size = 3, 32

    @register_to_config
    def __init__(self, width: int = 32, options: Sequence[int] = (2,)):
        super().__init__()
        self._build((width, width, 2 * width, 2 * width, 4 * width, 4 * width), sum(options))

    def loss(self, images: torch.Tensor, attributes: torch.Tensor) -> torch.Tensor:
        """Cross entropy, summed over the attributes [B, attributes], mean over the pictures; -1 is an attribute not shown."""
        pairs = zip(self(images).split(list(self.config.options), 1), attributes.unbind(1))
        return sum(F.cross_entropy(logits, values, ignore_index=-1) for logits, values in pairs)

    def read(self, images: torch.Tensor) -> torch.Tensor:
        """The most likely value of each attribute, [B, attributes]."""
        return torch.stack([logits.argmax(1) for logits in self(images).split(list(self.config.options), 1)], 1)
