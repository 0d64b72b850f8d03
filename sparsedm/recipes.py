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
        sparsify: options of `sparsedm.sparsify` for it.
        prune: `diffpruning.prune`'s options, with the `threshold` of its importance; {} for whole models. With `reinit` the
            weights are drawn anew: the same shape from scratch.
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
    sparsify: dict = field(default_factory=dict)
    prune: dict = field(default_factory=dict)


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
        recipes |= _of_backbone(f"glyphs-{kind}", teacher, _TUNE[kind], _HALF[kind])
    return recipes


_HALF = {"uvit": 0.5, "unet": 0.35}  # share of the channels whose removal leaves about half the MACs


def _of_backbone(base: str, teacher: Recipe, train: dict, ratio: float) -> dict[str, Recipe]:
    """The teacher, and all that is compared with it after the same training."""
    name = teacher.title.removesuffix(" teacher")
    pruned = {"ratio": ratio, "round_to": 4}

    def student(title: str, bundle: bool = False, **options) -> Recipe:
        return Recipe(f"{name} {title}", base, train=train, bundle=bundle, **options)

    return {
        base: teacher,
        f"{base}-more": student("dense, same extra training"),
        f"{base}-2x4-oneshot": Recipe(f"{name} 2:4, one-shot", base, pattern="2:4", bundle=False),
        f"{base}-2x4": student("2:4, SparseDM", True, pattern="2:4", distil=True),
        f"{base}-2x4-asp": student("2:4, ASP (first masks kept)", pattern="2:4", sparsify={"frozen": True}),
        f"{base}-2x4-ste": student("2:4, STE", pattern="2:4", sparsify={"decay": 0.0}),
        f"{base}-2x4-srste": student("2:4, SR-STE without teacher", pattern="2:4"),
        f"{base}-diffpruned": student("Diff-Pruning", True, prune={**pruned, "score": "squared", "threshold": 0.05}),
        f"{base}-taylor": student("Taylor pruning", prune={**pruned, "score": "squared", "threshold": 0.0}),
        f"{base}-magnitude": student("magnitude pruning", prune={**pruned, "score": "magnitude"}),
        f"{base}-random": student("random pruning", prune={**pruned, "score": "random"}),
        f"{base}-scratch": student("pruned shape from scratch", prune={**pruned, "score": "random", "reinit": True}),
    }


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
