"""How a model is scored, as data."""

from dataclasses import asdict, dataclass
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
        cache_interval: a UNet computes its deep blocks at the first of so many steps (DeepCache); 1 is at all steps.
    """

    n: Count = 10_000
    sampler: Literal[tuple(SAMPLERS)] = "ddim"
    steps: Count = 50
    guidance: NonNegative = 0.0
    seed: Seed = 1234
    batch_size: Count = 250
    precision: Literal["bf16", "fp32"] = "bf16"
    cache_interval: Count = 1

    def __post_init__(self):
        fields.check(self)

    def facts(self) -> dict:
        """The fields, as results files hold them: those of earlier versions have no `cache_interval`."""
        return {name: value for name, value in asdict(self).items() if (name, value) != ("cache_interval", 1)}
