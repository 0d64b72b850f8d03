"""The experiments on the bundled letter models: the headline models, trained long, short runs of every method, and one-shot ones.

A short run gives every method a tenth of the teacher's training, what Diff-Pruning claims to need. A one-shot run has none. The
rivals save time without another model: they sample with fewer steps, or with DeepCache.
"""

from dataclasses import replace

from diffusers import UNet2DModel

from ...measure.protocol import Protocol
from ...models.uvit import UViTModel
from .base import Recipe

_SHORT_PROTOCOL = Protocol(n=5_000, steps=20)
SCHEDULE = {
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

TEACH = {"lr": 2e-3, "betas": (0.9, 0.99), "lr_schedule": "cosine", "ema_decay": 0.999, "checkpoint_every": 500}
_TUNE = {
    "uvit": {
        **TEACH, "optimizer": "muon", "lr": 1e-3, "warmup": 100, "steps": 5000, "batch_size": 32, "mixed_precision": "bf16",
    },
    "unet": {**TEACH, "lr": 1e-3, "warmup": 100, "steps": 5000, "batch_size": 64},
}  # fmt: skip
_SHORT = {"steps": 1000, "warmup": 50}
_WATCH = (0, 100, 200, 500)
_TEACHER_ONLY = {"noise_weight": 0.0, "teacher_weight": 1.0}
_GENTLE = {"lr": 3e-4}
_CALIBRATE = {"n": 1024}
# A minute of one core.
_RECOVER = {**_TEACHER_ONLY, "train_only": "norms", "steps": 70, "batch_size": 64, "lr": 2e-3, "lr_schedule": "cosine"}

# The share of channels whose removal leaves about three quarters, half and a quarter of the MACs.
_RATIOS = {"uvit": (0.25, 0.5, 0.75), "unet": (0.2, 0.35, 0.55)}
# The official code's first schedule; here its five stages are equally long.
_PROGRESSIVE = ("31:32", "15:16", "7:8", "3:4", "2:4")


def recipes() -> dict[str, Recipe]:
    uvit = {"steps": 11_000, "batch_size": 32, "warmup": 200, "optimizer": "muon", **TEACH}
    unet = {"steps": 10_000, "batch_size": 64, "warmup": 500, **TEACH}
    return {
        **_headline("glyphs-uvit", "U-ViT", (UViTModel, _UVIT), uvit, _TUNE["uvit"], _RATIOS["uvit"][1]),
        **_headline("glyphs-unet", "UNet", (UNet2DModel, _UNET), unet, _TUNE["unet"], _RATIOS["unet"][1]),
        **_short("glyphs-uvit", "U-ViT", {**_TUNE["uvit"], **_SHORT}, _RATIOS["uvit"]),
        **_short("glyphs-unet", "UNet", {**_TUNE["unet"], **_SHORT}, _RATIOS["unet"]),
        **_one_shot("glyphs-uvit", "U-ViT"),
        **_one_shot("glyphs-unet", "UNet"),
        **_rivals("glyphs-uvit", "U-ViT"),
        **_rivals("glyphs-unet", "UNet", cache_intervals=(2, 3, 5)),
    }


def _headline(base: str, backbone: str, model: tuple[type, dict], teach: dict, tune: dict, half: float) -> dict[str, Recipe]:
    """The teacher, and its students at half the MACs, trained long."""
    pruned = {"ratio": half, "round_to": 4, "score": "squared", "threshold": 0.05}
    student = {"train": tune, "bundle": True, "seeds": 3}
    fifth = {**tune, "steps": teach["steps"] // 5}  # the most that the paper claims to need
    return {
        base: Recipe("headline", backbone, "teacher", model=model, schedule=SCHEDULE, train=teach, bundle=True),
        f"{base}-more": Recipe("headline", backbone, "dense, same extra training", base, "more", train=tune, seeds=3),
        f"{base}-more-gentle": Recipe(
            "headline", backbone, "dense, same extra training, lr 3e-4", base, "more-gentle", train={**tune, **_GENTLE}
        ),
        f"{base}-2x4-oneshot": Recipe("headline", backbone, "2:4, one-shot", base, "2x4-oneshot", pattern="2:4"),
        f"{base}-2x4-calibrated": Recipe(
            "headline",
            backbone,
            "2:4, calibrated, no training",
            base,
            "2x4-calibrated",
            pattern="2:4",
            calibrate=_CALIBRATE,
            bundle=True,
        ),
        f"{base}-2x4-recovered": Recipe(
            "headline",
            backbone,
            "2:4, calibrated, a minute of recovery",
            base,
            "2x4-recovered",
            pattern="2:4",
            calibrate=_CALIBRATE,
            distil=True,
            train=_RECOVER,
        ),
        f"{base}-2x4-from-calibrated": Recipe(
            "headline",
            backbone,
            "2:4, SparseDM from the calibrated start, lr 3e-4",
            base,
            "2x4-from-calibrated",
            pattern="2:4",
            calibrate=_CALIBRATE,
            distil=True,
            train={**tune, **_GENTLE},
            seeds=3,
        ),
        f"{base}-2x4": Recipe("headline", backbone, "2:4, SparseDM", base, "2x4", pattern="2:4", distil=True, **student),
        f"{base}-2x4-teacher-only": Recipe(
            "headline",
            backbone,
            "2:4, teacher's loss only",
            base,
            "2x4-teacher-only",
            pattern="2:4",
            distil=True,
            train={**tune, **_TEACHER_ONLY},
        ),
        f"{base}-diffpruned": Recipe("headline", backbone, "Diff-Pruning", base, "diffpruned", prune=pruned, **student),
        f"{base}-diffpruned-fifth": Recipe(
            "headline",
            backbone,
            "Diff-Pruning, a fifth of the teacher's training",
            base,
            "diffpruned-fifth",
            prune=pruned,
            train=fifth,
        ),
    }


def _short(base: str, backbone: str, train: dict, ratios: tuple[float, float, float]) -> dict[str, Recipe]:
    """Every method after the same short training, at half the MACs where nothing else is said."""
    few, half, most = ratios
    stage = train["steps"] // len(_PROGRESSIVE)
    progressive = tuple((i * stage, pattern) for i, pattern in enumerate(_PROGRESSIVE))
    students = {}

    def add(key: str, method: str, seeds: int = 1, watch: bool = False, **options) -> None:
        options = {"train": train, "protocol": _SHORT_PROTOCOL, "watch": _WATCH if watch else (), "seeds": seeds, **options}
        students[f"{base}-short-{key}"] = Recipe("short", backbone, method, base, key, **options)

    def pruned(ratio: float = half, score: str = "squared", threshold: float | None = 0.05) -> dict:
        return {"ratio": ratio, "round_to": 4, "score": score, "threshold": threshold}

    add("teacher", "teacher", train={})
    add("more", "dense, same extra training", 3, True)
    add("more-gentle", "dense, same extra training, lr 3e-4", train={**train, **_GENTLE})
    add("2x4", "2:4, SparseDM", 3, True, pattern="2:4", distil=True)
    add("2x4-gentle", "2:4, SparseDM, lr 3e-4", pattern="2:4", distil=True, train={**train, **_GENTLE})
    add("diffpruned", "Diff-Pruning", 3, True, prune=pruned())
    add("2x4-srste", "2:4, SR-STE without teacher", 3, pattern="2:4")
    add("2x4-asp", "2:4, ASP (first masks kept)", pattern="2:4", sparsify={"frozen": True})
    no_gradients = {"threshold": None}  # scores without gradients
    add("scratch", "pruned shape from scratch", watch=True, prune={**pruned(score="random", **no_gradients), "reinit": True})
    add("magnitude", "magnitude pruning", prune=pruned(score="magnitude", **no_gradients))
    add("random", "random pruning", prune=pruned(score="random", **no_gradients))
    add("taylor", "Taylor pruning (threshold 0)", prune=pruned(threshold=0.0))
    add("2x4-ste", "2:4, STE without teacher", pattern="2:4", sparsify={"decay": 0.0})
    add("2x4-s-ste", "2:4, S-STE", pattern="2:4", distil=True, sparsify={"estimator": "s-ste"})
    add("2x4-ast", "2:4, AST", pattern="2:4", distil=True, sparsify={"decay_mode": "adam"})
    add("2x4-oneshot", "2:4, one-shot", pattern="2:4", train={})
    schedule = {**train, "pattern_schedule": progressive}
    add("2x4-progressive", "2:4, SparseDM, progressive", pattern="2:4", distil=True, train=schedule)
    constant = {**train, "lr_schedule": "constant_with_warmup"}  # the paper's: what comes last learns as much
    add("2x4-constant", "2:4, SparseDM, constant rate", pattern="2:4", distil=True, train=constant)
    constant = {**constant, "pattern_schedule": progressive}
    add("2x4-progressive-constant", "2:4, SparseDM, progressive, constant rate", pattern="2:4", distil=True, train=constant)
    add("2x4-teacher-only", "2:4, teacher's loss only", 3, pattern="2:4", distil=True, train={**train, **_TEACHER_ONLY})
    add("1x4", "1:4, SparseDM", pattern="1:4", distil=True)
    add("diffpruned-quarter", f"Diff-Pruning, ratio {most:g}", prune=pruned(most))
    add("diffpruned-2x4", "Diff-Pruning, then 2:4, SparseDM", pattern="2:4", distil=True, prune=pruned())
    add("3x4", "3:4, SparseDM", pattern="3:4", distil=True)
    add("diffpruned-most", f"Diff-Pruning, ratio {few:g}", prune=pruned(few))
    for n, m in ((4, 8), (1, 8), (7, 8), (15, 16)):
        add(f"{n}x{m}", f"{n}:{m}, SparseDM", pattern=f"{n}:{m}", distil=True)
    for threshold in (0.02, 0.2):
        add(f"threshold-{threshold:g}", f"Diff-Pruning, threshold {threshold:g}", prune=pruned(threshold=threshold))
    add("absolute", "Diff-Pruning, absolute score", prune=pruned(score="absolute"))
    return students


def _one_shot(base: str, backbone: str) -> dict[str, Recipe]:
    """Ways to N:M by calibration alone, scored as the short runs are, where magnitude's mask has its row."""
    students = {}

    def add(key: str, title: str, pattern: str = "2:4", train: dict | None = None, **calibrate) -> None:
        options = {"pattern": pattern, "calibrate": {**_CALIBRATE, **calibrate}, "train": train or {}, "distil": bool(train)}
        method, protocol = f"{pattern}, {title}", _SHORT_PROTOCOL
        students[f"{base}-oneshot-{key}"] = Recipe("one-shot", backbone, method, base, key, protocol=protocol, **options)

    add("wanda", "Wanda", method="wanda")
    add("obs", "OBS", method="obs")
    add("admm", "ADMM", method="admm")
    add("recovered", "ADMM, a minute of recovery", train=_RECOVER, method="admm")
    add("weighted", "ADMM, OBS-Diff's timestep weights", method="admm", weights="obs-diff")
    add("free", "ADMM, no data", method="admm", data=None)
    for n, m in ((1, 4), (3, 4), (4, 8)):
        add(f"{n}x{m}", "ADMM", f"{n}:{m}", method="admm")
    return students


def _rivals(base: str, backbone: str, cache_intervals: tuple[int, ...] = ()) -> dict[str, Recipe]:
    """The teacher and its 2:4 student with fewer sampling steps, and with DeepCache."""
    recipes = {}
    for drawn, kind in ((base, "teacher"), (f"{base}-2x4", "2:4")):
        usual = Protocol(n=5_000, batch_size=64)
        fewer = {f"{steps}-steps": replace(usual, steps=steps) for steps in (usual.steps, 40, 25)}
        cached = {f"cached-{interval}": replace(usual, cache_interval=interval) for interval in cache_intervals}
        for key, protocol in (fewer | cached).items():
            role = key if drawn == base else f"2x4-{key}"
            recipes[f"{drawn}-{key}"] = Recipe("rivals", backbone, kind, base, role, drawn, protocol=protocol)
    return recipes
