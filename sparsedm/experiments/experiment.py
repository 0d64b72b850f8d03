"""Carrying out a recipe in four steps: prepare the plan, make (prune or mask, train, save), score, publish.

`python -m sparsedm reproduce NAME` resumes where it stopped and leaves in its folder the training log, the checkpoint, the
model, the scored pictures and `results.json`. Only the saved model is scored: the reported model is the shipped model.
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
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn

from .. import data, plots
from ..checkpoints import folders
from ..data import latents
from ..masking import layers, nm
from ..measure import evaluation, fingerprint, macs, metrics, sizes
from ..measure.evaluation import Progress
from ..models import denoisers
from ..models.uvit import UViTModel
from ..pruning import diffpruning, structure
from ..support import processes, tensorfiles
from ..support.files import read_json, replacing, restore, write_json
from ..training import distill
from ..training.calibrate import calibrate
from ..training.checkpoint import TrainConfig
from ..training.runlog import RunLog, read
from . import glyph_classifier
from .recipes import CLASSIFIER, Protocol, Recipe, recipe, run_name
from .results import RESULTS, RESULTS_FILE, card

IMPORTANCE_PICTURES = 128  # as many as the Diff-Pruning code takes of CIFAR-10
KEPT = 36  # pictures beside a stored result: one of each character
WATCH_PICTURES = metrics.MIN_SAMPLES["fd"]


@dataclass(frozen=True)
class Plan:
    """One run of a recipe, checked before anything is computed.

    Attributes:
        name: of the recipe.
        recipe: the recipe itself.
        out: the folder of all runs.
        protocol: how to score, with the noise of this seed.
        settings: of the training; {} for a recipe without one.
        seed: of the training's draws and of the pictures' noise.
        inception: path of Inception's weights, if FID is wanted.
        vae: folder of the autoencoder that decodes latents.
        reference: data set for FID instead of the training set.
        commit: of the code that runs; the files may change during a long training.
    """

    name: str
    recipe: Recipe
    out: Path
    protocol: Protocol
    settings: dict
    seed: int
    inception: str | None
    vae: str | None
    reference: str
    commit: str

    @property
    def run(self) -> str:
        return run_name(self.name, self.seed)

    @property
    def folder(self) -> Path:
        return self.out / self.run

    @property
    def model(self) -> Path:
        """The folder of the run's model."""
        return self.folder / "model"

    @property
    def results(self) -> Path:
        return self.folder / RESULTS_FILE


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
        seed: of the training's draws and of the pictures' noise; the base is the same for all seeds.
        inception: path of Inception's weights, for FID on data sets other than the glyphs.
        vae: folder of the autoencoder that decodes what a latent model makes.
        reference: name of the data set that FID compares with, the training set by default.
        **train_options: override fields of the recipe's training, for trials.

    Raises:
        ValueError: an unknown recipe or setting, inputs that are missing, or a folder that holds another run.
    """
    if name == CLASSIFIER:
        return (yield from glyph_classifier.reproduce(Path(out, name), bundle))
    plan = _prepare(name, Path(out), protocol, seed, inception, vae, reference, train_options)
    with processes.claimed(plan.folder):
        results = _begin(plan)
        if results is None:
            yield from _make(plan)
            results = yield from _score(plan)
    if not results:
        return {}
    if bundle and processes.is_main():
        _publish(plan, results)
    yield Progress("done", 1, 1, json.dumps(results["scores"]))
    return results


def _prepare(
    name: str,
    out: Path,
    protocol: Protocol | None,
    seed: int,
    inception: str | None,
    vae: str | None,
    reference: str,
    train_options: dict,
) -> Plan:
    """The plan of a run. Raises ValueError if the run cannot be carried out."""
    chosen, commit = recipe(name), _commit()
    if seed:
        chosen = replace(chosen, watch=())  # one curve is enough
    settings = {**chosen.train, **train_options} if chosen.train else {}
    if settings:
        TrainConfig.of(settings)
    if settings and seed:
        settings["seed"] = seed
    if chosen.data.startswith("latents:") and (not vae or (inception and not reference)):
        raise ValueError(f"{name} makes latents: name the folder of an autoencoder (vae), and for FID real pictures (reference)")
    protocol = protocol or chosen.protocol
    evaluation.check(protocol.n, chosen.data, inception, reference)
    if vae:
        latents.autoencoder(vae)
    protocol = replace(protocol, seed=protocol.seed + seed)
    return Plan(name, chosen, out, protocol, settings, seed, inception, vae, reference, commit)


def _begin(plan: Plan) -> dict | None:
    """Note the settings in the run's folder; the results if the run is finished. Raises ValueError if they differ."""
    if not processes.is_main():
        return processes.from_main(None)
    restore(plan.model)
    _note_settings(plan.folder, plan.settings)
    return processes.from_main(_finished(plan.results, plan.protocol, _sources(plan)))


def _score(plan: Plan) -> Iterator[Progress]:
    """Score the saved model (a generator that writes and returns the results; {} in other processes than the main one)."""
    model = _load(plan.model)
    _check_pattern(model, plan.recipe)
    pictures = yield from _pictures(model, plan)
    if pictures is None:
        return {}
    images, base_images, curve = pictures
    asked = evaluation.labels(model, plan.protocol.n)
    results = {
        "name": plan.run,
        "command": f"python -m sparsedm reproduce {plan.name}" + (f" --seed {plan.seed}" if plan.seed else ""),
        "seed": plan.seed,
        "scores": evaluation.score(images, asked, plan.recipe.data, base_images, plan.inception, plan.reference),
        "curve": curve,
        "protocol": asdict(plan.protocol),
        **_facts(plan, model),
        "commit": plan.commit,
        "sources": _sources(plan),
    }
    write_json(plan.results, results)
    return results


def _publish(plan: Plan, results: dict) -> None:
    """Copy the results and some pictures into the package, and the model with its card if the recipe says so."""
    write_json(RESULTS / f"{plan.run}.json", results)
    _keep_pictures(plan.folder, plan.protocol, RESULTS / f"{plan.run}.png")
    if plan.recipe.bundle and not plan.seed:
        model = folders.load(plan.model)
        folders.save(model, folders.ASSETS / plan.name, torch.float16, card=card(plan.name, results))


def _load(source: str | Path) -> nn.Module:
    """A model on the device of this process."""
    return folders.load(source).to(processes.state().device)


def _save(model: nn.Module, folder: Path) -> None:
    """Save a model in float16, for all processes."""
    if processes.is_main():
        folders.save(model, folder, torch.float16)
    processes.wait()


def _sources(plan: Plan) -> dict[str, str]:
    """Fingerprints of the models, weights and data that the scores rest on, as far as they are there and named."""
    sources = {}
    if (plan.model / folders.CONFIG).exists():
        sources["model"] = fingerprint.of_model(folders.load(plan.model))
    with contextlib.suppress(ValueError):  # a finished run does not need its base
        sources["base"] = fingerprint.of_model(folders.load(_base(plan.recipe, plan.out)[0])) if plan.recipe.base else ""
    if plan.inception:
        sources["inception"] = fingerprint.of_tensors({}, hashlib.sha256(Path(plan.inception).read_bytes()).hexdigest())
    if plan.vae:
        sources["vae"] = fingerprint.of_model(latents.autoencoder(plan.vae))
    if plan.reference:
        sources["reference"] = fingerprint.of_tensors({}, plan.reference)
    if plan.reference.startswith("folder:") and (folder := Path(plan.reference.removeprefix("folder:"))).is_dir():
        sources["reference_files"] = _of_pictures(folder)
    return sources


def _of_pictures(folder: Path) -> str:
    """A fingerprint of the names, sizes and times of change of the pictures under a folder: their content takes too long."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in data.IMAGE_SUFFIXES)
    facts = [(str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    return fingerprint.of_tensors({}, repr(facts))


def _finished(path: Path, protocol: Protocol, sources: dict) -> dict | None:
    """The stored results, if this protocol and these sources gave them."""
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


def _make(plan: Plan) -> Iterator[Progress]:
    """Train the recipe's model and save it folded, unless it is there."""
    if not processes.from_main((plan.model / folders.CONFIG).exists()):
        model = yield from _train(plan)
        _save(layers.fold(model), plan.model)


def _train(plan: Plan) -> Iterator[Progress]:
    """Train the recipe's model (a generator that returns the model), saving it on the way where the recipe watches."""
    model, teacher = yield from _start(plan.recipe, plan.out, plan.seed)
    if not plan.settings:
        return model
    if 0 in plan.recipe.watch:
        _save(model, _at(plan.folder, 0))
    log, teacher = RunLog(plan.folder / "log.jsonl"), teacher if plan.recipe.distil else None
    for state in distill.finetune(model, teacher, plan.recipe.data, out=plan.folder / "train", **plan.settings):
        if state.step in plan.recipe.watch:
            _save(state.ema_model(), _at(plan.folder, state.step))
        if processes.is_main() and (line := log.add(state)):
            yield Progress("train", state.step, state.steps, f"loss {line['loss']:.4f}", plan.settings["batch_size"])
    return model


def _keep_pictures(folder: Path, protocol: Protocol, path: Path) -> None:
    """Write the first of the scored pictures, two rows of `KEPT` / 2, as a small PNG."""
    few = plots.picture(evaluation.sampled(folder, protocol, KEPT), scale=1, columns=KEPT // 2)
    with replacing(path) as temporary:
        few.quantize(64).save(temporary, "PNG", optimize=True)


def _at(folder: Path, step: int) -> Path:
    return folder / f"step-{step}" / "model"


def _pictures(model: nn.Module, plan: Plan) -> Iterator[Progress]:
    """Sample the pictures that are scored.

    A generator that returns the model's pictures, the base's, and scores of the models saved on the way; None in other processes
    than the main one.
    """
    chosen, protocol, base_images = plan.recipe, plan.protocol, None
    decoder = latents.autoencoder(plan.vae).to(model.device) if plan.vae else None
    options = {"dataset": chosen.data, "vae": decoder}
    own = evaluation.sample(model, plan.folder, protocol, **options)
    base = _base_pictures(plan, options)  # both folders are checked before anything is drawn
    images = yield from own
    if base:
        base_images = yield from base
    early = yield from _early_pictures(plan, options)
    if not processes.is_main():
        return None
    yield Progress("score", 0, 1)
    curve = [*early, (plan.settings["steps"], images[:WATCH_PICTURES])] if early else []
    scores = [{"step": step, **evaluation.score(few, None, chosen.data)} for step, few in curve]
    return images, base_images, scores


def _base_pictures(plan: Plan, options: dict) -> Iterator[Progress] | None:
    """A generator that samples the base's pictures, into the base's own run if that was made here; None without a base."""
    if not plan.recipe.base:
        return None
    source, made_here = _base(plan.recipe, plan.out)
    folder = plan.out / plan.recipe.base if made_here else plan.folder / "base"
    return evaluation.sample(_load(source), folder, plan.protocol, "sample the base", **options)


def _early_pictures(plan: Plan, options: dict) -> Iterator[Progress]:
    """Sample the models saved on the way (a generator that returns pairs of a step and its pictures)."""
    protocol, early = replace(plan.protocol, n=WATCH_PICTURES), []
    for step in (step for step in plan.recipe.watch if _at(plan.folder, step).exists()):
        model, folder = _load(_at(plan.folder, step)), plan.folder / f"step-{step}"
        pictures = yield from evaluation.sample(model, folder, protocol, f"sample step {step}", **options)
        early.append((step, pictures))
    return early


def _base(chosen: Recipe, out: Path) -> tuple[str | Path, bool]:
    """Where the base's model is, and whether this model was made in `out` (else the bundled one counts)."""
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
    options = {"data": chosen.data, "pattern": chosen.pattern, "seed": seed, **chosen.calibrate}
    for state in calibrate(model, **options):
        yield Progress("calibrate", state.layer, state.layers, f"{state.name} {state.before:.3f} -> {state.after:.3f}")


def _pruned(model: nn.Module, chosen: Recipe, folder: Path, seed: int) -> Iterator[Progress]:
    """The base without channels, by the recipe's score, or this shape with fresh weights (a generator that returns a model)."""
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
    """Give the model the gradients of Diff-Pruning's importance; `folder` keeps them for other recipes of these weights."""
    path = folder / f"importance-{threshold:g}-{seed}-{fingerprint.of_model(model)}.safetensors"
    if processes.is_main() and not path.exists():
        pictures = data.load(dataset, n=IMPORTANCE_PICTURES, size=denoisers.picture_size(model))
        images, labels = data.stack(pictures, IMPORTANCE_PICTURES)
        for state in diffpruning.importance(model, images, labels, threshold=threshold, seed=seed):
            yield Progress("importance", state.timestep + 1, state.timesteps, f"loss {state.loss:.4f}")
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            gradients = {k: p.grad.cpu().contiguous() for k, p in model.named_parameters() if p.grad is not None}
            tensorfiles.save(temporary, gradients)
    processes.wait()
    gradients, _ = tensorfiles.read(path, "remove it, and the importance is computed again")
    for name, parameter in model.named_parameters():
        parameter.grad = gradients[name].to(parameter.device) if name in gradients else None


def _check_pattern(model: nn.Module, chosen: Recipe) -> None:
    """Raise ValueError if a layer of the saved student is not N:M that the recipe makes so."""
    if not chosen.pattern:
        return
    expected = {name for name, _ in layers.nm_layers(layers.sparsify(copy.deepcopy(model), chosen.pattern))}
    for name, module in layers.weight_layers(model):
        if name in expected and nm.verify(module.weight, chosen.pattern):
            raise ValueError(f"{name} is not {chosen.pattern} in the saved model")


def _facts(plan: Plan, model: nn.Module) -> dict:
    """The facts on the model and its training that the results hold besides the scores."""
    chosen, settings, counts, log = plan.recipe, plan.settings, macs.count(model), read(plan.folder / "log.jsonl")
    return {
        "title": chosen.title,
        "base": chosen.base,
        "pattern": chosen.pattern,
        "sparsify": chosen.sparsify,
        "calibrate": chosen.calibrate,
        "prune": chosen.prune,
        "parameters": sizes.parameters(model),
        "nonzero_parameters": sizes.nonzero(model),
        "bytes": (plan.model / folders.WEIGHTS).stat().st_size,
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
