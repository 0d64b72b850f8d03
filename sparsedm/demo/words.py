"""Words and files that all tabs use."""

import hashlib
import html
import io
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import gradio as gr
from gradio.utils import get_upload_folder
from PIL import Image


def si(number: float) -> str:
    """A count with three digits and its SI prefix: 12.1 G, 80.6 M, 938 k."""
    size, unit = next((pair for pair in ((1e9, " G"), (1e6, " M"), (1e3, " k")) if number >= pair[0]), (1, ""))
    number /= size
    return f"{number:.{2 if number < 10 else 1 if number < 100 else 0}f}{unit}"


def said(error: Exception) -> gr.Error:
    """The message for a person whose order was refused."""
    message = html.escape(f"{error}.", quote=False)
    return gr.Error(message[0].upper() + message[1:], print_exception=False)


def about(function: Callable) -> str:
    """The function's docstring in one line, for the page's list of endpoints."""
    return " ".join(function.__doc__.split())


def saved(picture: Image.Image) -> str:
    """The path of a PNG file in Gradio's cache, named by its content and whole at any time: another visitor may load the file."""
    stream = io.BytesIO()
    picture.save(stream, "png")
    path = Path(get_upload_folder(), hashlib.sha256(stream.getvalue()).hexdigest(), "image.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        path.touch()  # Gradio removes old files
        return str(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(handle, "wb") as file:
        file.write(stream.getvalue())
    os.replace(temporary, path)
    return str(path)
