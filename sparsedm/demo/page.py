"""The page: its tabs, and how it looks."""

import os
from pathlib import Path

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported

import gradio as gr
from starlette.middleware import Middleware
from starlette.routing import Route

from .. import plots
from . import blind, compare, explore, speedtest, tradeoff, tune
from .models import Catalogue
from .serving import HEALTH, health, limit
from .visitors import Door

SESSIONS = 100  # whose settings Gradio keeps, 0.2 MB each


def build(catalogue: Catalogue | None = None, left: str = "glyphs-uvit", right: str = "glyphs-uvit-2x4") -> gr.Blocks:
    """The page over these models; it draws its default word as soon as it is opened."""
    catalogue = catalogue or Catalogue()
    # Long orders have a queue of their own; between their steps they let short ones in (turns.py).
    short, long = ({"concurrency_id": name, "concurrency_limit": 1} for name in ("short", "long"))
    # The progress shows the place in the queue; the checks say more clearly than Gradio's preprocessing what is wrong.
    shown = {"show_progress": "full", "preprocess": False}
    with gr.Blocks(title="sparsedm", analytics_enabled=False, delete_cache=(600, 3600)) as demo:
        gr.HTML(HEADER)
        with gr.Tab("Compare"):
            compare.build(catalogue, demo, left, right, {**short, **shown})
        with gr.Tab("Blind test") as test:
            blind.build(catalogue, test, left, {**short, **shown})
        with gr.Tab("Masks") as masks:
            explore.build(catalogue, "glyphs-uvit", masks)
        with gr.Tab("Trade-off") as results:
            tradeoff.build(results)
        with gr.Tab("Speed here"):
            speedtest.build({**long, **shown})
        with gr.Tab("Fine-tune"):
            tune.build(catalogue, {**long, **shown})
        compare.offer_generate(catalogue, short)
    return demo.queue(max_size=limit("SPARSEDM_QUEUE"), api_open=False)


HEADER = """<h1>Sparse diffusion, side by side</h1>"""

_INKS = {"left": plots.INK, "right": plots.SPARSE_INK, "paper": plots.PAPER}
_INKS |= {f"family-{i}": ink for i, ink in enumerate(plots.FAMILIES.values())}
FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}  # none from the network
LOOK = {
    "theme": gr.themes.Default(primary_hue="indigo", neutral_hue="stone", **FONTS).set(body_text_color_subdued="*neutral_500"),
    "css": f".gradio-container {{ {' '.join(f'--{name}: {ink};' for name, ink in _INKS.items())} }}",
    "css_paths": Path(__file__).with_name("page.css"),
    "footer_links": ["api", "settings"],
    "run_history": False,
    "ssr_mode": False,
    "max_file_size": "1mb",
    "state_session_capacity": SESSIONS,
}


def launch(demo: gr.Blocks, **options) -> str:
    """Serve the page; returns its address. `options` are those of `gr.Blocks.launch`."""
    served = {"middleware": [Middleware(Door)], "routes": [Route(HEALTH, health)]}
    return demo.launch(**LOOK, **options, app_kwargs=served)[1]
