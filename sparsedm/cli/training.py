"""Commands that train or change a model: train, finetune, sparsify, prune."""

import copy
import dataclasses
import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from .options import Data, Device, Globs, Half, JobOptions, Json, Model, Pattern, Seed, free

_ESTIMATORS = {"sr-ste": {}, "ast": {"decay_mode": "adam"}, "s-ste": {"estimator": "s-ste"}}  # as rules of `sparsify`


def with_job(command: Callable) -> Callable:
    """`command` for typer: its parameter `job` replaced by the fields of `JobOptions`."""

    @functools.wraps(command)
    def run(**given):
        from .job import Job

        job = Job(**{field.name: given.pop(field.name) for field in dataclasses.fields(JobOptions)})
        return command(job=job, **given)

    own = [parameter for name, parameter in inspect.signature(command).parameters.items() if name != "job"]
    parameters = [*own, *inspect.signature(JobOptions).parameters.values()]
    run.__signature__ = inspect.Signature(sorted(parameters, key=lambda parameter: parameter.default is not parameter.empty))
    return run


@with_job
def train(
    model: Annotated[
        str, typer.Argument(help="A bundled model's name, a model folder, or a paper's configuration (fresh weights).")
    ],
    job: JobOptions,
) -> None:
    """Train a dense or a pruned model. Example: python -m sparsedm train ddpm-cifar10 out --data folder:pictures"""
    from ..training import distill
    from .common import load_or_build

    job.run(distill.train, load_or_build(model, job.seed), model=model)


@with_job
def finetune(
    teacher: Model,
    job: JobOptions,
    pattern: Pattern = "2:4",
    student: Annotated[str, typer.Option(help="A model to start from instead of the teacher: a pruned one, say.")] = "",
    decay: Annotated[
        float | None, typer.Option(min=0, max=1, help="Lambda of SR-STE and AST, 2e-4 by default; 0 is plain STE.")
    ] = None,
    estimator: Annotated[
        str, typer.Option(help="How the student's weights get zeros and gradients: sr-ste (the paper's), ast or s-ste.")
    ] = "sr-ste",
    exclude: Globs = None,
) -> None:
    """Make a sparse student of a dense teacher (SparseDM). Example: python -m sparsedm finetune glyphs-unet out --steps 2000"""
    from ..checkpoints import folders
    from ..models import students
    from ..training import distill

    source = folders.load(teacher)
    sparse = folders.load(student) if student else copy.deepcopy(source)
    if estimator not in _ESTIMATORS:
        raise ValueError(f"unknown estimator {estimator!r}; known: {', '.join(_ESTIMATORS)}")
    students.sparsify(sparse, pattern, exclude=exclude, decay=decay, **_ESTIMATORS[estimator])
    transfer = functools.partial(distill.finetune, teacher=source)
    job.run(transfer, sparse, teacher=teacher, student=student, pattern=pattern, estimator=estimator)


def sparsify(
    model: Model,
    out: Annotated[Path, typer.Argument(help="The model folder to write.")],
    pattern: Pattern = "2:4",
    method: Annotated[
        str,
        typer.Option(
            help="magnitude; or by calibration: wanda, or obs or admm (the best), which also correct the weights that stay."
        ),
    ] = "magnitude",
    data: Annotated[
        str, typer.Option(help="Calibration pictures, such as folder:PATH; without them the model samples its own.")
    ] = "",
    n: Annotated[int, typer.Option(min=1, help="Calibration inputs of the model.")] = 1024,
    exclude: Globs = None,
    packed: Annotated[bool, typer.Option("--packed", help="Write it without the zeros.")] = False,
    dtype: Half = "float16",
    device: Device = "",
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Make a model N:M in one shot, without training. Example: python -m sparsedm sparsify glyphs-unet out --method admm"""
    from ..checkpoints import folders
    from ..masking import layers
    from ..measure import reporting
    from ..measure.evaluation import Progress
    from ..models import students
    from ..training import calibrate
    from .common import on, outcome, show

    free(out)
    weights = folders.dtype_of(dtype)
    sparse, states = folders.load(model).to(on(device)), []

    def noted(state: calibrate.LayerState) -> Progress:
        states.append(state)
        return Progress("calibrate", state.layer, state.layers, state.name)

    if method == "magnitude" and not data:
        layers.fold(students.sparsify(sparse, pattern, exclude=exclude))
    else:
        run = calibrate.calibrate(sparse, data or None, pattern, method, n=n, seed=seed, exclude=exclude)
        show("sparsify", (noted(state) for state in run), json, "nothing is written")
    folders.save(sparse, out, weights, packed=packed)
    summary = reporting.report(sparse).summary()
    more = f"\n\n{calibrate.worst(states)}" if states else " Train it with finetune to get its quality back."
    result = {"model": str(out), "summary": summary, "layers": [dataclasses.asdict(state) for state in states]}
    outcome(result, json, f"{out} written: {summary}.{more}")


def prune(
    model: Model,
    out: Annotated[Path, typer.Argument(help="The model folder to write.")],
    ratio: Annotated[float, typer.Option(min=0, max=1, help="Share of the channels that go.")] = 0.3,
    score: Annotated[str, typer.Option(help="squared or absolute (Diff-Pruning), magnitude, random.")] = "squared",
    threshold: Annotated[
        float,
        typer.Option(min=0, max=1, help="Timesteps count until the loss falls below this share of its maximum."),
    ] = 0.05,
    round_to: Annotated[
        int,
        typer.Option(min=1, max=1024, help="Channels kept are rounded up to a multiple; 4 allows 2:4 afterwards."),
    ] = 4,
    data: Data = "glyphs",
    n: Annotated[int, typer.Option(min=1, help="Pictures for the scores.")] = 128,
    dtype: Half = "float16",
    device: Device = "",
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Remove channels (Diff-Pruning); go on with train. Example: python -m sparsedm prune glyphs-unet out --ratio 0.35"""
    from .. import data as data_module
    from ..checkpoints import folders
    from ..measure import macs, sizes
    from ..measure.evaluation import Progress
    from ..models import denoisers
    from ..pruning import diffpruning
    from .common import on, outcome, show

    free(out)
    weights = folders.dtype_of(dtype)
    whole = folders.load(model).to(on(device))
    diffpruning.check(whole, ratio, score, round_to)
    if score in ("squared", "absolute"):
        images, labels = data_module.stack(data_module.load(data, size=denoisers.picture_size(whole)), n)
        states = diffpruning.importance(whole, images, labels, threshold=threshold, seed=seed)
        progress = (
            Progress("importance", s.timestep + 1, s.timesteps if s.used else s.timestep + 1, f"loss {s.loss:.2f}")
            for s in states
        )
        show("", progress, json, "nothing is written")
    small = diffpruning.prune(whole, ratio, score=score, round_to=round_to, seed=seed)
    folders.save(small, out, weights)
    share = macs.count(small).dense / macs.count(whole).dense
    parameters = [sizes.parameters(each) for each in (whole, small)]
    result = {"model": str(out), "macs_share": share, "parameters_before": parameters[0], "parameters": parameters[1]}
    text = f"{out} written: {share:.0%} of the MACs, {parameters[1] / parameters[0]:.0%} of the parameters. Go on with train."
    outcome(result, json, text)


COMMANDS = (train, finetune, sparsify, prune)
