"""Carrying out a recipe: prune or mask, train, save, score, and write down what came out.

`python -m sparsedm reproduce NAME` resumes where it stopped and leaves in its folder the training log, the checkpoint, the
model, the pictures it was scored on and `results.json`. Only the saved model is scored: what is reported is what is shipped.
Several processes share training and sampling; the main one writes and scores.
"""

import contextlib
import copy
import datetime
import hashlib
import json
import platform
import subprocess
import warnings
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import nn

from .. import data, plots
from ..checkpoints import folders
from ..masking import layers, nm
from ..measure import evaluation, fingerprint, macs, metrics
from ..measure.evaluation import Progress
from ..models import denoisers
from ..models.uvit import UViTModel
from ..pruning import diffpruning, structure
from ..support import processes
from ..support.files import read_json, replacing, restore, write_json
from ..training import distill
from ..training.calibrate import calibrate
from ..training.runlog import RunLog, read
from . import glyph_classifier
from .recipes import CLASSIFIER, Protocol, Recipe, recipe, run_name
from .results import RESULTS, RESULTS_FILE, card

IMPORTANCE_PICTURES = 128  # as many as the Diff-Pruning code takes of CIFAR-10
KEPT = 36  # pictures that are shown with a stored result: one of each character
WATCH_PICTURES = metrics.MIN_SAMPLES["fd"]


def reproduce(
    name: str,
    out: str | Path = "runs",
    protocol: Protocol | None = None,
    bundle: bool = False,
    seed: int = 0,
    inception: str | None = None,
    vae: str | None = None,
    reference: str = "",
    **train_options,
) -> Iterator[Progress]:
    """Train, save and score the recipe `name` in the folder `out`/`run_name(name, seed)`, going on from whatever is there.

    A generator that returns the results, in the main process. A student starts from its base's model in `out` if that was made
    there, else from the bundled one.

    Args:
        protocol: how to score, the recipe's own by default.
        bundle: also copy the results into the package, and with seed 0 the model and its card if the recipe says so.
        seed: of the training's draws and of the pictures' noise; the base is the same for all.
        inception: path of Inception's weights, for FID on sets other than the glyphs, against the pictures of `reference` (a
            data set's name) or of the training set.
        vae: folder of the autoencoder that decodes what a latent model makes.
        **train_options: override fields of the recipe's training, for trials.
    """
    if name == CLASSIFIER:
        return (yield from glyph_classifier.reproduce(Path(out, name), bundle))
    chosen, run = recipe(name), run_name(name, seed)
    commit = _commit()  # of the code that runs; the files may change during a long training
    if seed:
        chosen = replace(chosen, watch=())  # one curve is enough
    if chosen.train:
        distill.TrainConfig.of({**chosen.train, **train_options})
    protocol = protocol or chosen.protocol
    protocol = replace(protocol, seed=protocol.seed + seed)
    folder = Path(out, run)
    settings = {**chosen.train, **train_options} if chosen.train else {}
    if settings and seed:
        settings["seed"] = seed
    if chosen.data.startswith("latents:") and (not vae or (inception and not reference)):
        raise ValueError(f"{name} makes latents: name the folder of an autoencoder (vae), and for FID real pictures (reference)")
    evaluation.check(protocol.n, chosen.data, inception)
    with processes.claimed(folder):
        if processes.is_main():
            restore(folder / "model")
            _note_settings(folder, settings)
        sources = _sources(chosen, Path(out), folder, inception, vae, reference) if processes.is_main() else {}
        results = processes.from_main(_finished(folder / RESULTS_FILE, protocol, sources) if processes.is_main() else None)
        if results is None:
            if not processes.from_main((folder / "model" / folders.CONFIG).exists()):
                made = yield from _make(chosen, Path(out), folder, settings, seed)
                _save(made, folder / "model")
            model = _load(folder / "model")
            _check_pattern(model, chosen)
            pictures = yield from _pictures(model, chosen, protocol, Path(out), folder, settings, vae)
            if pictures is None:
                return {}
            images, base_images, curve = pictures
            asked = evaluation.labels(model, protocol.n)
            scores = evaluation.score(images, asked, chosen.data, base_images, inception, reference)
            results = {"name": run, "command": f"python -m sparsedm reproduce {name}" + (f" --seed {seed}" if seed else "")}
            results |= {"seed": seed, "scores": scores, "curve": curve, "protocol": asdict(protocol)}
            results |= {**_facts(chosen, model, folder, settings), "commit": commit}
            results["sources"] = _sources(chosen, Path(out), folder, inception, vae, reference)
            write_json(folder / RESULTS_FILE, results)
    if bundle and processes.is_main():
        write_json(RESULTS / f"{run}.json", results)
        _keep_pictures(folder, protocol, RESULTS / f"{run}.png")
        if chosen.bundle and not seed:
            folders.save(folders.load(folder / "model"), folders.ASSETS / name, torch.float16, card=card(name, results))
    yield Progress("done", 1, 1, json.dumps(results["scores"]))
    return results


def _load(source: str | Path) -> nn.Module:
    """A model on the device of this process."""
    return folders.load(source).to(processes.state().device)


def _save(model: nn.Module, folder: Path) -> None:
    """Save a model in float16, for all processes."""
    if processes.is_main():
        folders.save(model, folder, torch.float16)
    processes.wait()


def _sources(chosen: Recipe, out: Path, folder: Path, inception: str | None, vae: str | None, reference: str) -> dict[str, str]:
    """Fingerprints of what is scored and compared with, as far as it is there and named."""
    found = {}
    if (folder / "model" / folders.CONFIG).exists():
        found["model"] = fingerprint.of_model(folders.load(folder / "model"))
    with contextlib.suppress(ValueError):  # a finished run does not need its base
        found["base"] = fingerprint.of_model(folders.load(_base(chosen, out)[0])) if chosen.base else ""
    if inception:
        found["inception"] = fingerprint.of_tensors({}, hashlib.sha256(Path(inception).read_bytes()).hexdigest())
    if vae:
        found["vae"] = fingerprint.of_model(AutoencoderKL.from_pretrained(vae))
    if reference:
        found["reference"] = fingerprint.of_tensors({}, reference)
    return found


def _finished(path: Path, protocol: Protocol, sources: dict) -> dict | None:
    """The results, if they were written under this protocol, of these sources."""
    results = read_json(path, "remove it, and the model is scored again") if path.exists() else {}
    if results.get("protocol") != asdict(protocol):
        return None
    if "sources" not in results:
        warnings.warn(f"{path} does not say which weights it is about; remove it to score the model again", stacklevel=3)
        return results
    return results if results["sources"].items() >= sources.items() else None


def _note_settings(folder: Path, settings: dict) -> None:
    """Note the settings in the folder, or refuse a folder that holds a run with others."""
    path, settings = folder / "settings.json", json.loads(json.dumps(settings))
    if path.exists() and read_json(path, "remove it if the run beside it has the same settings") != settings:
        raise ValueError(f"{folder} holds a run with other settings ({path}); use another output folder, or remove it")
    write_json(path, settings)


def _make(chosen: Recipe, out: Path, folder: Path, settings: dict, seed: int) -> Iterator[Progress]:
    """Train the recipe's model (a generator that returns it, folded), saving it on the way where the recipe watches."""
    model, teacher = yield from _start(chosen, out, seed)
    if settings:
        if 0 in chosen.watch:
            _save(model, _at(folder, 0))
        log, teacher = RunLog(folder / "log.jsonl"), teacher if chosen.distil else None
        for state in distill.finetune(model, teacher, chosen.data, out=folder / "train", **settings):
            if state.step in chosen.watch:
                _save(state.ema_model(), _at(folder, state.step))
            if processes.is_main() and (line := log.add(state)):
                yield Progress("train", state.step, state.steps, f"loss {line['loss']:.4f}", settings["batch_size"])
    return layers.fold(model)


def _keep_pictures(folder: Path, protocol: Protocol, path: Path) -> None:
    """Write the first of the scored pictures, two rows of `KEPT` / 2, as a small PNG."""
    few = plots.picture(evaluation.sampled(folder, protocol, KEPT), scale=1, columns=KEPT // 2)
    with replacing(path) as temporary:
        few.quantize(64).save(temporary, "PNG", optimize=True)


def _at(folder: Path, step: int) -> Path:
    return folder / f"step-{step}" / "model"


def _pictures(
    model: nn.Module, chosen: Recipe, protocol: Protocol, out: Path, folder: Path, settings: dict, vae: str | None
) -> Iterator[Progress]:
    """Sample what is to be scored.

    A generator that returns pictures, the base's, and scores of the models saved on the way; None in other processes than the
    main one.
    """
    decoder = AutoencoderKL.from_pretrained(vae).to(model.device) if vae else None
    told = {"dataset": chosen.data, "vae": decoder}
    own, base, base_images, early = evaluation.sample(model, folder, protocol, **told), None, None, []
    if chosen.base:  # its folder, too, is checked before anything is drawn
        source, made_here = _base(chosen, out)
        place = out / chosen.base if made_here else folder / "base"
        base = evaluation.sample(_load(source), place, protocol, "sample the base", **told)
    images = yield from own
    if base:
        base_images = yield from base
    for step in (step for step in chosen.watch if _at(folder, step).exists()):
        few, watched = replace(protocol, n=WATCH_PICTURES), _load(_at(folder, step))
        pictures = yield from evaluation.sample(watched, folder / f"step-{step}", few, f"sample step {step}", **told)
        early.append((step, pictures))
    if not processes.is_main():
        return None
    yield Progress("score", 0, 1)
    curve = [*early, (settings["steps"], images[:WATCH_PICTURES])] if early else []
    return images, base_images, [{"step": step, **evaluation.score(some, None, chosen.data)} for step, some in curve]


def _base(chosen: Recipe, out: Path) -> tuple[str | Path, bool]:
    """Where the base's model is, and whether it was made in `out` (else it is the bundled one)."""
    made_here = out / chosen.base / "model"
    restore(made_here)
    if (made_here / folders.CONFIG).exists():
        return made_here, True
    if chosen.base not in folders.bundled():
        raise ValueError(
            f"the teacher {chosen.base} is not there; train it with `python -m sparsedm reproduce {chosen.base}`, or put the"
            f" folder of a trained one at {made_here}"
        )
    return chosen.base, False


def _start(chosen: Recipe, out: Path, seed: int) -> Iterator[Progress]:
    """The model to train and its teacher (a generator that returns both)."""
    if not chosen.base:
        cls, config = chosen.model
        torch.manual_seed(seed)
        model = cls(**config)
        model.register_to_config(noise_schedule=chosen.schedule)
        return model, None
    source, _ = _base(chosen, out)
    model, teacher = _load(source), _load(source)
    if chosen.prune:
        model = yield from _pruned(model, chosen, out / chosen.base, seed)
    if chosen.calibrate:
        yield from _calibrated(model, chosen, seed)
    elif chosen.pattern:
        layers.sparsify(model, chosen.pattern, **chosen.sparsify)
    return model, teacher


def _calibrated(model: nn.Module, chosen: Recipe, seed: int) -> Iterator[Progress]:
    """Make the model N:M by calibration; training may change what the masks leave."""
    for state in calibrate(model, chosen.data, chosen.pattern, seed=seed, **chosen.calibrate):
        yield Progress("calibrate", state.layer, state.layers, f"{state.name} {state.before:.3f} -> {state.after:.3f}")


def _pruned(model: nn.Module, chosen: Recipe, folder: Path, seed: int) -> Iterator[Progress]:
    """The base without channels, by the recipe's score, or the same shape with fresh weights (a generator that returns it)."""
    options = dict(chosen.prune)
    threshold, reinit = options.pop("threshold", None), options.pop("reinit", False)
    if threshold is not None:
        yield from _importance(model, chosen.data, threshold, seed, folder)
    pruned = diffpruning.prune(model, seed=seed, **options)
    if not reinit:
        return pruned
    torch.manual_seed(seed)
    fresh = type(model).from_config({k: v for k, v in model.config.items() if k != "noise_schedule"})
    fresh.register_to_config(noise_schedule=model.config.noise_schedule)
    fresh = structure.apply(fresh, pruned.config.pruning)
    if not isinstance(fresh, UViTModel):  # which draws all weights alike; others by their layers' widths, now fewer
        for module in fresh.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
    return fresh


def _importance(model: nn.Module, dataset: str, threshold: float, seed: int, folder: Path) -> Iterator[Progress]:
    """Give the model the gradients of Diff-Pruning's importance; kept in `folder` for other recipes of these weights."""
    path = folder / f"importance-{threshold:g}-{seed}-{fingerprint.of_model(model)}.safetensors"
    if processes.is_main() and not path.exists():
        pictures = data.load(dataset, n=IMPORTANCE_PICTURES, size=denoisers.picture_size(model))
        images, labels = data.stack(pictures, IMPORTANCE_PICTURES)
        for state in diffpruning.importance(model, images, labels, threshold=threshold, seed=seed):
            yield Progress("importance", state.timestep + 1, state.timesteps, f"loss {state.loss:.4f}")
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            save_file({k: p.grad for k, p in model.named_parameters() if p.grad is not None}, temporary)
    processes.wait()
    gradients = load_file(path, device=str(model.device))
    for name, parameter in model.named_parameters():
        parameter.grad = gradients.get(name)


def _check_pattern(model: nn.Module, chosen: Recipe) -> None:
    """Refuse to score a student whose saved weights are not N:M in every layer that should be."""
    if not chosen.pattern:
        return
    expected = {name for name, _ in layers.nm_layers(layers.sparsify(copy.deepcopy(model), chosen.pattern))}
    for name, module in layers.weight_layers(model):
        if name in expected and nm.verify(module.weight, chosen.pattern):
            raise ValueError(f"{name} is not {chosen.pattern} in the saved model")


def _facts(chosen: Recipe, model: nn.Module, folder: Path, settings: dict) -> dict:
    """What there is to say about the model besides its scores."""
    counts, log = macs.count(model), read(folder / "log.jsonl")
    return {
        "title": chosen.title,
        "base": chosen.base,
        "pattern": chosen.pattern,
        "sparsify": chosen.sparsify,
        "prune": chosen.prune,
        "parameters": sum(p.numel() for p in model.parameters()),
        "nonzero_parameters": sum(int(p.count_nonzero()) for p in model.parameters()),
        "bytes": (folder / "model" / folders.WEIGHTS).stat().st_size,
        "macs": {"dense": counts.dense, "sparse": counts.sparse, "executed": counts.executed, "attention": counts.attention},
        "train": settings,
        "train_images": settings["steps"] * settings["batch_size"] if settings else 0,
        "train_seconds": round(sum(line["seconds"] * _log_interval(log, i) for i, line in enumerate(log))),
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
    }


def _commit() -> str:
    """The package's commit, "" outside a repository; "+" says that files were changed since."""
    try:
        git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--exclude=*"]
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _log_interval(log: list[dict], i: int) -> int:
    return log[i]["step"] - (log[i - 1]["step"] if i else 0)
