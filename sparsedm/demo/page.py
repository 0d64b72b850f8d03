"""The page: its tabs, and how it looks."""

import os

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported

import gradio as gr

from .. import plots
from . import compare, explore, speedtest, tradeoff, tune
from .models import Catalogue

QUEUE = 32  # orders that may wait


def build(catalogue: Catalogue | None = None, left: str = "glyphs-uvit", right: str = "glyphs-uvit-2x4") -> gr.Blocks:
    """The page over these models; it draws its default word as soon as it is opened."""
    catalogue = catalogue or Catalogue()
    # One order at a time touches a model: two would slow each other down and spoil both times.
    job = {
        "concurrency_id": "model", "concurrency_limit": 1, "show_progress": "full",  # the place in the queue
        "preprocess": False,  # the checks say more clearly than Gradio what is wrong
    }  # fmt: skip
    with gr.Blocks(title="sparsedm", analytics_enabled=False, delete_cache=(600, 3600)) as demo:
        gr.HTML(HEADER)
        with gr.Tab("Compare"):
            compare.build(catalogue, demo, left, right, job)
        with gr.Tab("Masks") as masks:
            explore.build(catalogue, "glyphs-uvit", masks)
        with gr.Tab("Trade-off") as results:
            tradeoff.build(results)
        with gr.Tab("Speed here"):
            speedtest.build(job)
        with gr.Tab("Fine-tune"):
            tune.build(catalogue, job)
        compare.offer_generate(catalogue, job)
    return demo.queue(max_size=QUEUE)


HEADER = """<h1>Sparse diffusion, side by side</h1>"""

_FAMILY = list(plots.FAMILIES.values())
CSS = f"""
.left {{ --ink: {plots.INK}; }} .right {{ --ink: {plots.SPARSE_INK}; }}
.dark .left {{ --ink: #93a8f4; }} .dark .right {{ --ink: #f0986f; }}
.f0 {{ --ink: {_FAMILY[0]}; }} .f1 {{ --ink: {_FAMILY[1]}; }} .f2 {{ --ink: {_FAMILY[2]}; }} .f3 {{ --ink: {_FAMILY[3]}; }}
.dark .f0 {{ --ink: #93a8f4; }} .dark .f1 {{ --ink: #f0986f; }} .dark .f2 {{ --ink: #6cc08f; }} .dark .f3 {{ --ink: #c79adb; }}
.gradio-container {{ width: 100% !important; max-width: 1320px !important; margin: 0 auto !important; }}
.gradio-container h1 {{ font-size: 1.6rem; font-weight: 650; letter-spacing: -0.02em; margin: 0.4rem 0 0; }}
.gradio-container h2 {{ font-size: 1.05rem; font-weight: 650; margin: 0.4rem 0 0; }}
.gradio-container .html-container {{ padding: 0 !important; }}
.gradio-container p {{ max-width: 100ch; margin: 0.2rem 0; }}
.side {{ gap: 0.5rem; }}
.side h2 {{ color: var(--ink); }}
.side .block:has(.image-container, .empty), .side .empty {{ aspect-ratio: 1200 / 280; min-height: 0 !important; }}
.side .image-container {{ background: {plots.PAPER}; }}
#verdict {{ font-size: 1.05rem; line-height: 1.55; min-height: 3.2em; }}
#verdict p {{ max-width: none; }}
.order button {{ align-self: flex-end; padding-inline: 0.5rem; }}
.figures {{ min-height: 16rem; }}
dl {{ display: grid; grid-template-columns: minmax(7rem, max-content) 1fr; gap: 0.35rem 1.2rem; margin: 0; }}
dt {{ color: var(--body-text-color-subdued); }}
dd {{ margin: 0; font-variant-numeric: tabular-nums; }}
dd kbd {{ font-weight: 650; letter-spacing: 0.08em; margin-right: 0.5em; }}
.bar {{ display: flex; height: 7px; margin: 5px 0; border-radius: 3px; overflow: hidden; }}
.bar {{ background: var(--border-color-primary); --ink: {plots.INK}; }}
.side .bar {{ --ink: inherit; }}
.bar i {{ background: var(--ink); }}
.bar b {{ background: repeating-linear-gradient(135deg, var(--ink) 0 2px, transparent 2px 6px); }}
#ssim {{ align-self: center; text-align: center; }}
#ssim b {{ display: block; font-size: 2.4rem; font-weight: 650; line-height: 1.1; }}
#ssim span {{ color: var(--body-text-color-subdued); }}
.scroll {{ overflow-x: auto; }}
.scroll :is(th, td) {{ border-color: var(--border-color-primary) !important; white-space: nowrap; padding: 0.35rem 0.7rem; }}
.dark .matplotlib img {{ filter: invert(0.9) hue-rotate(180deg); }}
.later:has(.empty) {{ display: none; }}
#tradeoff {{ overflow-x: auto; }}
.scatter {{ width: 100%; min-width: 560px; height: auto; display: block; }}
.scatter text {{ fill: var(--body-text-color-subdued); font-size: 13px; }}
.scatter .grid line {{ stroke: var(--border-color-primary); }}
.scatter .point {{ cursor: pointer; outline: none; }}
.scatter .point :is(circle, path) {{ fill: var(--ink); stroke: var(--background-fill-primary); stroke-width: 1.5; }}
.scatter .point text {{ display: none; fill: var(--body-text-color); font-weight: 600; paint-order: stroke; }}
.scatter .point text {{ stroke: var(--background-fill-primary); stroke-width: 4px; }}
.scatter.few .point text, .scatter .point:is(:hover, :focus, .chosen) text {{ display: inline; }}
.scatter .point:is(:hover, :focus, .chosen) :is(circle, path) {{ stroke: var(--body-text-color); stroke-width: 2.5; }}
.legend {{ display: flex; flex-wrap: wrap; gap: 0.3rem 1.2rem; }}
.legend span::before {{ content: ""; display: inline-block; width: 0.7em; height: 0.7em; border-radius: 50%; }}
.legend span::before {{ background: var(--ink); margin-right: 0.4em; }}
@media (max-width: 600px) {{
  #difference {{ flex-direction: column; }}
  #verdict {{ min-height: 12.4em; }}
  dl {{ grid-template-columns: minmax(0, 2fr) minmax(0, 3fr); gap: 0.4rem 0.8rem; font-size: 0.9rem; }}
  .scatter text {{ font-size: 17px; }}
}}
"""

FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}  # none from the network
LOOK = {
    "theme": gr.themes.Default(primary_hue="indigo", neutral_hue="stone", **FONTS).set(body_text_color_subdued="*neutral_500"),
    "css": CSS, "footer_links": ["api", "settings"], "run_history": False, "ssr_mode": False, "max_file_size": "1mb",
}  # fmt: skip
