"""What is made sparse: U-ViT, the families of diffusers, the papers' configurations."""

from . import denoisers  # tells the masking rules which layers of each family stay dense
from .classifier import FaceClassifier, GlyphClassifier
from .uvit import UViTModel

__all__ = ["FaceClassifier", "GlyphClassifier", "UViTModel", "denoisers"]
