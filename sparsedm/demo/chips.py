"""The chips under the line for faces: a click puts a word into the line, takes it out, or puts it in another one's place."""

import html

import gradio as gr
from gradio.events import Dependency

from ..data import faces, portraits, prompts
from .words import said

HINT = "Click words or type them. What is left open is drawn at random."
# Clicks on a chip become Gradio's event "select" with the chip's word.
ON_LOAD = """
element.addEventListener('click', event => {
  const chip = event.target.closest('[data-word]');
  if (chip) trigger('select', {index: 0, value: chip.dataset.word});
});
"""


def show(text: str) -> str:
    """The chips as HTML, with those of the `text` pressed; then a hint, or what is wrong with the text."""
    try:
        face, hint = prompts.parse(text), HINT
    except ValueError as error:
        face, hint = {}, f"{error}."
    groups = "".join(_group(name, face.get(name)) for name in faces.ATTRIBUTES)
    return f"<div class='chips'><div>{groups}</div><p class='hint'>{html.escape(hint)}</p></div>"


def _group(attribute: str, chosen: int | None) -> str:
    chips = (_chip(attribute, value, value == chosen) for value in range(len(faces.ATTRIBUTES[attribute])))
    return f"<div role='group' aria-label='{attribute}'><span>{attribute}</span>{''.join(chips)}</div>"


def _chip(attribute: str, value: int, pressed: bool) -> str:
    word = faces.ATTRIBUTES[attribute][value]
    colours = portraits.COLOURS.get(attribute)
    look, text = "", "none" if word == f"no {attribute}" else word.removesuffix(f" {attribute}")
    if colours:
        look, text = f" class='swatch' style='--swatch: rgb{colours[value]}'", ""
    state = f"aria-pressed='{str(pressed).lower()}' aria-label='{word}' title='{word}' data-word='{word}'"
    return f"<button type='button'{look} {state}>{text}</button>"


def picked(text: str, event: gr.SelectData) -> str:
    """The line after a click on a chip."""
    try:
        return prompts.toggled(text, event.value)
    except ValueError as error:
        raise said(error) from error


def build(line: gr.Textbox) -> Dependency:
    """The chips of a line; returns the event of a click on one of them, after which the line is as the click wants it."""
    chips = gr.HTML(show(line.value), js_on_load=ON_LOAD, label="Words for faces", elem_id="chips", elem_classes=["for-faces"])
    private = {"queue": False, "api_visibility": "private", "show_progress": "hidden", "preprocess": False}
    line.change(show, line, chips, trigger_mode="always_last", **private)
    return chips.select(picked, line, line, **private)
