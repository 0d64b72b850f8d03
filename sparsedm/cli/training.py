"""Commands that train or change a model: train, finetune, sparsify, prune."""

import copy
from pathlib import Path
from typing import Annotated

import torch
import typer

from ..models import zoo
from .common import Data, Device, Json, Model, Seed, Set, bars, free, load_or_build, on, outcome, settings
from .job import Job

Out = Annotated[Path, typer.Argument(help="A folder for checkpoints, log and, in OUT/model, the model.")]
Steps = Annotated[int, typer.Option(help="Training steps in all.")]
Batch = Annotated[int, typer.Option(help="Pictures per step, over all processes.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run in OUT.")]
Pattern = Annotated[str, typer.Option(help="N:M, such as 2:4.")]
Globs = Annotated[list[str] | None, typer.Option(help="Layers to leave dense, such as 'mid_block.*'; may be repeated.")]
Track = Annotated[str, typer.Option(help="tensorboard, wandb, ... or none; TensorBoard by default, if it is installed.")]
Samples = Annotated[int, typer.Option(help="Draw a grid of pictures every so many steps; 0 never does.")]
Half = Annotated[str, typer.Option(help="Of the saved weights: float32, float16 or bfloat16.")]


def train(
    model: Annotated[
        str, typer.Argument(help="A bundled model's name, a model folder, or a paper's configuration (fresh weights).")
    ],
    out: Out,
    data: Data = "glyphs",
    steps: Steps = 1000,
    batch_size: Batch = 64,
    set_: Set = None,
    resume: Resume = False,
    track: Track = "",
    samples_every: Samples = 0,
    dtype: Half = "float32",
    device: Device = "",
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Train a dense or a pruned model. Example: python -m sparsedm train ddpm-cifar10 out --data folder:pictures"""
    from .. import distill

    on(device)
    trained = load_or_build(model, seed)
    options = {"steps": steps, "batch_size": batch_size, "seed": seed, **settings(set_)}
    states = distill.train(trained, data, out=out / "train", **options)
    Job(out, resume, dtype, json, track, samples_every, {"model": model, "data": data, **options}).run(states, trained)


def finetune(
    teacher: Model,
    out: Out,
    data: Data = "glyphs",
    pattern: Pattern = "2:4",
    student: Annotated[str, typer.Option(help="A model to start from instead of the teacher: a pruned one, say.")] = "",
    decay: Annotated[float, typer.Option(help="Lambda of SR-STE; 0 is plain STE.")] = 2e-4,
    exclude: Globs = None,
    steps: Steps = 1000,
    batch_size: Batch = 64,
    set_: Set = None,
    resume: Resume = False,
    track: Track = "",
    samples_every: Samples = 0,
    dtype: Half = "float16",
    device: Device = "",
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Make a sparse student of a dense teacher (SparseDM). Example: python -m sparsedm finetune glyphs-unet out --steps 2000"""
    from .. import distill, layers

    on(device)
    source = zoo.load(teacher)
    sparse = zoo.load(student) if student else copy.deepcopy(source)
    layers.sparsify(sparse, pattern, exclude=exclude, decay=decay)
    options = {"steps": steps, "batch_size": batch_size, "seed": seed, **settings(set_)}
    states = distill.finetune(sparse, source, data, out=out / "train", **options)
    told = {"teacher": teacher, "student": student, "pattern": pattern, "data": data, **options}
    Job(out, resume, dtype, json, track, samples_every, told).run(states, sparse)


def sparsify(
    model: Model,
    out: Annotated[Path, typer.Argument(help="The model folder to write.")],
    pattern: Pattern = "2:4",
    exclude: Globs = None,
    packed: Annotated[bool, typer.Option("--packed", help="Write it without the zeros.")] = False,
    dtype: Half = "float16",
    json: Json = False,
) -> None:
    """Mask a model's weights N:M in one shot, without training. Example: python -m sparsedm sparsify glyphs-unet out"""
    from .. import layers, reporting

    free(out)
    sparse = layers.fold(layers.sparsify(zoo.load(model), pattern, exclude=exclude))
    zoo.save(sparse, out, getattr(torch, dtype), packed=packed)
    summary = reporting.report(sparse).summary()
    outcome(
        {"model": str(out), "summary": summary},
        json,
        f"{out} written: {summary}. Train it with finetune to get its quality back.",
    )


def prune(
    model: Model,
    out: Annotated[Path, typer.Argument(help="The model folder to write.")],
    ratio: Annotated[float, typer.Option(help="Share of the channels that go.")] = 0.3,
    score: Annotated[str, typer.Option(help="squared or absolute (Diff-Pruning), magnitude, random.")] = "squared",
    threshold: Annotated[
        float, typer.Option(help="Timesteps count until the loss falls below this share of its maximum.")
    ] = 0.05,
    round_to: Annotated[int, typer.Option(help="Channels kept are rounded up to a multiple; 4 allows 2:4 afterwards.")] = 4,
    data: Data = "glyphs",
    n: Annotated[int, typer.Option(help="Pictures for the scores.")] = 128,
    dtype: Half = "float16",
    device: Device = "",
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Remove channels (Diff-Pruning); go on with train. Example: python -m sparsedm prune glyphs-unet out --ratio 0.35"""
    from .. import data as data_module
    from .. import diffpruning, diffusion, macs

    free(out)
    whole = zoo.load(model).to(on(device))
    if score in ("squared", "absolute"):
        images, labels = (x.to(whole.device) for x in data_module.stack(data_module.load(data), n))
        labels = None if diffusion.null_label(whole) is None else labels
        with bars(json) as bar:
            task = None
            for state in diffpruning.importance(whole, images, labels, threshold=threshold, seed=seed):
                task = bar.add_task("importance", total=state.timesteps, note="") if task is None else task
                bar.update(task, completed=state.timestep + 1, note=f"loss {state.loss:.2f}")
    small = diffpruning.prune(whole, ratio, score=score, round_to=round_to, seed=seed)
    zoo.save(small, out, getattr(torch, dtype))
    share = macs.count(small).dense / macs.count(whole).dense
    parameters = [sum(p.numel() for p in each.parameters()) for each in (whole, small)]
    found = {"model": str(out), "macs_share": share, "parameters_before": parameters[0], "parameters": parameters[1]}
    text = f"{out} written: {share:.0%} of the MACs, {parameters[1] / parameters[0]:.0%} of the parameters. Go on with train."
    outcome(found, json, text)


COMMANDS = (train, finetune, sparsify, prune)
