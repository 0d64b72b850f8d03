"""The small glyph classifier, which reads generated characters; its features replace Inception's where there is no network."""

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn

FEATURES = 64


class GlyphClassifier(ModelMixin, ConfigMixin):
    """Grey pictures [B, 1, 16, 16] in [-1, 1] to class logits [B, classes]; `features` gives the 64 numbers before the logits."""

    @register_to_config
    def __init__(self, width: int = 32, classes: int = 36):
        super().__init__()

        def conv(inputs: int, outputs: int, stride: int) -> nn.Sequential:
            layer = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
            return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.ReLU())

        self.body = nn.Sequential(
            conv(1, width, 1), conv(width, width, 2), conv(width, 2 * width, 1), conv(2 * width, 2 * width, 2), nn.Flatten()
        )
        self.neck = nn.Linear(2 * width * 16, FEATURES)
        self.head = nn.Linear(FEATURES, classes)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """[B, 1, H, W] in [-1, 1], resized to 16x16 if need be, to [B, 64]."""
        if images.shape[-2:] != (16, 16):
            images = F.interpolate(images, (16, 16), mode="area")
        return self.neck(self.body(images))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(F.relu(self.features(images)))
