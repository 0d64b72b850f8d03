"""Carrying out a recipe in four steps: prepare the plan, make (prune or mask, train, save), score, publish.

`python -m sparsedm reproduce NAME` resumes where it stopped and leaves in its folder the training log, the checkpoint, the
model, the scored pictures and `results.json`. Only the saved model is scored: the reported model is the shipped model.
Several processes share training and sampling; the main one writes and scores.
"""

import copy
import datetime
import json
import platform
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from .. import plots
from ..checkpoints import folders
from ..data import latents
from ..masking import layers, nm
from ..masking.plain import weight_layers
from ..measure import evaluation, macs, metrics, sizes
from ..measure.evaluation import Progress
from ..models import students
from ..support import processes
from ..support.files import replacing, restore, write_json
from ..training import distill
from ..training.runlog import RunLog, read
from . import classifiers
from .beginning import load, start
from .plan import Plan, base_of, finished, note_settings, prepare, sources_of
from .recipes import CLASSIFIERS, Protocol, Recipe
from .results import RESULTS, card

KEPT = 36  # pictures beside a stored result: one of each character
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
        seed: of the training's draws and of the pictures' noise; the base is the same for all seeds.
        inception: path of Inception's weights, for FID on data sets other than the glyphs.
        vae: folder of the autoencoder that decodes what a latent model makes.
        reference: name of the data set that FID compares with, the training set by default.
        **train_options: override fields of the recipe's training, for trials.

    Raises:
        ValueError: an unknown recipe or setting, inputs that are missing, or a folder that holds another run.
    """
    if name in CLASSIFIERS:
        return (yield from classifiers.reproduce(name, Path(out, name), bundle))
    plan = prepare(name, Path(out), protocol, seed, inception, vae, reference, train_options)
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


def _begin(plan: Plan) -> dict | None:
    """Note the settings in the run's folder; the results if the run is finished. Raises ValueError if they differ."""
    if not processes.is_main():
        return processes.from_main(None)
    restore(plan.model)
    note_settings(plan.folder, plan.settings)
    return processes.from_main(finished(plan.results, plan.protocol, sources_of(plan)))


def _score(plan: Plan) -> Iterator[Progress]:
    """Score the saved model (a generator that writes and returns the results; {} in other processes than the main one)."""
    model = load(plan.model)
    _check_pattern(model, plan.recipe)
    pictures = yield from _pictures(model, plan)
    if pictures is None:
        return {}
    images, base_images, curve = pictures
    asked = evaluation.asked(model, plan.recipe.data, plan.protocol.n)
    results = {
        "name": plan.run,
        "command": f"python -m sparsedm reproduce {plan.name}" + (f" --seed {plan.seed}" if plan.seed else ""),
        "seed": plan.seed,
        "scores": evaluation.score(images, asked, plan.recipe.data, base_images, plan.inception, plan.reference),
        "curve": curve,
        "protocol": plan.protocol.facts(),
        **_facts(plan, model),
        "commit": plan.commit,
        "sources": sources_of(plan),
    }
    write_json(plan.results, results)
    return results


def _publish(plan: Plan, results: dict) -> None:
    """Copy the results and some pictures into the package, and if the recipe says so the model, packed, and its card."""
    write_json(RESULTS / f"{plan.run}.json", results)
    _keep_pictures(plan.folder, plan.protocol, RESULTS / f"{plan.run}.png")
    if plan.recipe.bundle and not plan.seed:
        model = folders.load(plan.model)
        packed = bool(plan.recipe.pattern)
        folders.save(model, folders.ASSETS / plan.name, torch.float16, card(plan.name, results), packed)


def _save(model: nn.Module, folder: Path) -> None:
    """Save a model in float16, for all processes."""
    if processes.is_main():
        folders.save(model, folder, torch.float16)
    processes.wait()


def _make(plan: Plan) -> Iterator[Progress]:
    """Train the recipe's model and save it folded, unless it is there."""
    if not processes.from_main((plan.model / folders.CONFIG).exists()):
        model = yield from _train(plan)
        _save(layers.fold(model), plan.model)


def _train(plan: Plan) -> Iterator[Progress]:
    """Train the recipe's model (a generator that returns the model), saving it on the way where the recipe watches."""
    model, teacher = yield from start(plan.recipe, plan.out, plan.seed)
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
    source, made_here = base_of(plan.recipe, plan.out)
    folder, protocol = plan.out / plan.recipe.base if made_here else plan.folder / "base", plan.protocol
    if plan.recipe.draws:  # other steps are compared with the usual ones
        protocol = replace(protocol, steps=Protocol.steps, cache_interval=Protocol.cache_interval)
    return evaluation.sample(load(source), folder, protocol, "sample the base", **options)


def _early_pictures(plan: Plan, options: dict) -> Iterator[Progress]:
    """Sample the models saved on the way (a generator that returns pairs of a step and its pictures)."""
    protocol, early = replace(plan.protocol, n=WATCH_PICTURES), []
    for step in (step for step in plan.recipe.watch if _at(plan.folder, step).exists()):
        model, folder = load(_at(plan.folder, step)), plan.folder / f"step-{step}"
        pictures = yield from evaluation.sample(model, folder, protocol, f"sample step {step}", **options)
        early.append((step, pictures))
    return early


def _check_pattern(model: nn.Module, chosen: Recipe) -> None:
    """Raise ValueError if a layer of the saved student is not N:M that the recipe makes so."""
    if not chosen.pattern:
        return
    expected = {name for name, _ in layers.nm_layers(students.sparsify(copy.deepcopy(model), chosen.pattern))}
    for name, module in weight_layers(model):
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


def _log_interval(log: list[dict], i: int) -> int:
    return log[i]["step"] - (log[i - 1]["step"] if i else 0)
