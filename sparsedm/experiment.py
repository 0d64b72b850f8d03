"""Carrying out a recipe: train, save, score, and write down what came out.

`python -m sparsedm reproduce NAME` resumes where it stopped and leaves in its folder the training log, the checkpoint, the
model, the pictures it was scored on and `results.json`. Only the saved model is scored: what is reported is what is shipped.
"""

import copy
import datetime
import json
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from . import data, diffpruning, diffusion, distill, layers, macs, metrics, nm, structure
from .files import replacing
from .models import classifier, zoo
from .recipes import CLASSIFIER, NOISE_SCHEDULE, Protocol, Recipe, recipe
from .results import RESULTS, card

CHUNK = 500  # pictures sampled between two saves
IMPORTANCE_PICTURES = 128  # as many as the Diff-Pruning code takes of CIFAR-10


@dataclass(frozen=True)
class Progress:
    """What `reproduce` yields: `done` of `total` in a stage ("train", "sample", "score", "done"), and a line to show."""

    stage: str
    done: int
    total: int
    note: str = ""


def reproduce(
    name: str, out: str | Path = "runs", protocol: Protocol = Protocol(), bundle: bool = False, **train_options
) -> Iterator[Progress]:
    """Train, save and score the recipe `name` in the folder `out`/`name`, going on from whatever is there.

    A student starts from its base's model in `out` if that was made there, else from the bundled one.

    Args:
        bundle: also copy the model, its card and its results into the package.
        **train_options: override fields of the recipe's training, for trials.
    """
    if name == CLASSIFIER:
        yield from _reproduce_classifier(Path(out, name), bundle)
        return
    chosen = recipe(name)
    folder = Path(out, name)
    settings = {**chosen.train, **train_options} if chosen.train else {}
    _claim(folder, settings)
    if not (folder / "model" / zoo.CONFIG).exists():
        model = yield from _make(chosen, Path(out), folder, settings)
        zoo.save(model, folder / "model", torch.float16)
    model = zoo.load(folder / "model")
    _check_pattern(model, chosen)
    images, labels = yield from _sample(model, folder / "samples.safetensors", protocol, "sample")
    base_images = None
    if chosen.base:
        source, made_here = _base(chosen, Path(out))
        path = Path(out, chosen.base) if made_here else folder / "base"
        base_images, _ = yield from _sample(zoo.load(source), path / "samples.safetensors", protocol, "sample the base")
    yield Progress("score", 0, 1)
    scores = _score(chosen, protocol, images, labels, base_images)
    results = _results(name, chosen, model, protocol, scores, folder, settings)
    _write_json(folder / "results.json", results)
    if bundle:
        _write_json(RESULTS / f"{name}.json", results)
        if chosen.bundle:
            zoo.save(model, zoo.ASSETS / name, torch.float16, card=card(name, results))
    yield Progress("done", 1, 1, json.dumps(scores))


def _claim(folder: Path, settings: dict) -> None:
    """Note the settings in the folder, or refuse a folder that holds a run with others."""
    path, settings = folder / "settings.json", json.loads(json.dumps(settings))
    if path.exists() and json.loads(path.read_text()) != settings:
        raise ValueError(f"{folder} holds a run with other settings ({path}); use another output folder, or remove it")
    _write_json(path, settings)


def _make(chosen: Recipe, out: Path, folder: Path, settings: dict) -> Iterator[Progress]:
    """Train the recipe's model (a generator that returns it, folded)."""
    model, teacher = _start(chosen, out)
    if settings:
        teacher = teacher if chosen.distil else None
        yield from _logged(distill.finetune(model, teacher, chosen.data, out=folder / "train", **settings), folder / "log.jsonl")
    return layers.fold(model)


def _base(chosen: Recipe, out: Path) -> tuple[str | Path, bool]:
    """Where the base's model is, and whether it was made in `out` (else it is the bundled one)."""
    made_here = out / chosen.base / "model"
    return (made_here, True) if (made_here / zoo.CONFIG).exists() else (chosen.base, False)


def _score(chosen: Recipe, protocol: Protocol, images: torch.Tensor, labels: torch.Tensor, base: torch.Tensor | None) -> dict:
    reference, _ = data.stack(data.load(chosen.data, split="test", n=protocol.n))
    scores = metrics.frechet(images, data.to_uint8(reference))
    scores["readability"] = metrics.readability(images, labels)
    if base is not None:
        scores["ssim_to_base"] = metrics.ssim(images, base).mean().item()
    return scores


def _start(chosen: Recipe, out: Path) -> tuple[nn.Module, nn.Module | None]:
    if not chosen.base:
        cls, config = chosen.model
        torch.manual_seed(0)
        model = cls(**config)
        model.register_to_config(noise_schedule=NOISE_SCHEDULE)
        return model, None
    source, _ = _base(chosen, out)
    model, teacher = zoo.load(source), zoo.load(source)
    if chosen.prune:
        model = _pruned(model, chosen)
    if chosen.pattern:
        layers.sparsify(model, chosen.pattern, **chosen.sparsify)
    return model, teacher


def _pruned(model: nn.Module, chosen: Recipe) -> nn.Module:
    """The base without channels, by the recipe's score, or the same shape with fresh weights."""
    options = dict(chosen.prune)
    threshold, reinit = options.pop("threshold", None), options.pop("reinit", False)
    if threshold is not None:
        images, labels = data.stack(data.load(chosen.data, n=IMPORTANCE_PICTURES))
        for _ in diffpruning.importance(model, images, labels, threshold=threshold):
            pass
    pruned = diffpruning.prune(model, **options)
    if not reinit:
        return pruned
    torch.manual_seed(0)
    fresh = type(model).from_config({k: v for k, v in model.config.items() if k != "noise_schedule"})
    fresh.register_to_config(noise_schedule=model.config.noise_schedule)
    return structure.apply(fresh, pruned.config.pruning)


def _logged(states: Iterator[distill.TrainState], path: Path, every: int = 50) -> Iterator[Progress]:
    """Pass training states on as progress; append means over `every` steps (and mask flips) to a JSON-lines file."""
    sums, count, before = {}, 0, None
    for state in states:
        if before is None:
            _keep_log_before(path, state.step)
            before = {}
        count += 1
        for term, value in {"loss": state.loss, **state.terms, "seconds": state.seconds}.items():
            sums[term] = sums.get(term, 0) + value
        if state.step % every == 0 or state.step == state.steps:
            line = {"step": state.step, "lr": state.lr, **{k: v / count for k, v in sums.items()}}
            now = layers.masks(state.model)
            if before:
                line["mask_change"] = layers.mask_change(before, now)
            before, sums, count = now, {}, 0
            with open(path, "a") as file:
                file.write(json.dumps(line) + "\n")
            yield Progress("train", state.step, state.steps, f"loss {line['loss']:.4f}")


def _keep_log_before(path: Path, step: int) -> None:
    """Drop what a killed run logged after its last checkpoint."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    with replacing(path) as temporary:
        temporary.write_text("".join(line for line in lines if json.loads(line)["step"] < step))


def _check_pattern(model: nn.Module, chosen: Recipe) -> None:
    """Refuse to score a student whose saved weights are not N:M in every layer that should be."""
    if not chosen.pattern:
        return
    expected = {name for name, _ in layers.nm_layers(layers.sparsify(copy.deepcopy(model), chosen.pattern))}
    for name, module in layers.weight_layers(model):
        if name in expected and nm.verify(module.weight, chosen.pattern):
            raise ValueError(f"{name} is not {chosen.pattern} in the saved model")


def _sample(model: nn.Module, path: Path, protocol: Protocol, stage: str) -> Iterator[Progress]:
    """Sample the protocol's pictures (a generator that returns uint8 pictures and labels), saving every `CHUNK`."""
    labels = torch.arange(protocol.n) % diffusion.null_label(model)
    settings = {k: str(v) for k, v in asdict(protocol).items() if k != "n"}
    parts = _saved_samples(path, settings)
    done = sum(map(len, parts))
    while done < protocol.n:
        stop = min(done + CHUNK, protocol.n)
        for start in range(done, stop, protocol.batch_size):
            end = min(start + protocol.batch_size, stop)
            noise = diffusion.start_noise(model, end - start, protocol.seed, first=start)
            options = {"sampler": protocol.sampler, "steps": protocol.steps, "guidance": protocol.guidance}
            with torch.autocast(model.device.type, torch.bfloat16, enabled=protocol.precision == "bf16"):
                batch = diffusion.generate(model, noise, class_labels=labels[start:end], **options)
            parts.append(data.to_uint8(batch).cpu())
            yield Progress(stage, end, protocol.n)
        done = stop
        with replacing(path) as temporary:
            save_file({"images": torch.cat(parts)}, temporary, metadata=settings)
    return torch.cat(parts)[: protocol.n], labels


def _saved_samples(path: Path, settings: dict[str, str]) -> list[torch.Tensor]:
    """Pictures of an earlier run under the same protocol."""
    if not path.exists():
        return []
    with safe_open(path, "pt") as file:
        return [file.get_tensor("images")] if file.metadata() == settings else []


def _results(name: str, chosen: Recipe, model: nn.Module, protocol: Protocol, scores: dict, folder: Path, settings: dict) -> dict:
    counts = macs.count(model)
    log = (
        [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()] if (folder / "log.jsonl").exists() else []
    )
    return {
        "name": name,
        "title": chosen.title,
        "command": f"python -m sparsedm reproduce {name}",
        "base": chosen.base,
        "pattern": chosen.pattern,
        "sparsify": chosen.sparsify,
        "prune": chosen.prune,
        "parameters": sum(p.numel() for p in model.parameters()),
        "nonzero_parameters": sum(int(p.count_nonzero()) for p in model.parameters()),
        "bytes": (folder / "model" / zoo.WEIGHTS).stat().st_size,
        "macs": {"dense": counts.dense, "sparse": counts.sparse, "executed": counts.executed, "attention": counts.attention},
        "scores": scores,
        "protocol": asdict(protocol),
        "train": settings,
        "train_images": settings["steps"] * settings["batch_size"] if settings else 0,
        "train_seconds": round(sum(line["seconds"] * _log_interval(log, i) for i, line in enumerate(log))),
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
    }


def _log_interval(log: list[dict], i: int) -> int:
    return log[i]["step"] - (log[i - 1]["step"] if i else 0)


def _write_json(path: Path, content: dict) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")


def _reproduce_classifier(folder: Path, bundle: bool) -> Iterator[Progress]:
    """Train the glyph classifier and measure its accuracy on the test split."""
    torch.manual_seed(0)
    model, steps = classifier.GlyphClassifier(), 3000
    for step, loss in enumerate(classifier.fit(model, data.load("glyphs"), steps=steps), 1):
        if step % 50 == 0:
            yield Progress("train", step, steps, f"loss {loss:.4f}")
    zoo.save(model, folder / "model", torch.float16)
    model = zoo.load(folder / "model")
    images, labels = data.stack(data.load("glyphs", split="test", n=10_000))
    with torch.no_grad():
        accuracy = (torch.cat([model(x).argmax(1) for x in images.split(1000)]) == labels).float().mean().item()
    result = {
        "name": CLASSIFIER, "command": f"python -m sparsedm reproduce {CLASSIFIER}", "accuracy": accuracy, "n": len(images),
        "parameters": sum(p.numel() for p in model.parameters()), "train": {"steps": steps, "batch_size": 128},
    }  # fmt: skip
    _write_json(folder / "results.json", result)
    if bundle:
        _write_json(RESULTS / f"{CLASSIFIER}.json", result)
        text = f"# {CLASSIFIER}\n\nReads 16x16 glyphs; {accuracy:.2%} right on {len(images):,} test glyphs.\n\n"
        text += f"Made by `{result['command']}`. Licence: MIT, as the package.\n"
        zoo.save(model, zoo.ASSETS / CLASSIFIER, torch.float16, card=text)
    yield Progress("done", 1, 1, f"accuracy {accuracy:.4f}")
