"""The experiments as data: a named recipe is a model, its data, its training, and the protocol that scores it.

`python -m sparsedm reproduce NAME` carries out a recipe (experiment.py).
"""

import difflib
from dataclasses import replace

from ...measure.protocol import Protocol
from . import faces, glyphs, papers
from .base import Recipe

__all__ = ["CLASSIFIERS", "LETTERS", "NAMES", "RECIPES", "Protocol", "Recipe", "protocol", "recipe", "run_name", "seeds"]

RECIPES = {**glyphs.recipes(), **faces.recipes(), **papers.recipes()}
CLASSIFIERS = ("glyph-classifier", "face-classifier")
NAMES = (*CLASSIFIERS, *RECIPES)
LETTERS = (CLASSIFIERS[0], *(name for name, known in RECIPES.items() if known.data == "glyphs" and known.suite != "paper"))


def recipe(name: str) -> Recipe:
    """The recipe called `name`. Raises ValueError with the names that are close."""
    if name not in RECIPES:
        close = ", ".join(difflib.get_close_matches(name, NAMES, n=4))
        hint = f"close: {close}" if close else "`python -m sparsedm reproduce list` shows them"
        raise ValueError(f"unknown recipe {name!r}; {hint}")
    return RECIPES[name]


def run_name(name: str, seed: int) -> str:
    """The folder and results file of one run of a recipe."""
    return f"{name}-seed{seed}" if seed else name


def seeds(name: str) -> range:
    """The seeds of all runs of a recipe."""
    return range(RECIPES[name].seeds if name in RECIPES else 1)


def protocol(name: str, n: int | None = None) -> Protocol | None:
    """The recipe's protocol, with `n` pictures if given; None if there is no such recipe."""
    own = RECIPES[name].protocol if name in RECIPES else None
    return replace(own, n=n) if own and n is not None else own
