"""The experiments as data: one named recipe is a model, its data and its training; one protocol scores them all.

`python -m sparsedm reproduce NAME` carries one out (experiment.py).
"""

from dataclasses import dataclass, field

from .models.uvit import UViTModel


@dataclass(frozen=True)
class Recipe:
    """One experiment.

    Attributes:
        base: the recipe whose model it starts from ("" for random weights): the teacher of a student.
        model: class and config of a model trained from scratch.
        pattern: N:M of a student; "" for dense.
        distil: transfer knowledge from the base while training.
        train: `TrainConfig` fields; empty for no training.
        bundle: whether its checkpoint ships with the package.
    """

    title: str
    base: str = ""
    model: tuple[type, dict] | None = None
    pattern: str = ""
    distil: bool = False
    train: dict = field(default_factory=dict)
    data: str = "glyphs"
    bundle: bool = True


NOISE_SCHEDULE = {
    "num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear",
    "prediction_type": "v_prediction", "clip_sample": True,
}  # fmt: skip

_UVIT = {
    "sample_size": 16, "in_channels": 1, "patch_size": 2, "embed_dim": 128, "depth": 6, "num_heads": 4, "num_classes": 37,
}  # fmt: skip
_UNET = {
    "sample_size": 16, "in_channels": 1, "out_channels": 1, "block_out_channels": (32, 64, 96), "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 8, "attention_head_dim": 32, "num_class_embeds": 37,
}  # fmt: skip

_TEACH = {"lr": 2e-3, "betas": (0.9, 0.99), "lr_schedule": "cosine", "ema_decay": 0.999, "checkpoint_every": 500}
_TUNE = {
    "uvit": {
        **_TEACH,
        "optimizer": "muon",
        "lr": 1e-3,
        "warmup": 100,
        "steps": 5000,
        "batch_size": 32,
        "mixed_precision": "bf16",
    },
    "unet": {**_TEACH, "lr": 1e-3, "warmup": 100, "steps": 5000, "batch_size": 64},
}


def _recipes() -> dict[str, Recipe]:
    from diffusers import UNet2DModel

    teachers = {
        "uvit": Recipe(
            "U-ViT teacher", model=(UViTModel, _UVIT),
            train={"steps": 11_000, "batch_size": 32, "warmup": 200, "optimizer": "muon", **_TEACH},
        ),
        "unet": Recipe(
            "UNet teacher", model=(UNet2DModel, _UNET), train={"steps": 10_000, "batch_size": 64, "warmup": 500, **_TEACH}
        ),
    }  # fmt: skip
    recipes = {}
    for kind, teacher in teachers.items():
        base, name = f"glyphs-{kind}", teacher.title.removesuffix(" teacher")
        recipes[base] = teacher
        recipes[f"{base}-more"] = Recipe(f"{name} dense, same extra training", base, train=_TUNE[kind], bundle=False)
        recipes[f"{base}-2x4-oneshot"] = Recipe(f"{name} 2:4, one-shot", base, None, "2:4", bundle=False)
        recipes[f"{base}-2x4"] = Recipe(f"{name} 2:4, SparseDM", base, None, "2:4", True, _TUNE[kind])
    return recipes


RECIPES = _recipes()
CLASSIFIER = "glyph-classifier"
NAMES = (CLASSIFIER, *RECIPES)


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


def recipe(name: str) -> Recipe:
    """The recipe called `name`. Raises ValueError with the known names."""
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}; known: {', '.join(NAMES)}")
    return RECIPES[name]
