"""Words that all tabs use."""

import html
from collections.abc import Callable

import gradio as gr


def si(number: float) -> str:
    """A count with three digits and its SI prefix: 12.1 G, 80.6 M, 938 k."""
    size, unit = next((pair for pair in ((1e9, " G"), (1e6, " M"), (1e3, " k")) if number >= pair[0]), (1, ""))
    number /= size
    return f"{number:.{2 if number < 10 else 1 if number < 100 else 0}f}{unit}"


def said(error: Exception) -> gr.Error:
    """What a person is told about an order that was refused."""
    message = html.escape(f"{error}.", quote=False)
    return gr.Error(message[0].upper() + message[1:], print_exception=False)


def about(function: Callable) -> str:
    """Its docstring in one line: what the page's list of endpoints says."""
    return " ".join(function.__doc__.split())
