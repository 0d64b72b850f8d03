"""What the page draws: faces from a description, or letters that spell a word. A switch changes the line and both models."""

from dataclasses import dataclass

import gradio as gr

from . import checks, race
from .models import FACES, LETTERS, Catalogue, pairs


@dataclass(frozen=True)
class Subject:
    """How the page asks for one kind of picture.

    Attributes:
        title: the name that people read.
        label: of the line to type.
        info: what the line takes; "" for faces, whose chips show this.
        text: what the line holds at first.
        card: width and height of the picture with all of them, in pixels.
        examples: lines, each with the models on the left and on the right, or without for the first two models.
    """

    title: str
    label: str
    info: str
    text: str
    card: tuple[int, int]
    examples: tuple[tuple[str, ...], ...]


SUBJECTS = {
    FACES: Subject(
        "Faces",
        "Words",
        "",
        "sunglasses, big smile",
        (1200, 804),
        (
            ("blue hair, round glasses, surprised",),
            ("bald, beard, wink",),
            ("red curly hair, big smile", "faces-unet", "faces-unet@2:4"),
            ("party hat, smile, on pink", "faces-unet", "faces-unet@3:4"),
        ),
    ),
    LETTERS: Subject(
        "Letters",
        "Word",
        f"A-Z, 0-9, at most {race.MAX_PICTURES}",
        "SPARSE",
        (1200, 280),
        (
            ("SPARSE", "glyphs-uvit", "glyphs-uvit-2x4"),
            ("PRUNED", "glyphs-unet", "glyphs-unet-diffpruned"),
            ("24OF4", "glyphs-uvit-2x4", "glyphs-uvit@2:4"),
            ("DIFFUSION", "glyphs-uvit-2x4", "glyphs-unet-2x4"),
        ),
    ),
}


def of(catalogue: Catalogue, key: str) -> str:
    """The subject of a model; letters stand for everything but faces."""
    return catalogue.entries[key].data or (FACES if catalogue.load(key).draws_faces else LETTERS)


def offered(catalogue: Catalogue, left: str, right: str) -> dict[str, tuple[str, str]]:
    """Every subject that the page offers, and its first two models: the given ones, and bundled ones for the other subject."""
    found = {**pairs(), of(catalogue, left): (left, right)}
    return {subject: found[subject] for subject in SUBJECTS if subject in found}


def switched(catalogue: Catalogue, offered: dict[str, tuple[str, str]], subject: str) -> tuple:
    """The line and the lists of both models for another subject. Raises ValueError for one that is not offered."""
    checks.one_of("subject", subject, offered)
    known, choices = SUBJECTS[subject], catalogue.choices(data=subject)
    line = gr.Textbox(known.text, label=known.label, info=known.info or None)
    return line, *(gr.Dropdown(choices, value=key) for key in offered[subject])
