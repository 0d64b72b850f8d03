"""The tab "Speed here": dense against packed on the machine that serves the page."""

import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import gradio as gr

from .. import plots
from ..measure import speed
from . import checks, turns
from .models import BASES
from .words import about, said

BATCHES, DTYPES = (1, 4, 16), ("float32", "bfloat16")
ROUNDS = 9


def rows(base: str, batches: list[int], dtype: str, layers: bool) -> Iterator[dict]:
    """Measured rows, of whole steps first; eager only, because compiling takes minutes."""
    yield from speed.measure_steps([base], sorted(batches), [dtype], [speed.machine()["threads"]], compiled=False, rounds=ROUNDS)
    if layers:
        yield from speed.measure_layers([dtype], [speed.machine()["threads"]], rounds=ROUNDS)


def benchmark(base, batches, dtype, layers) -> Iterator[tuple]:
    """Time sampling steps of a bundled model, dense against packed, and single layers: interleaved runs in one process.

    Streams the lines so far; the last result has the figure, the table and the file with all numbers.
    """
    try:
        yield from turns.long(_pages(base, batches, dtype, layers))
    except (ValueError, OSError) as error:
        raise said(error) from error


def _pages(base, batches, dtype, layers) -> Iterator[tuple]:
    checks.one_of("model", base, BASES)
    checks.one_of("dtype", dtype, DTYPES)
    if not isinstance(batches, list) or not batches or any(batch not in BATCHES for batch in batches):
        raise ValueError(f"choose at least one batch size of {', '.join(map(str, BATCHES))}")
    total = len(set(batches)) + (len(speed.LINEAR) + len(speed.CONVOLUTION) if layers else 0)
    result, started = {**speed.machine(), "rows": []}, time.monotonic()
    yield _progress(0, total, started), None, "", None
    for row in rows(base, list(set(batches)), dtype, bool(layers)):
        result["rows"].append(row)
        yield _progress(len(result["rows"]), total, started), plots.speed(result), speed.words(result), None
    with tempfile.TemporaryDirectory() as folder:  # Gradio copies the file while the generator waits
        yield _done(result, started), plots.speed(result), speed.words(result), _write(result, folder)


def _progress(done: int, total: int, started: float) -> str:
    share = done / total * 100
    bar = f"<span class='bar wide'><i style='width:{share:.0f}%'></i></span>"
    return f"<p>{done} of {total} measurements, {time.monotonic() - started:.0f} s</p>{bar}"


def _done(result: dict, started: float) -> str:
    return (
        f"<p>{len(result['rows'])} measurements in {time.monotonic() - started:.0f} s on {result['machine']} ({result['cpu']}), "
        f"{result['threads']} threads, torch {result['torch']}.</p>"
    )


def _write(result: dict, folder: str) -> str:
    path = Path(folder, "sparsedm-speed.json")
    path.write_text(json.dumps(result, indent=1) + "\n")
    return str(path)


def build(job: dict) -> None:
    """The tab. `job` are the queue's options of every heavy event."""
    gr.HTML(
        "<p>MACs are not milliseconds. This measures sampling steps and single layers on the machine that serves this page: "
        "PyTorch's dense layers against packed ones, in turn, so that both meet the same noise.</p>"
    )
    with gr.Row(elem_classes=["order"]):
        base = gr.Radio([(title, name) for name, title in BASES.items()], value="glyphs-uvit", label="Model", min_width=160)
        batches = gr.CheckboxGroup(list(BATCHES), value=[1, 16], label="Pictures at a time", min_width=200)
        dtype = gr.Radio(DTYPES, value="float32", label="Numbers", min_width=200)
        layers = gr.Checkbox(False, label="Single layers, too", min_width=140)
        run = gr.Button("Measure", variant="primary", min_width=100)
        stop = gr.Button("Stop", min_width=80)
    state = gr.HTML(label="Progress")
    figure = gr.Plot(show_label=False, label="How many times faster", elem_classes=["later"])
    table = gr.Markdown(elem_classes=["scroll"])
    file = gr.File(label="The numbers as JSON", interactive=False, elem_classes=["later"])
    job = {**job, "show_progress_on": state, "api_name": "benchmark", "api_description": about(benchmark)}
    event = run.click(benchmark, [base, batches, dtype, layers], [state, figure, table, file], **job)
    stop.click(None, cancels=[event], api_visibility="private")
