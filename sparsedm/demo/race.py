"""Two models draw the same thing from the same noise, step by step in turn."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .. import data, diffusion
from . import checks
from .models import Catalogue, Variant

KINDS = ("word", "classes", "anything")
MAX_PICTURES, MAX_STEPS, MAX_SEED, MAX_GUIDANCE = 12, 200, 2**31 - 1, 2.0
FREE = 8  # pictures without a word or classes


@dataclass(frozen=True)
class Order:
    """A checked order.

    Attributes:
        left: the model of the left side.
        right: the model of the right side.
        n: pictures.
        labels: classes [n]; None to draw without classes.
        spelled: whether the pictures are letters, which the classifier can read.
        seed: of the noise.
        steps: sampling steps.
        sampler: one of `diffusion.SAMPLERS`.
        guidance: scale of classifier-free guidance.
    """

    left: Variant
    right: Variant
    n: int
    labels: torch.Tensor | None
    spelled: bool
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
    if kind == "word":
        _check_length(text)
    pair = catalogue.load(left), catalogue.load(right)
    labels = _labels(kind, text, pair)
    n = FREE if labels is None else len(labels)
    return Order(*pair, n, labels, pair[0].spells and labels is not None, int(seed), int(steps), sampler, float(guidance))


def _check_length(word: str) -> None:
    letters = len(word.strip().upper())
    if letters > MAX_PICTURES:
        raise ValueError(f"the word has {letters} letters: use at most {MAX_PICTURES}")
    data.word_labels(word)


def _labels(kind: str, text: str, pair: tuple[Variant, Variant]) -> torch.Tensor | None:
    shapes = ["x".join(map(str, variant.shape)) for variant in pair]
    if shapes[0] != shapes[1] or pair[0].classes != pair[1].classes:
        kinds = " and ".join(f"{shape} ({variant.classes} classes)" for shape, variant in zip(shapes, pair, strict=True))
        raise ValueError(f"the two models draw different things, {kinds}: choose two of one kind")
    if kind == "anything":
        return None
    if kind == "word":
        if not pair[0].spells:
            raise ValueError(f"{pair[0].title} does not draw letters: ask for classes, or for anything")
        return data.word_labels(text)
    if not pair[0].classes:
        raise ValueError(f"{pair[0].title} has no classes: ask for anything")
    return _class_labels(text, pair[0].classes)


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
    noise = diffusion.start_noise(variants[0].model, order.n, order.seed)
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
    noise, seconds = diffusion.start_noise(order.left.model, order.n, order.seed), []
    for state in _sample(order.left, noise, order):
        seconds.append(state.seconds)
        yield Lane(order.left, state.sample.float().cpu(), tuple(seconds))


def _sample(variant: Variant, noise: torch.Tensor, order: Order) -> Iterator[diffusion.SampleState]:
    generator = torch.Generator().manual_seed(order.seed)  # ddpm adds noise: the same on both sides
    options = {"sampler": order.sampler, "steps": order.steps, "class_labels": order.labels, "guidance": order.guidance}
    return diffusion.sample(variant.model, noise, **options, generator=generator)
