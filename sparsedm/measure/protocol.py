"""How a model is scored, as data."""

from dataclasses import dataclass
from typing import Literal

from ..diffusion import SAMPLERS
from ..support import fields
from ..support.fields import Count, NonNegative, Seed


@dataclass(frozen=True)
class Protocol:
    """How a model is scored: `n` pictures, classes in turn, against `n` of the test split.

    Attributes:
        n: pictures.
        sampler: one of `diffusion.SAMPLERS`.
        steps: sampling steps.
        guidance: scale of classifier-free guidance; 0 is none.
        seed: of the pictures' noise.
        batch_size: pictures drawn at a time.
        precision: "bf16" runs the model under autocast, several times faster on CPUs with the instructions; "fp32" does not.
    """

    n: Count = 10_000
    sampler: Literal[tuple(SAMPLERS)] = "ddim"
    steps: Count = 50
    guidance: NonNegative = 0.0
    seed: Seed = 1234
    batch_size: Count = 250
    precision: Literal["bf16", "fp32"] = "bf16"

    def __post_init__(self):
        fields.check(self)
