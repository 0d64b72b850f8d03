"""The tab "Blind test": a picture by a dense model and one by its 2:4 student, in random order; which is the student's?"""

import functools
import random
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace

import gradio as gr
import torch
from scipy import stats

from .. import data, plots
from ..data import faces
from ..measure import drawing
from . import checks, race, turns
from .models import BASES, Catalogue, Variant, pairs, student
from .race import Asked, Order
from .words import said, saved

STEPS = 25
SIDES = ("left", "right")
ENOUGH = 8  # answers before the score is judged
SIZE = (480, 480)  # of a picture on the page, in pixels


@dataclass(frozen=True)
class Round:
    """What a visitor sees and has answered; the page keeps it on the server, for this visitor alone.

    Attributes:
        base: the bundled teacher.
        sparse: the side of the student's picture, which the visitor does not know.
        right: right answers so far.
        answers: all answers so far.
    """

    base: str
    sparse: str
    right: int = 0
    answers: int = 0


def deal(catalogue: Catalogue, base: str, chance: random.Random) -> tuple[Round, torch.Tensor, torch.Tensor]:
    """A new pair from the same noise: the round, and the pictures [1, C, H, W] on the left and on the right."""
    pair = catalogue.load(base), catalogue.load(student(base))
    asked, seed = _asked(pair[0], chance), chance.randrange(race.MAX_SEED)
    dense, sparse = (_drawn(variant, asked, seed) for variant in pair)
    side = chance.choice(SIDES)
    return Round(base, side), *((sparse, dense) if side == "left" else (dense, sparse))


def _asked(variant: Variant, chance: random.Random) -> Asked:
    """A random character, or a random face's description."""
    if not variant.draws_faces:
        return Asked(1, labels=torch.tensor([chance.randrange(variant.classes)]))
    pictures = data.load("faces", split="test", n=10_000)
    tokens = faces.tokens(pictures.face(chance.randrange(len(pictures))))
    return Asked(1, conditioning={faces.TEXT: tokens[None]}, negative=drawing.conditions(variant.model, 1))


def _drawn(variant: Variant, asked: Asked, seed: int) -> torch.Tensor:
    order = Order(variant, variant, asked, seed, STEPS, "ddim", 0.0)
    return deque(race.alone(order), maxlen=1)[0].images


def judged(answer: str, shown: Round) -> Round:
    """The round with one more answer. Raises ValueError for an answer that is no side."""
    checks.one_of("answer", answer, SIDES)
    return replace(shown, right=shown.right + (answer == shown.sparse), answers=shown.answers + 1)


def words(score: Round) -> str:
    """The score against chance, with its 95 % interval (Wilson), as Markdown."""
    if not score.answers:
        return "No answer yet. Guessing gives one half."
    share = score.right / score.answers
    test = stats.binomtest(score.right, score.answers)
    low, high = test.proportion_ci(method="wilson")
    text = f"**{score.right} of {score.answers} right ({share:.0%})**; guessing gives 50%. 95% interval: {low:.0%} to {high:.0%}."
    if score.answers < ENOUGH:
        return f"{text} Go on: {ENOUGH - score.answers} more answers make it count."
    if low > 0.5:
        return f"{text} You can tell them apart."
    return f"{text} So far you do not tell them apart."


def offered() -> dict[str, str]:
    """The bundled teachers that have a 2:4 student, and their titles."""
    return {name: title for name, title in BASES.items() if student(name)}


def build(catalogue: Catalogue, tab: gr.Tab, base: str, job: dict) -> None:
    """The tab; it deals the first pair when it is opened, by `base` if that is offered. `job` are the queue's options."""
    gr.HTML(
        "<p>The dense model and its 2:4 student draw the same thing from the same noise. One of the two pictures is by the "
        "student, which has half of the weights: which one? Nobody but you sees your score.</p>"
    )
    base = base if base in offered() else next(iter(pairs().values()))[0]
    model = gr.Radio([(title, name) for name, title in offered().items()], value=base, label="Model")
    kept = gr.State(None)
    with gr.Row(elem_id="blind"):
        pictures = [
            gr.Image(label=side, show_label=False, format="png", buttons=[], alt_text=f"The picture on the {side}", min_width=100)
            for side in SIDES
        ]
    with gr.Row(elem_id="blind-answers"):
        buttons = [gr.Button(f"The {side} one is 2:4", min_width=100) for side in SIDES]
    told, score = gr.Markdown(), gr.Markdown(words(Round("", "")), elem_id="blind-score")
    outputs = [kept, *pictures, told, score]
    shared = {"outputs": outputs, "api_visibility": "private", "show_progress_on": pictures, **job}
    tab.select(functools.partial(_begin, catalogue), [model, kept], **shared)
    model.input(functools.partial(_begin, catalogue, kept=None), model, **shared)
    for side, button in zip(SIDES, buttons):
        button.click(functools.partial(_answer, catalogue, side), kept, **shared)


def _begin(catalogue: Catalogue, base: str, kept: Round | None) -> Iterator[tuple]:
    """The first pair; a visitor who comes back to the tab finds the pair and the score as they were."""
    if kept is not None:
        yield tuple(gr.skip() for _ in range(5))
        return
    try:
        checks.one_of("model", base, offered())
        yield from turns.short(_page(catalogue, Round(base, ""), "") for _ in range(1))
    except (ValueError, OSError) as error:
        raise said(error) from error


def _answer(catalogue: Catalogue, side: str, kept: Round | None) -> Iterator[tuple]:
    """Judge an answer, and deal the next pair."""
    if kept is None:
        raise gr.Error("There is no pair yet: open the tab again.", print_exception=False)
    score = judged(side, kept)
    told = f"{'Right' if side == kept.sparse else 'No'}: the {kept.sparse} one was the student's. The next pair:"
    yield from turns.short(_page(catalogue, score, told) for _ in range(1))


def _page(catalogue: Catalogue, score: Round, told: str) -> tuple:
    dealt, *pair = deal(catalogue, score.base, random.SystemRandom())
    cards = (saved(plots.word_card(images, size=SIZE)) for images in pair)
    return replace(dealt, right=score.right, answers=score.answers), *cards, told, words(score)
