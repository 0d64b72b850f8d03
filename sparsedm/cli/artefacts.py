"""Commands that use a model: info, generate, evaluate, export, convert."""

from pathlib import Path
from typing import Annotated

import typer

from .options import Batch, CacheInterval, Data, Device, Guidance, Json, Model, Sampler, SampleSteps, Seed, Vae, free, settings


def info(
    model: Annotated[
        str, typer.Argument(help="A bundled model's name, a model folder, or a file of one or of an official code.")
    ],
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="What an official file does not tell, as for convert: num_heads=4.")
    ] = None,
    json: Json = False,
) -> None:
    """What a model is: layers, verified patterns, MACs, bytes. Example: python -m sparsedm info glyphs-uvit-2x4"""
    from ..checkpoints import convert, folders
    from ..masking import layers
    from ..measure import reporting, sizes
    from .common import outcome

    path = Path(model)
    if path.is_file() and (path.parent / folders.CONFIG).exists():  # a file of a model folder
        model = path.parent
    if Path(model).is_file():
        loaded, size = convert.load(model, **settings(set_)), path.stat().st_size
    else:
        loaded, path, size = folders.load(model), folders.weights_of(model), folders.bytes_of(model)
    report, parameters = reporting.report(loaded), sizes.parameters(loaded)
    counts = {"dense": report.dense_macs, "sparse": report.sparse_macs}
    facts = {
        "class": type(loaded).__name__, "parameters": parameters, "file": path.name, "bytes": size,
        "pruned": bool(getattr(loaded.config, "pruning", None)), "macs": counts,
        "patterns": {name: str(pattern) for name, pattern in layers.patterns(loaded).items()},
    }  # fmt: skip
    pruned = ", pruned" if facts["pruned"] else ""
    line = f"{facts['class']}{pruned}, {parameters:,} parameters, {path.name}: {size:,} bytes"
    outcome(facts, json, f"{line}\n\n{report}")


def generate(
    model: Model,
    out: Annotated[Path, typer.Argument(help="The picture file to write.")],
    n: Annotated[int, typer.Option(min=1, help="How many pictures.")] = 16,
    word: Annotated[str, typer.Option(help="For letter models: a word to spell.")] = "",
    prompt: Annotated[str, typer.Option(help="For models of faces: what to draw, such as 'red curly hair, big smile'.")] = "",
    label: Annotated[int | None, typer.Option(help="For models with classes: the class of all pictures.")] = None,
    sampler: Sampler = "ddim",
    steps: SampleSteps = 50,
    guidance: Guidance = 0.0,
    cache_interval: CacheInterval = 1,
    batch_size: Batch = 16,
    pack: Annotated[bool, typer.Option(help="Run N:M layers on their kernels.")] = True,
    vae: Vae = "",
    device: Device = "",
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Draw pictures. Example: python -m sparsedm generate glyphs-uvit-2x4 word.png --word SPARSE"""
    from .. import diffusion, plots
    from ..checkpoints import folders
    from ..data import latents
    from ..masking import layers
    from ..measure import drawing
    from ..packing import packed
    from ..training import runlog
    from .common import on, outcome, show

    plots.check_file(out)
    loaded = folders.load(model).to(on(device))
    decoder = latents.autoencoder(vae).to(loaded.device) if vae else None
    labels = drawing.labels(loaded, n, word, label)
    n = n if labels is None else len(labels)
    options = {"sampler": sampler, "steps": steps, "guidance": guidance, "cache_interval": cache_interval}
    conditions, nothing = drawing.conditions(loaded, n, prompt), drawing.conditions(loaded, n)
    diffusion.prepare(
        loaded, class_labels=labels, conditioning=conditions, negative=nothing, **options
    )  # packing takes long, so bad options are refused before
    if pack and layers.patterns(loaded):
        packed.pack(loaded)
    states = drawing.draw(loaded, n, labels, conditions, nothing, batch_size=batch_size, seed=seed, vae=decoder, **options)
    drawn = show("", states, json, "nothing is written")
    if drawn is None:
        return
    plots.save(plots.picture(drawn.images, columns=None if word else round(n**0.5), scale=runlog.scale(drawn.images)), out)
    result = {"picture": str(out), "n": n, "ms_per_step": drawn.seconds * 1e3}
    outcome(result, json, f"{out} written: {n} pictures, {steps} steps of {drawn.seconds * 1e3:.1f} ms (median)")


def evaluate(
    model: Model,
    out: Annotated[Path, typer.Argument(help="A folder for the pictures; a stopped run goes on.")],
    data: Data = "glyphs",
    n: Annotated[int, typer.Option(min=1, help="How many pictures.")] = 10_000,
    sampler: Sampler = "ddim",
    steps: SampleSteps = 50,
    guidance: Guidance = 0.0,
    cache_interval: CacheInterval = 1,
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
    from ..checkpoints import folders
    from ..data import latents
    from ..measure import evaluation
    from ..measure.protocol import Protocol
    from ..support import files, processes
    from .common import on, outcome, show

    protocol, others = Protocol(n, sampler, steps, guidance, seed, batch_size, precision, cache_interval), None
    loaded = folders.load(model).to(on(device))
    decoder = latents.autoencoder(vae).to(loaded.device) if vae else None
    evaluation.check(n, data, inception, reference)
    evaluation.check_model(loaded, data, base, inception)
    evaluation.check_decoder(loaded, decoder)
    other = folders.load(base).to(loaded.device) if base else None
    if other:
        evaluation.check_base(loaded, other)
    with processes.claimed(out):
        options = {"dataset": data, "vae": decoder}
        own = evaluation.sample(loaded, out, protocol, **options)  # both folders are checked before anything is drawn
        compared = evaluation.sample(other, out / "base", protocol, **options) if base else None
        images = show("model", own, json)
        if compared:
            others = show("base", compared, json)
    if not processes.is_main():
        return
    scores = evaluation.score(images, evaluation.asked(loaded, data, n), data, others, inception, reference)
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
    batch: Annotated[int | None, typer.Option(min=1, help="A fixed batch size, for onnx; otherwise it is dynamic.")] = None,
    json: Json = False,
) -> None:
    """Write a model for other programs. Example: python -m sparsedm export glyphs-unet-2x4 unet.onnx --format onnx"""
    from ..checkpoints import export as exporting
    from ..checkpoints import folders
    from .common import outcome

    exporting.write(folders.load(model), out, format, dtype, batch=batch)
    outcome({"model": str(out), "format": format}, json, f"{out} written, as {format}")


def convert(
    checkpoint: Annotated[Path, typer.Argument(help="nnet_ema.pth of U-ViT, a checkpoint of the DDIM code, or a pruned folder.")],
    out: Annotated[Path, typer.Argument(help="The model folder to write.")],
    heads: Annotated[int | None, typer.Option(min=1, help="U-ViT: attention heads.")] = None,
    context_tokens: Annotated[int | None, typer.Option(min=1, help="Text-to-image U-ViT: tokens of text.")] = None,
    qk_scale: Annotated[float | None, typer.Option(help="U-ViT: scale of attention, if not 1 / sqrt(width of a head).")] = None,
    norm_eps: Annotated[
        float | None, typer.Option(help="Of the norms, if not as in the official code: 1e-5 (U-ViT) or 1e-6 (DDIM).")
    ] = None,
    sample_size: Annotated[int | None, typer.Option(min=1, help="The DDIM code's UNets: side of the pictures.")] = None,
    attention_scale: Annotated[
        str | None, typer.Option(help="Diff-Pruning's folders: dense (made with torch 1.13) or pruned (torch 2).")
    ] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="The same as NAME=VALUE, such as num_heads=4.")] = None,
    json: Json = False,
) -> None:
    """Make a model folder of an official checkpoint. Example: python -m sparsedm convert nnet_ema.pth uvit --heads 4"""
    from ..checkpoints import convert as converting
    from ..checkpoints import folders
    from ..measure import sizes
    from .common import outcome

    free(out)
    given = {
        "num_heads": heads, "context_tokens": context_tokens, "qk_scale": qk_scale, "norm_eps": norm_eps,
        "sample_size": sample_size, "attention_scale": attention_scale,
    }  # fmt: skip
    options = settings(set_) | {name: value for name, value in given.items() if value is not None}
    model = converting.load(checkpoint, **options)
    folders.save(model, out)
    parameters = sizes.parameters(model)
    result = {"model": str(out), "class": type(model).__name__, "parameters": parameters}
    outcome(result, json, f"{out} written: {result['class']}, {parameters:,} parameters")


COMMANDS = (info, generate, evaluate, export, convert)
