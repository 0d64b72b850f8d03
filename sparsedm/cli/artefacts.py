"""Commands that look at a model or carry it on: info, generate, evaluate, export."""

from pathlib import Path
from typing import Annotated

import typer

from ..checkpoints import folders
from .common import Data, Device, Json, Model, Seed, Vae, autoencoder, bars, free, on, outcome, settings, show

Sampler = Annotated[str, typer.Option(help="ddim, ddpm or dpm++.")]
SampleSteps = Annotated[int, typer.Option(help="Sampling steps.")]
Batch = Annotated[int, typer.Option(min=1, help="Pictures drawn at a time.")]
Guidance = Annotated[float, typer.Option(help="Classifier-free guidance; 0 is none.")]


def info(
    model: Annotated[
        str, typer.Argument(help="A bundled model's name, a model folder, or a file of one or of an official code.")
    ],
    json: Json = False,
) -> None:
    """What a model is: layers, verified patterns, MACs, bytes. Example: python -m sparsedm info glyphs-uvit-2x4"""
    from ..checkpoints import convert
    from ..masking import layers
    from ..measure import reporting

    path = Path(model)
    if path.is_file() and (path.parent / folders.CONFIG).exists():  # a file of a model folder
        model = path.parent
    if Path(model).is_file():
        loaded, size = convert.load(model), path.stat().st_size
    else:
        loaded, path, size = folders.load(model), folders.weights_of(model), folders.bytes_of(model)
    report, parameters = reporting.report(loaded), sum(p.numel() for p in loaded.parameters())
    counts = {"dense": report.dense_macs, "sparse": report.sparse_macs}
    found = {
        "class": type(loaded).__name__, "parameters": parameters, "file": path.name, "bytes": size,
        "pruned": bool(getattr(loaded.config, "pruning", None)), "macs": counts,
        "patterns": {name: str(pattern) for name, pattern in layers.patterns(loaded).items()},
    }  # fmt: skip
    pruned = ", pruned" if found["pruned"] else ""
    line = f"{found['class']}{pruned}, {parameters:,} parameters, {path.name}: {size:,} bytes"
    outcome(found, json, f"{line}\n\n{report}")


def generate(
    model: Model,
    out: Annotated[Path, typer.Argument(help="The picture file to write.")],
    n: Annotated[int, typer.Option(min=1, help="How many pictures.")] = 16,
    word: Annotated[str, typer.Option(help="For letter models: a word to spell.")] = "",
    label: Annotated[int | None, typer.Option(help="For models with classes: the class of all pictures.")] = None,
    sampler: Sampler = "ddim",
    steps: SampleSteps = 50,
    guidance: Guidance = 0.0,
    batch_size: Batch = 16,
    pack: Annotated[bool, typer.Option(help="Run N:M layers on their kernels.")] = True,
    vae: Vae = "",
    device: Device = "",
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Draw pictures. Example: python -m sparsedm generate glyphs-uvit-2x4 word.png --word SPARSE"""
    import statistics

    import torch

    from .. import data, diffusion, plots
    from ..data import latents
    from ..masking import layers
    from ..measure import evaluation
    from ..models import denoisers
    from ..packing import packed
    from ..support import processes
    from ..training import runlog

    loaded = folders.load(model).to(on(device))
    decoder = autoencoder(vae, loaded.device)
    evaluation.check_decoder(loaded, decoder)
    if pack and layers.patterns(loaded):
        packed.pack(loaded)
    null = denoisers.null_label(loaded)
    labels = data.word_labels(word) if word else None
    n = n if labels is None else len(labels)
    if labels is None and null is not None:
        labels = torch.arange(n) % null if label is None else torch.full((n,), label)
    starts, seconds, made = processes.share(range(0, n, batch_size)), [], {}
    options = {"sampler": sampler, "steps": steps, "guidance": guidance}
    with bars(json) as bar:
        task = bar.add_task("sample", total=steps * len(starts), note="")
        for first in starts:
            count = min(batch_size, n - first)
            options["generator"] = diffusion.step_generators(count, seed, first)
            options["class_labels"] = None if labels is None else labels[first : first + count]
            for state in diffusion.sample(loaded, diffusion.start_noise(loaded, count, seed, first), **options):
                seconds.append(state.seconds)
                bar.update(task, advance=1, note=f"{state.seconds * 1e3:.0f} ms")
            made[first] = (latents.decode(decoder, state.sample) if decoder else state.sample).cpu()
    made = processes.collect(made)
    if not processes.is_main():
        return
    images = torch.cat([*made.values()])
    plots.save(plots.picture(images, columns=None if word else round(n**0.5), scale=runlog.scale(images)), out)
    median = statistics.median(seconds) * 1e3
    found = {"picture": str(out), "n": n, "ms_per_step": median}
    outcome(found, json, f"{out} written: {n} pictures, {steps} steps of {median:.1f} ms (median)")


def evaluate(
    model: Model,
    out: Annotated[Path, typer.Argument(help="A folder for the pictures; a stopped run goes on.")],
    data: Data = "glyphs",
    n: Annotated[int, typer.Option(min=1, help="How many pictures.")] = 10_000,
    sampler: Sampler = "ddim",
    steps: SampleSteps = 50,
    guidance: Guidance = 0.0,
    batch_size: Batch = 250,
    precision: Annotated[str, typer.Option(help="bf16 (autocast) or fp32.")] = "fp32",
    base: Annotated[str, typer.Option(help="A model to compare with, picture by picture, from the same noise (SSIM).")] = "",
    inception: Annotated[str | None, typer.Option(help="Inception's weights, for FID on sets other than the glyphs.")] = None,
    reference: Annotated[str, typer.Option(help="Data set for FID instead of DATA, such as folder:PATH.")] = "",
    vae: Vae = "",
    device: Device = "",
    seed: Seed = 1234,
    json: Json = False,
) -> None:
    """Score a model's pictures. Example: python -m sparsedm evaluate glyphs-uvit-2x4 scores --n 2048 --base glyphs-uvit"""
    from ..experiments.recipes import Protocol
    from ..measure import evaluation
    from ..support import files, processes

    protocol, others = Protocol(n, sampler, steps, guidance, seed, batch_size, precision), None
    loaded = folders.load(model).to(on(device))
    decoder = autoencoder(vae, loaded.device)
    evaluation.check(n, data, inception)
    evaluation.check_model(loaded, data, base, inception)
    evaluation.check_decoder(loaded, decoder)
    other = folders.load(base).to(loaded.device) if base else None
    with processes.claimed(out):
        told = {"dataset": data, "vae": decoder}
        own = evaluation.sample(loaded, out, protocol, **told)  # both folders are checked before anything is drawn
        compared = evaluation.sample(other, out / "base", protocol, **told) if base else None
        images = show("model", own, json)
        if compared:
            others = show("base", compared, json)
    if not processes.is_main():
        return
    scores = evaluation.score(images, evaluation.labels(loaded, n), data, others, inception, reference)
    files.write_json(out / "scores.json", scores)
    outcome(scores, json, "\n".join(f"{name:14} {value:.4g}" for name, value in scores.items()))


def export(
    model: Model,
    out: Annotated[Path, typer.Argument(help="The folder to write, for onnx the file; an earlier one is replaced.")],
    format: Annotated[
        str, typer.Option(help="diffusers (a folder with the zeros in place), packed (a folder without them) or onnx.")
    ] = "diffusers",
    dtype: Annotated[
        str | None, typer.Option(help="float32, float16 or bfloat16 (folders only); packed: float16, else float32.")
    ] = None,
    batch: Annotated[int | None, typer.Option(help="A fixed batch size, for onnx; otherwise it is dynamic.")] = None,
    json: Json = False,
) -> None:
    """Write a model for other programs. Example: python -m sparsedm export glyphs-unet-2x4 unet.onnx --format onnx"""
    from ..checkpoints import export as exporting

    exporting.write(folders.load(model), out, format, dtype, batch=batch)
    outcome({"model": str(out), "format": format}, json, f"{out} written, as {format}")


def convert(
    checkpoint: Annotated[Path, typer.Argument(help="nnet_ema.pth of U-ViT, a checkpoint of the DDIM code, or a pruned folder.")],
    out: Annotated[Path, typer.Argument(help="The model folder to write.")],
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="What the file does not tell: num_heads, context_tokens, sample_size or attention_scale=VALUE."
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Make a model folder of an official checkpoint. Example: python -m sparsedm convert nnet_ema.pth uvit"""
    from ..checkpoints import convert as converting

    free(out)
    model = converting.load(checkpoint, **settings(set_))
    folders.save(model, out)
    parameters = sum(p.numel() for p in model.parameters())
    found = {"model": str(out), "class": type(model).__name__, "parameters": parameters}
    outcome(found, json, f"{out} written: {found['class']}, {parameters:,} parameters")


COMMANDS = (info, generate, evaluate, export, convert)
