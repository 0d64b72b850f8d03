"""The tab "Trade-off": quality against MACs and against measured time, of all stored results."""

import gradio as gr
from PIL import Image

from ..experiments import figures, results
from ..experiments.recipes import recipe
from . import checks, scatter
from .models import LETTER_BASES
from .words import about, said, saved

SUITES = {"headline": "long training", "short": "every method, short training"}
COSTS = {"macs": "MACs", "time": "measured time of a step"}


def points(base: str, suite: str, cost: str) -> list[scatter.Point]:
    """The stored results of one teacher and its students; if time is the cost, without those that were not timed."""
    rows = results.load(suite, base)
    whole = next(row.macs for row in rows if row.name in (base, *results.teachers()))
    shown = []
    for row in rows:
        family = figures.family(row)
        share = row.macs / whole if cost == "macs" else 1.0 if family == "dense" else 1 / row.speedup if row.speedup else None
        if share is not None:
            shown.append(scatter.Point(row.name, row.recipe.method, family, share, row.fd))
    return shown


def draw(base, suite, cost, chosen=None) -> tuple:
    """The plot as SVG, and the results to choose from; `chosen` is ringed."""
    try:
        checks.one_of("backbone", base, LETTER_BASES)
        checks.one_of("suite", suite, SUITES)
        checks.one_of("cost", cost, COSTS)
        shown = points(base, suite, cost)
    except ValueError as error:
        raise said(error) from error
    names = [point.name for point in shown]
    chosen = chosen if chosen in names else next((name for name in names if recipe(name).role == "2x4"), None)
    dense = next(point.fd for point in shown if point.name in (base, *results.teachers()))
    xlabel = f"{COSTS[cost]}, as a share of the dense model's"
    plot = scatter.svg(shown, xlabel, chosen or "", ceiling=figures.OFF_THE_SCALE * dense)
    return plot, gr.Dropdown([(point.label, point.name) for point in shown], value=chosen), *details(chosen)


def details(name: str | None) -> tuple[str | None, str]:
    """The file of a stored result's first pictures, enlarged, and its scores, costs and command as text (Markdown)."""
    row = next((row for suite in SUITES for row in results.load(suite) if row.name == name), None)
    if row is None:
        return None, "Choose a point."
    run, scores = row.runs[0], row.runs[0]["scores"]
    seeds = f" (mean of {len(row.runs)} seeds)" if len(row.runs) > 1 else ""
    similarity = f", SSIM to the teacher {row.mean('ssim_to_base'):.3f}" if "ssim_to_base" in scores else ""
    faster = f", a step {row.speedup:.2f} times faster than the dense model's" if row.speedup else ""
    lines = [
        f"### {row.recipe.title}",
        f"FD-glyph **{row.fd:.2f}**{seeds}, readability {row.mean('readability'):.1%}{similarity}",
        f"{run['macs']['sparse'] / 1e6:.1f} M MACs per picture and step, {run['nonzero_parameters'] / 1e6:.2f} M weights not zero"
        f"{faster}",
        f"Training: {row.images:,} pictures" if row.images else "No training",
        f"Scored on {run['protocol']['n']:,} pictures, {run['protocol']['steps']} {run['protocol']['sampler'].upper()} steps",
        f"Made by `{run['command']}`",
    ]
    drawn = results.pictures(name)
    enlarged = drawn and drawn.resize((drawn.width * 4, drawn.height * 4), Image.Resampling.NEAREST)
    return enlarged and saved(enlarged), "\n\n".join(lines)


def build(tab: gr.Tab) -> None:
    """The tab."""
    gr.HTML(
        "<p>Every stored result of the package's own experiments, scored by one protocol. Click a point, or choose one from the "
        "list, to see what the model drew and the command that makes it again.</p>"
    )
    with gr.Row():
        base = gr.Radio(
            [(title, name) for name, title in LETTER_BASES.items()], value="glyphs-uvit", label="Backbone", min_width=160
        )
        suite = gr.Radio([(title, name) for name, title in SUITES.items()], value="headline", label="Results", min_width=220)
        cost = gr.Radio([(title, name) for name, title in COSTS.items()], value="macs", label="Cost", min_width=220)
    plot = gr.HTML(js_on_load=scatter.ON_LOAD, elem_id="tradeoff", label="Quality against cost")
    with gr.Row():
        with gr.Column(scale=3, min_width=300):
            chosen = gr.Dropdown([], label="Result", allow_custom_value=False)
            pictures = gr.Image(label="Pictures", show_label=False, format="png", buttons=[], alt_text="What the model drew")
        with gr.Column(scale=2, min_width=300):
            words = gr.Markdown(elem_id="details")
    outputs = [plot, chosen, pictures, words]
    private = {"queue": False, "api_visibility": "private", "show_progress": "hidden"}
    public = {"queue": False, "show_progress": "hidden", "preprocess": False, "api_name": "tradeoff"}
    triggers = [tab.select, base.input, suite.input, cost.input]
    gr.on(triggers, draw, [base, suite, cost, chosen], outputs, **public, api_description=about(draw))
    chosen.input(draw, [base, suite, cost, chosen], outputs, **private)

    def picked(base, suite, cost, event: gr.SelectData) -> tuple:
        return draw(base, suite, cost, event.value)

    plot.select(picked, [base, suite, cost], outputs, **private)
