"""Two models draw the same thing from the same noise, step by step in turn."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from .. import data, diffusion
from ..data import faces, prompts
from ..measure import drawing, judges
from ..measure.judges import Judge
from ..models.denoisers import Inputs
from . import checks
from .models import Catalogue, Variant

KINDS = ("word", "classes", "anything")
MAX_PICTURES, MAX_STEPS, MAX_SEED, MAX_GUIDANCE = 12, 200, 2**31 - 1, 2.0
FREE = 8  # pictures without a word or classes
FACES = 6  # pictures of one description


@dataclass(frozen=True)
class Asked:
    """What both models are to draw.

    Attributes:
        n: pictures.
        labels: classes [n]; None to draw without classes.
        conditioning: other arguments of the models [n, ...]; None for none.
        negative: those of the unconditional half of guidance.
        judge: the classifier that reads such pictures; None if there is none.
        expected: what the classifier should read, as `Judge.share_read` takes it.
    """

    n: int
    labels: torch.Tensor | None = None
    conditioning: Inputs | None = None
    negative: Inputs | None = None
    judge: Judge | None = None
    expected: torch.Tensor | None = None


@dataclass(frozen=True)
class Order:
    """A checked order.

    Attributes:
        left: the model of the left side.
        right: the model of the right side.
        asked: what both are to draw.
        seed: of the noise.
        steps: sampling steps.
        sampler: one of `diffusion.SAMPLERS`.
        guidance: scale of classifier-free guidance.
    """

    left: Variant
    right: Variant
    asked: Asked
    seed: int
    steps: int
    sampler: str
    guidance: float


@dataclass(frozen=True)
class Lane:
    """One side after some steps.

    Attributes:
        variant: the model.
        images: pictures [n, C, H, W].
        seconds: time of every step so far.
    """

    variant: Variant
    images: torch.Tensor
    seconds: tuple[float, ...]


def check(catalogue: Catalogue, text, left, right, seed, steps, sampler, guidance, kind="word") -> Order:
    """The checked order. Raises ValueError, with the mistake and the remedy, for an order that cannot be carried out."""
    checks.one_of("kind of order", kind, KINDS)
    if not isinstance(text, str):
        raise ValueError(f"the {'word is' if kind == 'word' else 'classes are'} missing: type at most {MAX_PICTURES}")
    for side, key in (("left", left), ("right", right)):
        checks.one_of(f"{side} model", key, catalogue.entries)
    checks.one_of("sampler", sampler, diffusion.SAMPLERS)
    checks.within("seed", seed, 0, MAX_SEED, whole=True)
    checks.within("number of steps", steps, 1, MAX_STEPS, whole=True)
    checks.within("guidance", guidance, 0, MAX_GUIDANCE)
    pair = catalogue.load(left), catalogue.load(right)
    _check_alike(*pair)
    return Order(*pair, _asked(kind, text, pair[0], int(seed)), int(seed), int(steps), sampler, float(guidance))


def _check_alike(left: Variant, right: Variant) -> None:
    if (left.shape, left.classes, left.draws_faces) != (right.shape, right.classes, right.draws_faces):
        kinds = " and ".join(f"{'x'.join(map(str, side.shape))} ({side.classes} classes)" for side in (left, right))
        raise ValueError(f"the two models draw different things, {kinds}: choose two of one kind")


def _asked(kind: str, text: str, variant: Variant, seed: int) -> Asked:
    if variant.draws_faces and kind != "classes":
        return _faces(text if kind == "word" else "", variant, seed)
    if kind == "anything":
        return Asked(FREE)
    if kind == "word":
        if not variant.spells:
            raise ValueError(f"{variant.title} does not draw letters: ask for classes, or for anything")
        labels = _word_labels(text)
    elif variant.classes:
        labels = _class_labels(text, variant.classes)
    else:
        raise ValueError(f"{variant.title} has no classes: ask for anything")
    judge = judges.GLYPHS if variant.spells else None
    return Asked(len(labels), labels, judge=judge, expected=labels if judge else None)


def _faces(text: str, variant: Variant, seed: int) -> Asked:
    """Faces with what the text names, each with other values for what the text leaves open."""
    named, rng = prompts.parse(text), np.random.default_rng(seed)
    given = torch.stack([faces.tokens(faces.completed(named, rng)) for _ in range(FACES)])
    readable = {"judge": judges.FACES, "expected": faces.row(named).expand(FACES, -1)} if named else {}
    return Asked(FACES, conditioning={faces.TEXT: given}, negative=drawing.conditions(variant.model, FACES), **readable)


def _word_labels(word: str) -> torch.Tensor:
    letters = len(word.strip().upper())
    if letters > MAX_PICTURES:
        raise ValueError(f"the word has {letters} letters: use at most {MAX_PICTURES}")
    return data.word_labels(word)


def _class_labels(text: str, classes: int) -> torch.Tensor:
    """Class numbers parted by commas or spaces."""
    numbers = text.replace(",", " ").split()
    wrong = next((number for number in numbers if not (number.isdecimal() and int(number) < classes)), None)
    if wrong is not None or not 1 <= len(numbers) <= MAX_PICTURES:
        problem = f"{wrong[:40]!r} is no class" if wrong is not None else f"there are {len(numbers)} classes"
        raise ValueError(f"{problem}: give 1 to {MAX_PICTURES} numbers from 0 to {classes - 1}")
    return torch.tensor([int(number) for number in numbers])


def race(order: Order) -> Iterator[tuple[Lane, Lane]]:
    """Both models from the same noise, yielding (left, right) after every step of both; the first of the two alternates."""
    variants = order.left, order.right
    noise = diffusion.start_noise(variants[0].model, order.asked.n, order.seed)
    for variant in variants:
        next(_sample(variant, noise, order))  # the first call is slower than the others
    runs = [_sample(variant, noise, order) for variant in variants]
    seconds = [], []
    for step in range(1, order.steps + 1):
        states = [None, None]
        for side in (0, 1) if step % 2 else (1, 0):
            states[side] = next(runs[side])
            seconds[side].append(states[side].seconds)
        images = [state.sample if step == order.steps else state.x0 for state in states]
        yield tuple(Lane(v, x.float().cpu(), tuple(s)) for v, x, s in zip(variants, images, seconds, strict=True))


def alone(order: Order) -> Iterator[Lane]:
    """The order's left model by itself, after every step."""
    noise, seconds = diffusion.start_noise(order.left.model, order.asked.n, order.seed), []
    for state in _sample(order.left, noise, order):
        seconds.append(state.seconds)
        yield Lane(order.left, state.sample.float().cpu(), tuple(seconds))


def _sample(variant: Variant, noise: torch.Tensor, order: Order) -> Iterator[diffusion.SampleState]:
    generator = torch.Generator().manual_seed(order.seed)  # ddpm adds noise: the same on both sides
    options = {"sampler": order.sampler, "steps": order.steps, "guidance": order.guidance, "generator": generator}
    asked = {"class_labels": order.asked.labels, "conditioning": order.asked.conditioning, "negative": order.asked.negative}
    return diffusion.sample(variant.model, noise, **options, **asked)
