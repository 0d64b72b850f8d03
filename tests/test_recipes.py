"""The papers' recipes start, train, save and resume, on stand-in data and at a fraction of the width and the pictures' size."""

import dataclasses
import functools
import itertools
import json

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DModel
from safetensors.torch import save_file
from torch.utils.data import TensorDataset

from sparsedm import data
from sparsedm.checkpoints import folders
from sparsedm.data.latents import Latents
from sparsedm.experiments import beginning, experiment, recipes
from sparsedm.masking import layers
from sparsedm.measure import evaluation, metrics
from sparsedm.models.uvit import UViTModel
from sparsedm.pruning import diffpruning
from sparsedm.training import runlog

PAPER = {name: found for name, found in recipes.RECIPES.items() if found.suite == "paper"}
# The rate is large enough for biases that float16 can hold.
TRIAL = {"lr": 1e-3, "steps": 4, "batch_size": 2, "checkpoint_every": 1, "mixed_precision": "no", "warmup": 1}


def narrow(found: recipes.Recipe) -> recipes.Recipe:
    """The same recipe with a model of few channels, for pictures of 32x32 at most and the same labels.

    Models for 32x32 have two levels, the second with attention: at full size they are pruned in test_diffpruning.py.
    """
    cls, config = found.model
    if cls is UNet2DModel:
        downs, ups, widths = (config[key] for key in ("down_block_types", "up_block_types", "block_out_channels"))
        levels = [0, downs.index("AttnDownBlock2D")] if config["sample_size"] == 32 else [*range(len(downs))]
        config = {**config, "sample_size": 32, "norm_num_groups": 4, "layers_per_block": 1}
        config["down_block_types"] = tuple(downs[level] for level in levels)
        config["up_block_types"] = tuple(ups[-1 - level] for level in reversed(levels))
        config["block_out_channels"] = tuple(8 * widths[level] // widths[0] for level in levels)
        config["attention_head_dim"] = config["attention_head_dim"] and 8
    else:
        config = {**config, "sample_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2}
    return dataclasses.replace(found, model=(cls, config))


def runs() -> dict[str, list[str]]:
    """Each teacher and those of its students that are new in their settings, or in what is done to their kind of model.

    Left out are students that differ from one of another teacher by the model and the training alone: that model is made
    sparse and pruned in the same ways, and that training is carried out, by other students.
    """
    seen, chosen = set(), {}
    for name, found in PAPER.items():
        teacher = found.base or name
        done = found.role == "teacher", bool(found.prune), bool(found.pattern), found.distil
        parts = {
            f"{teacher} {found.train}",
            f"{narrow(PAPER[teacher]).model} {done}",
            f"{found.prune} {found.sparsify} {found.calibrate} {found.pattern} {found.distil} {found.train.keys()}",
        }
        if not found.base or parts - seen:
            chosen.setdefault(teacher, []).append(name)
            seen |= parts
    return chosen


def settings(name: str) -> dict:
    """The training settings of the trial that differ from the recipe's."""
    if "pattern_schedule" in PAPER[name].train:
        return {**TRIAL, "pattern_schedule": [[0, "31:32"], [1, "2:4"]]}
    return TRIAL if PAPER[name].train else {}


@pytest.fixture
def short(monkeypatch):
    """Importances of two pictures and three timesteps."""
    importance = diffpruning.importance
    few = lambda *args, **options: itertools.islice(importance(*args, **options), 3)  # noqa: E731
    monkeypatch.setattr(diffpruning, "importance", few)
    monkeypatch.setattr(beginning, "IMPORTANCE_PICTURES", 2)


@pytest.fixture
def trial(short, monkeypatch, tmp_path):
    """`trial(name)`: a generator that carries the recipe out at trial size."""

    def stand_in(name: str):
        config = narrow(PAPER[PAPER[name].base or name]).model[1]
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(8, config.get("in_channels", 3), *[config["sample_size"]] * 2, generator=generator).clamp(-1, 1)
        if data.kind(PAPER[name].data) != "latents":
            return TensorDataset(images, torch.arange(8))
        text = torch.randn(9, config.get("context_tokens", 1), config.get("context_dim") or 1, generator=generator)
        given = {"encoder_hidden_states": text[:8]} if config.get("context_dim") else {"labels": torch.arange(8)}
        (tmp_path / "latents").mkdir(exist_ok=True)
        save_file({"latents": images, **given}, tmp_path / "latents" / "0.safetensors")
        save_file({"encoder_hidden_states": text[8]}, tmp_path / "latents" / "null.safetensors")
        return Latents(tmp_path / "latents")

    vae = tmp_path / "vae"
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    AutoencoderKL(block_out_channels=(4, 4), norm_num_groups=2, latent_channels=4, **blocks).save_pretrained(vae)

    def start(name: str):
        monkeypatch.setattr(data, "load", lambda data, **options: data if not isinstance(data, str) else stand_in(name))
        monkeypatch.setitem(recipes.RECIPES, name, narrow(PAPER[name]) if not PAPER[name].base else PAPER[name])
        latent = data.kind(PAPER[name].data) == "latents"
        protocol = dataclasses.replace(PAPER[name].protocol, n=2, steps=2)
        return experiment.reproduce(name, tmp_path, protocol, vae=vae if latent else None, **settings(name))

    monkeypatch.setattr(experiment, "RunLog", functools.partial(runlog.RunLog, every=1))
    return start


@pytest.mark.parametrize("names", [pytest.param(names, id=teacher) for teacher, names in runs().items()])
def test_teachers_and_students_start_step_save_and_resume(names, trial, tmp_path):
    for run in names:
        states = trial(run)
        if PAPER[run].train:
            next(state for state in states if state.stage == "train" and state.done == 2)
            states.close()
            checkpoint = torch.load(tmp_path / run / "train" / "checkpoint.pt", weights_only=True)
            assert checkpoint["step"] in (1, 2)
            states = trial(run)
        stages = [(state.stage, state.done) for state in states]
        assert stages[-1][0] == "done"
        if PAPER[run].train:  # what was left of it
            assert [step for stage, step in stages if stage == "train"] == list(range(checkpoint["step"] + 1, 5))
            log = (tmp_path / run / "log.jsonl").read_text().splitlines()
            assert [json.loads(line)["step"] for line in log] == [1, 2, 3, 4]
        result = json.loads((tmp_path / run / "results.json").read_text())
        assert result["train"] == json.loads(json.dumps({**PAPER[run].train, **settings(run)}))
        model = folders.load(tmp_path / run / "model")
        assert all(torch.isfinite(p).all() for p in model.parameters())
        assert bool(layers.patterns(model)) == bool(PAPER[run].pattern)


FACES = {name: found for name, found in recipes.RECIPES.items() if found.suite == "faces"}


@pytest.mark.parametrize("name", ["faces-unet-2x4-from-calibrated", "faces-unet-diffpruned", "faces-uvit-2x4-oneshot"])
def test_recipes_for_faces_make_students_that_draw_from_words(name, short, monkeypatch, tmp_path):
    chosen = FACES[name]
    cls, config = FACES[chosen.base].model
    small = {"embed_dim": 16, "depth": 2, "num_heads": 2} if cls is UViTModel else {"block_out_channels": (8, 8, 16)}
    torch.manual_seed(0)
    base = cls(**{**config, **small})
    base.register_to_config(noise_schedule=FACES[chosen.base].schedule, context_tokens=FACES[chosen.base].context_tokens)
    folders.save(base, tmp_path / chosen.base / "model")
    chosen = dataclasses.replace(chosen, calibrate={"n": 32, "packages": 1} if chosen.calibrate else {})
    monkeypatch.setitem(recipes.RECIPES, name, chosen)
    monkeypatch.setitem(metrics.MIN_SAMPLES, "fd", 4)
    protocol = dataclasses.replace(chosen.protocol, n=4, steps=2)
    trial = {**TRIAL, "warmup": 0, "steps": 1} if chosen.train else {}
    drawn = itertools.takewhile(lambda state: state.stage != "score", experiment.reproduce(name, tmp_path, protocol, **trial))
    assert [state.stage for state in drawn][-1] == "sample the base"
    assert evaluation.sampled(tmp_path / name, protocol, 4).shape == (4, 3, 32, 32)
