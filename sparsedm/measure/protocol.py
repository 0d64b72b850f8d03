"""How a model is scored, as data."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Protocol:
    """How a model is scored: `n` pictures, classes in turn, against `n` of the test split.

    `precision` "bf16" runs the model under autocast, several times faster on CPUs that have the instructions; "fp32" does not.
    """

    n: int = 10_000
    sampler: str = "ddim"
    steps: int = 50
    guidance: float = 0.0
    seed: int = 1234
    batch_size: int = 250
    precision: str = "bf16"

    def __post_init__(self):
        if self.precision not in ("bf16", "fp32"):
            raise ValueError(f"precision is 'bf16' or 'fp32', not {self.precision!r}")
