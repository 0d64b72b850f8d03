"""What the experiments found: the results that ship with the package, as tables and model cards."""

import json

from .models import zoo
from .recipes import RECIPES, Protocol, recipe

RESULTS = zoo.ASSETS / "results"


def results() -> dict[str, dict]:
    """The stored results of the recipes, by name, in the order of `RECIPES`."""
    return {
        name: json.loads(path.read_text())
        for name in RECIPES
        if RECIPES[name].protocol == Protocol() and (path := RESULTS / f"{name}.json").exists()
    }


def table() -> str:
    """The stored results as a Markdown table; every row is scored under one protocol, named in the line below it.

    Raises:
        ValueError: results of different protocols, which must not stand in one table.
    """
    found = results()
    protocols = {json.dumps(result["protocol"], sort_keys=True) for result in found.values()}
    if len(protocols) != 1:
        raise ValueError(f"{len(protocols)} protocols among the results in {RESULTS}; score them all under one")
    head = (
        "| model | FD-glyph \u2193 | readability \u2191 | SSIM to teacher \u2191 | M MACs | nonzero weights | training pictures |"
    )
    lines = [head, "|---|---|---|---|---|---|---|", *map(_row, found.values()), "", _caption(next(iter(found.values())))]
    return "\n".join(lines)


def _row(result: dict) -> str:
    scores, images = result["scores"], result["train_images"]
    cells = (
        recipe(result["name"]).title,
        f"{scores['fd_glyph']:.2f}",
        f"{scores['readability']:.1%}",
        f"{scores['ssim_to_base']:.3f}" if result["base"] else "",
        f"{result['macs']['sparse'] / 1e6:.1f}",
        f"{result['nonzero_parameters'] / 1e6:.2f} M",
        f"{'+ ' if result['base'] and images else ''}{images // 1000} k" if images else "none",
    )
    return f"| {' | '.join(cells)} |"


def _caption(result: dict) -> str:
    protocol = result["protocol"]
    return (
        f"n = {protocol['n']:,} pictures a row, {protocol['sampler'].upper()} with {protocol['steps']} steps,"
        f" guidance {protocol['guidance']:g}, {protocol['precision']}, against as many test glyphs. MACs: per picture and step,"
        " zeros skipped. FD-glyph is the Fr\u00e9chet distance on the glyph classifier's features; it is not FID."
    )


def card(name: str, result: dict) -> str:
    """The model card (Markdown) of a bundled checkpoint."""
    chosen, scores, train = recipe(name), result["scores"], result["train"]
    how = f"Fine-tuned from `{chosen.base}`" if chosen.base else "Trained from random weights"
    how += f" on `{chosen.data}` for {train['steps']:,} steps of {train['batch_size']}"
    if chosen.distil:
        how += ", masks by SR-STE, knowledge transferred from the dense teacher (SparseDM, arXiv 2404.10445)"
    lines = [
        f"# {name}", "", f"{chosen.title}. {how}. Made by `{result['command']}`.", "",
        f"- Weights: float16, {result['parameters']:,} parameters, {result['nonzero_parameters']:,} of them not zero.",
        f"- MACs per picture and step: {result['macs']['dense']:,} dense, {result['macs']['sparse']:,} with zeros skipped.", "",
        "| score | value |", "|---|---|", *(f"| {k} | {v:.4g} |" for k, v in scores.items() if k != "n"), "",
        _caption(result), "",
        "Licence: MIT, as the package. It draws characters like those of the fonts that matplotlib ships.", "",
    ]  # fmt: skip
    return "\n".join(lines)
