"""What is made sparse: U-ViT, the families of diffusers, the papers' configurations.

`sparsify` is exported here, where the families have told it which of their layers stay dense.
"""

from ..masking.layers import sparsify
from . import denoisers
from .classifier import GlyphClassifier
from .uvit import UViTModel

__all__ = ["GlyphClassifier", "UViTModel", "denoisers", "sparsify"]
