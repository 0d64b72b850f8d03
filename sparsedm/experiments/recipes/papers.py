"""The papers' own experiments, with their data, sizes and settings: for GPU machines and the data sets at hand.

Sources: the official repositories' configurations of SparseDM and U-ViT (linear variance-preserving SDE, here its 1,000-step
form) and of Diff-Pruning (its antithetic timesteps and quadratic DDIM spacing have no counterpart here). Their EMA decays are
constant, here they are the ends of diffusers' ramp (`TrainConfig`). A teacher may also be an official checkpoint: put its folder
at OUT/NAME/model.
"""

from dataclasses import replace

from ...measure.protocol import Protocol
from ...models.papers import PAPER_MODELS
from .base import Recipe

_LINEAR = {
    "num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear",
    "prediction_type": "epsilon", "clip_sample": True,
}  # fmt: skip
_LATENT = {**_LINEAR, "clip_sample": False}
_STABLE_DIFFUSION = {**_LATENT, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}

_UVIT = {"lr": 2e-4, "weight_decay": 0.03, "clip": 0.0, "ema_decay": 0.9999, "mixed_precision": "fp16", "checkpoint_every": 5000}
_CIFAR10 = {**_UVIT, "betas": (0.99, 0.999), "warmup": 2500, "batch_size": 128, "steps": 500_000, "flip": True}
_CELEBA = {**_CIFAR10, "betas": (0.99, 0.99), "warmup": 5000}
_IMAGENET = {
    **_UVIT, "betas": (0.99, 0.99), "warmup": 5000, "batch_size": 1024, "steps": 300_000, "p_uncond": 0.15,
}  # fmt: skip
_COCO = {**_UVIT, "betas": (0.9, 0.9), "warmup": 5000, "batch_size": 256, "steps": 1_000_000, "p_uncond": 0.1}

_DDPM = {"lr": 2e-4, "ema_decay": 0.9999, "checkpoint_every": 5000, "flip": True}
_STOCHASTIC = Protocol(n=50_000, sampler="ddpm", steps=1000, precision="fp32")
_DDIM = Protocol(n=50_000, sampler="ddim", steps=100, precision="fp32")

# Schedule 1 of the official code; each pattern for 100,000 steps.
_PROGRESSIVE = tuple((i * 100_000, pattern) for i, pattern in enumerate(("31:32", "15:16", "7:8", "3:4", "2:4")))
_SWEEP = ("1:4", "3:4", "4:8", "7:8", "1:8", "15:16", "1:16", "31:32", "1:32")


def recipes() -> dict[str, Recipe]:
    dpm = Protocol(n=50_000, sampler="dpm++", steps=50, precision="fp32")
    return {
        **_sparsedm("cifar10-uvit", "uvit-s2-cifar10", "cifar10", _CIFAR10, _LINEAR, _STOCHASTIC, ablations=True),
        **_sparsedm("celeba64-uvit", "uvit-s4-celeba64", "celeba", _CELEBA, _LINEAR, _STOCHASTIC),
        **_sparsedm("imagenet256-uvit", "uvit-l2-imagenet256", "latents:data/imagenet256", _IMAGENET, _LATENT,
                    replace(dpm, guidance=0.4)),
        **_sparsedm("coco-uvit", "uvit-s2-coco", "latents:data/coco256", _COCO, _STABLE_DIFFUSION,
                    replace(dpm, n=30_000, guidance=1.0)),
        **_sparsedm("cifar10-unet", "ddpm-cifar10-sparsedm", "cifar10", {**_CIFAR10, "steps": 1_000_000}, _LINEAR, _STOCHASTIC),
        **_diffpruning("cifar10-ddpm", "ddpm-cifar10", "cifar10", {"batch_size": 128, "steps": 100_000}, 800_000),
        **_diffpruning("celeba64-ddpm", "ddpm-celeba64", "celeba", {"batch_size": 96, "steps": 100_000}, 500_000),
        **_diffpruning("church256-ddpm", "ddpm-lsun256-church", "lsun-church_outdoor",
                       {"batch_size": 32, "steps": 500_000, "lr": 2e-5, "ema_decay": 0.999, "clip": 0.0}, 4_400_000, 0.01),
        **_diffpruning("bedroom256-ddpm", "ddpm-lsun256-bedroom", "lsun-bedroom",
                       {"batch_size": 48, "steps": 200_000, "lr": 2e-6, "ema_decay": 0.999, "clip": 0.0}, 2_400_000, 0.01),
    }  # fmt: skip


def _sparsedm(
    base: str, model: str, data: str, train: dict, schedule: dict, protocol: Protocol, ablations: bool = False
) -> dict[str, Recipe]:
    """A teacher, its 2:4 student and the same training of the dense model; with `ablations` all of the paper's methods."""
    paper = PAPER_MODELS[model]
    students = {}

    def add(key: str, method: str, pattern: str = "2:4", **options) -> None:
        options = {"train": train, "data": data, "protocol": protocol, **options}
        students[f"{base}-{key}"] = Recipe("paper", model, method, base, key, pattern=pattern, **options)

    add("more", "dense, same extra training", "")
    add("2x4", "2:4, SparseDM", distil=True)
    if ablations:
        add("2x4-oneshot", "2:4, one-shot", train={})
        add("2x4-asp", "2:4, ASP (first masks kept)", sparsify={"frozen": True})
        add("2x4-ste", "2:4, STE without teacher", sparsify={"decay": 0.0})
        add("2x4-srste", "2:4, SR-STE without teacher")
        teacher_only = {**train, "noise_weight": 0.0, "teacher_weight": 1.0}
        add("2x4-teacher-only", "2:4, teacher's loss only", distil=True, train=teacher_only)
        add("2x4-progressive", "2:4, SparseDM, progressive", distil=True, train={**train, "pattern_schedule": _PROGRESSIVE})
        for pattern in _SWEEP:
            add(pattern.replace(":", "x"), f"{pattern}, SparseDM", pattern, distil=True)
    teacher = Recipe(
        "paper", model, "teacher", model=(paper.cls, paper.config), schedule=schedule, train=train, data=data, protocol=protocol
    )
    return {base: teacher, **students}


def _diffpruning(base: str, model: str, data: str, train: dict, teacher_steps: int, threshold: float = 0.05) -> dict[str, Recipe]:
    """A teacher, Diff-Pruning at ratio 0.3 and its baselines, the dense model with the same extra training among them."""
    paper, train = PAPER_MODELS[model], {**_DDPM, **train}
    small = paper.config["sample_size"] < 256
    students = {}

    def add(key: str, method: str, options: dict | None = None, **prune) -> None:
        options = {"train": train, "data": data, "protocol": _DDIM, **(options or {})}
        options["prune"] = {"ratio": 0.3, **prune} if prune else {}
        students[f"{base}-{key}"] = Recipe("paper", model, method, base, key, **options)

    add("more", "dense, same extra training")
    add("diffpruned", "Diff-Pruning", score="squared", threshold=threshold)
    if small:
        add("threshold-0.02", "Diff-Pruning, threshold 0.02", score="squared", threshold=0.02)
        sparse = {"pattern": "2:4", "distil": True}
        add("diffpruned-2x4", "Diff-Pruning, then 2:4, SparseDM", sparse, score="squared", threshold=threshold, round_to=4)
        add("absolute", "Diff-Pruning, absolute score", score="absolute", threshold=threshold)
        add("taylor", "Taylor pruning (threshold 0)", score="squared", threshold=0.0)
        add("magnitude", "magnitude pruning", score="magnitude")
        add("random", "random pruning", score="random")
    add("scratch", "pruned shape from scratch", score="random", reinit=True)
    config = {**paper.config, "dropout": 0.1 if small else 0.0}
    teacher = Recipe(
        "paper", model, "teacher", model=(paper.cls, config), schedule=_LINEAR, train={**train, "steps": teacher_steps},
        data=data, protocol=_DDIM,
    )  # fmt: skip
    return {base: teacher, **students}
