"""Commands for the experiments: reproduce, compare, bench."""

import functools
import json as json_module
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated

import typer

from ..support import files
from ..support.fields import SEEDS
from .options import Device, Json, Set, numbers, settings, words


def reproduce(
    name: Annotated[
        str, typer.Argument(help="A recipe, such as glyphs-uvit-2x4, or several: 'glyphs-unet-short-*'; 'list' shows them all.")
    ] = "",
    all: Annotated[
        bool, typer.Option("--all", help="All on the letter models, with all seeds; what is finished is not repeated.")
    ] = False,
    out: Annotated[
        Path, typer.Option(help="Folder for checkpoints, pictures and results; a stopped run goes on from it.")
    ] = Path("runs"),
    n: Annotated[int | None, typer.Option(min=1, help="Pictures to score instead of the recipe's number.")] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, max=SEEDS, help="Of training and pictures; by default all of the recipe's, in turn.")
    ] = None,
    bundle: Annotated[bool, typer.Option(help="Copy model, card and results into the package.")] = False,
    set_: Set = None,
    inception: Annotated[str | None, typer.Option(help="Inception's weights, for FID on sets other than the glyphs.")] = None,
    vae: Annotated[str | None, typer.Option(help="Folder of the autoencoder, for latent models.")] = None,
    reference: Annotated[str, typer.Option(help="Data set for FID instead of the training set, such as folder:PATH.")] = "",
    device: Device = "",
    json: Json = False,
) -> None:
    """Train, save and score experiments. Example: python -m sparsedm reproduce glyphs-uvit-2x4"""
    from ..experiments import experiment, recipes
    from ..experiments.results import RESULTS_FILE
    from ..training.checkpoint import TrainConfig
    from .common import on, outcome, show

    if name == "list":
        titles = {recipe: f"{known.suite}: {known.title}" for recipe, known in recipes.RECIPES.items()}
        titles = dict(zip(recipes.CLASSIFIERS, ("scores the letters", "scores the faces"))) | titles
        outcome(titles, json, "\n".join(f"{recipe:36} {title}" for recipe, title in titles.items()))
        return
    if bool(name) == all:
        raise ValueError("name a recipe (reproduce list shows them), or ask for --all")
    pool = recipes.LETTERS if all else recipes.NAMES
    chosen = [recipe for recipe in pool if all or fnmatchcase(recipe, name)] or [name]
    runs = [(number, recipe) for recipe in chosen for number in (recipes.seeds(recipe) if seed is None else (seed,))]
    results, options = {}, settings(set_)
    if "seed" in options:
        raise ValueError("--set takes no seed here; use --seed")
    TrainConfig.of({"steps": 1, **options})
    on(device)
    for number, recipe in sorted(runs, key=lambda run: run[0]):
        run, protocol = recipes.run_name(recipe, number), recipes.protocol(recipe, n)
        states = experiment.reproduce(recipe, out, protocol, bundle, number, inception, vae, reference, **options)
        results[run] = show(run, states, json)
    outcome(results, json, "\n".join(f"results in {out / run / RESULTS_FILE}" for run in results))


def compare(
    what: Annotated[
        str, typer.Option(help="summary, headline, one-shot, rivals, claims, a teacher's name (its students), or all.")
    ] = "all",
    figures: Annotated[Path | None, typer.Option(help="Also draw the figures into this folder.")] = None,
    runs: Annotated[
        Path, typer.Option(help="Folder that reproduce wrote, for the figure of pictures from the same noise.")
    ] = Path("runs"),
    json: Json = False,
) -> None:
    """Print the stored results as tables and draw them. Example: python -m sparsedm compare --figures figures"""
    from ..experiments import claims, results, rivals
    from .common import outcome

    tables = {"summary": results.summary_table, "headline": results.headline_table, "one-shot": results.one_shot_table}
    tables |= {"rivals": rivals.table, "claims": claims.table, "faces": results.faces_table}
    tables |= {base: functools.partial(results.short_table, base) for base in results.bases()}
    tables |= {base: functools.partial(results.paper_table, base) for base in results.paper_bases()}
    if what not in ("all", *tables):
        raise ValueError(f"unknown table {what!r}; known: all, {', '.join(tables)}")
    chosen = [name for name in tables if what in ("all", name)]
    if json:
        outcome({name: _verdicts() if name == "claims" else _runs(name) for name in chosen}, json, "")
    else:
        print("\n\n".join(tables[name]() for name in chosen))
    if figures:
        from ..experiments.figures import draw

        for base in results.bases():
            for path in draw(base, figures, runs if runs.is_dir() else None):
                if not json:
                    print(path)


def _runs(table: str) -> list[dict]:
    """The stored runs of a suite, or of one teacher and its students in the short suite or the papers' size."""
    from ..experiments import results

    suite = "short" if table in results.bases() else "paper"
    whole = {"summary": "headline", "headline": "headline", "one-shot": "one-shot", "rivals": "rivals", "faces": "faces"}
    rows = results.load(whole[table]) if table in whole else results.load(suite, table)
    return [run for row in rows for run in row.runs]


def _verdicts() -> dict[str, list[dict]]:
    """The verdicts on all claims, by teacher."""
    from ..experiments import claims, results

    judged = {base: zip(claims.CLAIMS, claims.verdicts(base)) for base in results.bases()}
    return {
        base: [{"paper": paper, "claim": claim, "verdict": v.word, "figures": v.figures} for (paper, claim, _), v in pairs]
        for base, pairs in judged.items()
    }


def bench(
    what: Annotated[
        str,
        typer.Option(
            help="step (a sampling step, dense against packed), layers (single ones), methods (models made by recipes, against"
            " their teacher), rivals (with DeepCache), shares (where a packed step's time goes), large (models of real sizes), or"
            " train-step."
        ),
    ] = "step",
    models: Annotated[
        str,
        typer.Option(
            help="For step and shares: bundled models, model folders or the papers' configurations; by default the letters'"
            " models. For large: names such as sd15-512,dit-256; by default all."
        ),
    ] = "",
    batches: Annotated[str, typer.Option(help="For step: pictures at a time.")] = "1,4,16",
    dtypes: Annotated[
        str,
        typer.Option(help="For all but train-step: float32, bfloat16, float16; float32 by default, bfloat16 on GPUs."),
    ] = "",
    threads: Annotated[
        str, typer.Option(help="Numbers of threads; one and all by default (all for methods, shares, large).")
    ] = "",
    device: Annotated[
        str, typer.Option(help="For step, layers and methods: cpu, cuda, cuda:1; the others measure the CPU.")
    ] = "cpu",
    compile: Annotated[bool, typer.Option(help="For step: torch.compile both sides, too.")] = True,
    runs: Annotated[Path, typer.Option(help="For methods: the folder that reproduce wrote.")] = Path("runs"),
    output: Annotated[Path | None, typer.Option(help="Write the numbers to this JSON file, and draw them beside it.")] = None,
    json: Json = False,
) -> None:
    """Measure this machine: what packing gains, what masks cost. Example: python -m sparsedm bench --what layers"""
    counts, sizes = numbers("--threads", threads) if threads else [], numbers("--batches", batches)
    kinds = words("--dtypes", dtypes, ("float32", "bfloat16", "float16")) if dtypes else []
    if output and output.suffix == ".png":
        raise ValueError(f"{output} is where the figure would be drawn; name a JSON file")
    if output:
        files.check_writable(output)

    from ..experiments import bench as benches
    from .common import on, outcome

    place = on(device)
    chosen = benches.benchmark(what, place)
    if output and chosen.drawn:
        files.check_writable(output.with_suffix(".png"))
    kinds = kinds or ["float32" if place.type == "cpu" else "bfloat16"]
    options = benches.Options(models.split(",") if models else (), sizes, kinds, counts, place, compile, runs)
    result = benches.run(chosen, options, (lambda line: None) if json else functools.partial(print, flush=True))
    text = json_module.dumps(result, indent=1)
    if json or not chosen.line:
        outcome(result, json, text)
    if output:
        with files.replacing(output) as temporary:
            temporary.write_text(text + "\n")
        if chosen.drawn:
            from .. import plots

            plots.speed(result).savefig(output.with_suffix(".png"), dpi=150)


COMMANDS = (reproduce, compare, bench)
