"""The demo: a dense diffusion model and its 2:4 version draw a word side by side from the same noise (`python app.py`)."""

import argparse
import copy
import functools
import html
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported

import gradio as gr
import torch
from torch import nn

import sparsedm
from sparsedm import data, diffusion, latency, macs, metrics, plots

BASES = {"glyphs-uvit": "U-ViT", "glyphs-unet": "UNet"}
VARIANTS = {"sparsedm": "2:4 SparseDM", "diffpruned": "Diff-Pruning", "oneshot": "2:4 one-shot, no training"}
_BUNDLED = {"sparsedm": "{}-2x4", "diffpruned": "{}-diffpruned"}
MAX_LETTERS, MAX_STEPS, MAX_SEED, MAX_GUIDANCE = 12, 200, 2**31 - 1, 2.0


@dataclass(frozen=True)
class Request:
    """A checked order: what to draw, with which models and how."""

    labels: torch.Tensor
    base: str
    variant: str
    seed: int
    steps: int
    sampler: str
    guidance: float


@dataclass(frozen=True)
class Variant:
    """A model with the figures that do not change from run to run; `whole` are the dense model's MACs."""

    title: str
    model: nn.Module
    macs: macs.Macs
    whole: int
    parameters: int
    nonzero: int


@dataclass(frozen=True)
class Lane:
    """One side after some steps: its pictures [n, C, H, W] and the seconds of every step so far."""

    variant: Variant
    images: torch.Tensor
    seconds: tuple[float, ...]


def check(word, base, variant, seed, steps, sampler, guidance) -> Request:
    """The order, if everything in it can be done; else a ValueError that names what is wrong and what to do."""
    if not isinstance(word, str):
        raise ValueError(f"the word is missing: type up to {MAX_LETTERS} letters or digits")
    letters = len(word.strip().upper())
    if letters > MAX_LETTERS:
        raise ValueError(f"the word has {letters} letters: use at most {MAX_LETTERS}")
    labels = data.word_labels(word)
    _one_of("backbone", base, BASES)
    _one_of("sparse model", variant, VARIANTS)
    _one_of("sampler", sampler, diffusion.SAMPLERS)
    _within("seed", seed, 0, MAX_SEED, whole=True)
    _within("number of steps", steps, 1, MAX_STEPS, whole=True)
    _within("guidance", guidance, 0, MAX_GUIDANCE)
    return Request(labels, base, variant, int(seed), int(steps), sampler, float(guidance))


def _one_of(what: str, value, known) -> None:
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"the {what} {str(value)[:40]!r} is unknown: choose one of {', '.join(known)}")


def _within(what: str, value, low: float, high: float, whole: bool = False) -> None:
    number = isinstance(value, (int, float)) and low <= value <= high
    if not number or (whole and value != int(value)):
        kind = "a whole number" if whole else "a number"
        raise ValueError(f"the {what} is {str(value)[:40]!r}: give {kind} from {low:g} to {high:,}")


@functools.cache
def load(base: str, variant: str = "dense") -> Variant:
    """The bundled dense model, its bundled 2:4 student or pruned one, or the dense one folded to 2:4 without any training."""
    model = sparsedm.load(_BUNDLED.get(variant, "{}").format(base))
    if variant == "oneshot":
        model = sparsedm.fold(sparsedm.sparsify(copy.deepcopy(model), "2:4"))
    parameters = sum(p.numel() for p in model.parameters())
    nonzero = sum(int(p.count_nonzero()) for p in model.parameters())
    title = f"{BASES[base]}, {VARIANTS.get(variant, variant)}"
    if variant in ("sparsedm", "oneshot"):
        sparsedm.pack(model, batch=MAX_LETTERS // 2)
    counts = macs.count(model)
    whole = counts.dense if variant == "dense" else load(base).whole
    return Variant(title, model, counts, whole, parameters, nonzero)


def race(request: Request) -> Iterator[tuple[Lane, Lane]]:
    """Both models step by step in alternating order from the same noise, yielding about ten times (dense, sparse)."""
    variants = load(request.base), load(request.base, request.variant)
    noise = diffusion.start_noise(variants[0].model, len(request.labels), request.seed)
    for variant in variants:
        next(_sample(variant.model, noise, request))  # the first call is slower than the others
    runs = [_sample(variant.model, noise, request) for variant in variants]
    seconds = [], []
    every = request.steps // 10 | 1  # odd: otherwise the same side would come first after every drawing
    for step in range(1, request.steps + 1):
        states = [None, None]
        for side in (0, 1) if step % 2 else (1, 0):
            states[side] = next(runs[side])
            seconds[side].append(states[side].seconds)
        if step % every == 0 or step == request.steps:
            images = [state.sample if step == request.steps else state.x0 for state in states]
            yield tuple(Lane(*lane) for lane in zip(variants, images, map(tuple, seconds)))


def _sample(model: nn.Module, noise: torch.Tensor, request: Request) -> Iterator[diffusion.SampleState]:
    generator = torch.Generator().manual_seed(request.seed)  # ddpm adds noise: the same on both sides
    return diffusion.sample(
        model, noise, sampler=request.sampler, steps=request.steps, class_labels=request.labels, guidance=request.guidance,
        generator=generator,
    )  # fmt: skip


def si(number: float) -> str:
    """A count with three digits and its SI prefix: 12.1 G, 80.6 M, 938 k."""
    size, unit = next((pair for pair in ((1e9, " G"), (1e6, " M"), (1e3, " k")) if number >= pair[0]), (1, ""))
    number /= size
    return f"{number:.{2 if number < 10 else 1 if number < 100 else 0}f}{unit}"


def _counts(needed: float, executed: float) -> str:
    return si(executed) if needed == executed else f"{si(needed)} needed, {si(executed)} executed"


def figures(lane: Lane, request: Request) -> str:
    """The table under a picture, as HTML."""
    variant, counts, timing = lane.variant, lane.variant.macs, latency.Timing(lane.seconds)
    calls = len(request.labels) * counts.calls(len(lane.seconds), request.guidance)
    share = len(lane.seconds) / request.steps / variant.whole * 100
    low, high = timing.spread
    read, right = reading(lane.images, request.labels)
    wasted = counts.executed - counts.sparse
    bar = f"<i style='width:{counts.sparse * share:.1f}%'></i><b style='width:{wasted * share:.1f}%'></b>"
    rows = {
        "Model": variant.title,
        "MACs per picture and step": _counts(counts.sparse, counts.executed),
        "MACs so far": _counts(counts.sparse * calls, counts.executed * calls) + f"<span class='bar'>{bar}</span>",
        "Time per step": f"<strong>{timing.median * 1e3:.1f} ms</strong> median, quartiles {low * 1e3:.1f} to {high * 1e3:.1f}",
        "Time in total": f"{sum(lane.seconds):.2f} s in {len(lane.seconds)} of {request.steps} steps",
        "Parameters not zero": f"{si(variant.nonzero)} of {si(variant.parameters)}",
        "A classifier reads": f"<kbd>{read}</kbd> {right} of {len(read)} right",
    }
    return "<dl>" + "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in rows.items()) + "</dl>"


def reading(images: torch.Tensor, labels: torch.Tensor) -> tuple[str, int]:
    """The characters that the classifier reads, and how many of them are those asked for."""
    classes = metrics.read(images)
    return "".join(data.GLYPHS[c] for c in classes), int((classes == labels).sum())


def work_words(variant: Variant) -> str:
    """What a sparse model saves in MACs, and how much of that is really skipped."""
    saved, skipped = (1 - count / variant.whole for count in (variant.macs.sparse, variant.macs.executed))
    needs = f"{variant.title.partition(', ')[2]} needs **{saved * 100:.0f} % fewer MACs**"
    if variant.macs.executed >= variant.whole:
        return f"{needs}; skipping the zeros of its layers is no faster on this machine, so they are multiplied too"
    return f"{needs}, and {skipped * 100:.0f} % are really skipped here"


def time_words(dense: Lane, sparse: Lane) -> str:
    """A sparse step's time over a dense one's, in words; equal if 1 lies between the quartiles of the steps' ratios."""
    if len(dense.seconds) < 5:
        return "Too few steps to compare their times"
    ratios = latency.Timing(tuple(b / a for a, b in zip(dense.seconds, sparse.seconds)))
    low, high = ratios.spread
    if low <= 1 <= high:
        words = "as much time as a dense one**, within this run's noise"
    else:
        words = f"{abs(1 - ratios.median) * 100:.0f} % {'less' if ratios.median < 1 else 'more'} time than a dense one**"
    return f"A sparse step took **{words} (ratio {ratios.median:.2f}, quartiles {low:.2f} to {high:.2f})"


def verdict(dense: Lane, sparse: Lane, request: Request) -> str:
    """The outcome in three sentences, from the figures alone (Markdown)."""
    (_, right), (_, sparse_right) = (reading(lane.images, request.labels) for lane in (dense, sparse))
    n = len(request.labels)
    return (
        f"{work_words(sparse.variant)}. {time_words(dense, sparse)}. "
        f"The classifier reads **{right} of {n}** characters right on the dense side and **{sparse_right} of {n}** on the "
        f"sparse side; SSIM between the two is **{_similarity(dense, sparse):.2f}**."
    )


def _similarity(dense: Lane, sparse: Lane) -> float:
    return metrics.ssim(dense.images, sparse.images).mean().item()


def show(dense: Lane, sparse: Lane, request: Request) -> tuple:
    """Values for the page's outputs; slider, SSIM and verdict wait for the last step."""
    cards = plots.word_card(dense.images), plots.word_card(sparse.images, ink=plots.SPARSE_INK)
    tables = figures(dense, request), figures(sparse, request)
    done = len(dense.seconds)
    if done < request.steps:
        return *cards, *tables, gr.skip(), "", f"Denoising: step {done} of {request.steps} on both sides."
    score = f"<b>{_similarity(dense, sparse):.2f}</b><span>SSIM</span>"
    return *cards, *tables, cards, score, verdict(dense, sparse, request)


def compare(word, base, variant, seed, steps, sampler, guidance) -> Iterator[tuple]:
    """Draw a word with a dense model and its 2:4 version from the same noise; the last of the streamed results is complete."""
    try:
        request = check(word, base, variant, seed, steps, sampler, guidance)
        for lanes in race(request):
            yield show(*lanes, request)
    except (ValueError, OSError) as error:
        message = html.escape(f"{error}.", quote=False)
        raise gr.Error(message[0].upper() + message[1:], print_exception=False) from error


def build(base: str = "glyphs-uvit") -> gr.Blocks:
    """The page; it draws its default word as soon as it is opened."""
    with gr.Blocks(title="sparsedm", analytics_enabled=False, delete_cache=(600, 3600)) as demo:
        gr.HTML(HEADER)
        with gr.Row(elem_id="order"):
            word = gr.Textbox(
                "SPARSE", label="Word", info=f"A-Z, 0-9, at most {MAX_LETTERS}", max_lines=1, scale=2, min_width=200
            )
            backbone = gr.Radio(_choices(BASES), value=base, label="Backbone", info="of both sides", scale=2)
            kept = {"label": "Sparse side", "info": "about half the MACs"}
            variant = gr.Radio(_choices(VARIANTS), value="sparsedm", **kept, scale=5, min_width=300)
            run = gr.Button("Draw", variant="primary", min_width=90)
            again = gr.Button("New seed", min_width=90)
        with gr.Accordion("Seed, steps, sampler, guidance", open=False), gr.Row():
            seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED, min_width=110)
            steps = gr.Slider(1, MAX_STEPS, 25, step=1, label="Steps", buttons=[])
            sampler = gr.Dropdown(list(diffusion.SAMPLERS), value="ddim", label="Sampler", min_width=120)
            guidance = gr.Slider(0, MAX_GUIDANCE, 0, step=0.1, label="Guidance", buttons=[])
        summary = gr.Markdown("Loading the models.", label="Verdict", elem_id="verdict")
        with gr.Row():
            lanes = [_column("Dense", "dense"), _column("Sparse", "sparse")]
        gr.HTML("<h2>Dense against sparse</h2><p>Drag the handle: left of it is dense, right of it sparse.</p>")
        with gr.Row(elem_id="difference"):
            slider = gr.ImageSlider(show_label=False, label="Dense against sparse", format="png", buttons=[], scale=5)
            score = gr.HTML(label="SSIM", elem_id="ssim")
        pictures, tables = zip(*lanes)
        job = {
            "fn": compare, "inputs": [word, backbone, variant, seed, steps, sampler, guidance],
            "outputs": [*pictures, *tables, slider, score, summary],
            "concurrency_id": "model", "concurrency_limit": 1, "show_progress": "hidden",
            "preprocess": False,  # `check` says more clearly than Gradio what is wrong
        }  # fmt: skip
        triggers = [demo.load, run.click, word.submit, backbone.input, variant.input]
        gr.on(triggers, **job, api_name="compare", trigger_mode="always_last")
        rolled = again.click(lambda: random.randrange(10_000), None, seed, api_visibility="private", queue=False)
        rolled.then(**job, api_visibility="private")
    return demo.queue(max_size=32)


def _choices(names: dict[str, str]) -> list[tuple[str, str]]:
    return [(title, name) for name, title in names.items()]


def _column(title: str, side: str) -> tuple[gr.Image, gr.HTML]:
    with gr.Column(elem_classes=["side", side], min_width=320):
        gr.HTML(f"<h2>{title}</h2>")
        alt = f"{title}: the word as drawn"
        picture = gr.Image(label=title, show_label=False, format="png", buttons=["download"], alt_text=alt)
        return picture, gr.HTML(label=f"{title}: figures", elem_classes=["figures"])


HEADER = """<h1>One word, two models</h1>
<p>A small diffusion model turns noise into letters: once dense, once at about half the work, with 2 of every 4 weights
or with fewer channels. Both start from the same noise and take turns, step by step, so that they are timed under the same
conditions.</p>"""

CSS = f"""
.dense {{ --ink: {plots.INK}; }} .sparse {{ --ink: {plots.SPARSE_INK}; }}
.dark .dense {{ --ink: #93a8f4; }} .dark .sparse {{ --ink: #f0986f; }}
.gradio-container {{ width: 100% !important; max-width: 1320px !important; margin: 0 auto !important; }}
.gradio-container h1 {{ font-size: 1.8rem; font-weight: 650; letter-spacing: -0.02em; margin: 0.4rem 0 0.3rem; }}
.gradio-container h2 {{ font-size: 1.05rem; font-weight: 650; margin: 0.4rem 0 0; }}
.gradio-container .html-container {{ padding: 0 !important; }}
.gradio-container p {{ max-width: 100ch; margin: 0.2rem 0; }}
.side {{ gap: 0.5rem; }}
.side h2 {{ color: var(--ink); }}
.side .block:has(.image-container, .empty), .side .empty {{ aspect-ratio: 1200 / 280; min-height: 0 !important; }}
.side .image-container {{ background: {plots.PAPER}; }}
#verdict {{ font-size: 1.05rem; line-height: 1.55; min-height: 3.2em; }}
#verdict p {{ max-width: none; }}
#order button {{ align-self: flex-end; padding-inline: 0.5rem; }}
.figures {{ min-height: 13.5rem; }}
dl {{ display: grid; grid-template-columns: minmax(7rem, max-content) 1fr; gap: 0.35rem 1.2rem; margin: 0; }}
dt {{ color: var(--body-text-color-subdued); }}
dd {{ margin: 0; font-variant-numeric: tabular-nums; }}
dd kbd {{ font-weight: 650; letter-spacing: 0.08em; margin-right: 0.5em; }}
.bar {{ display: flex; height: 7px; margin: 5px 0; border-radius: 3px; overflow: hidden; }}
.bar {{ background: var(--border-color-primary); }}
.bar i {{ background: var(--ink); }}
.bar b {{ background: repeating-linear-gradient(135deg, var(--ink) 0 2px, transparent 2px 6px); }}
#ssim {{ align-self: center; text-align: center; }}
#ssim b {{ display: block; font-size: 2.4rem; font-weight: 650; line-height: 1.1; }}
#ssim span {{ color: var(--body-text-color-subdued); }}
@media (max-width: 600px) {{
  #difference {{ flex-direction: column; }}
  #verdict {{ min-height: 12.4em; }}
  dl {{ grid-template-columns: minmax(0, 2fr) minmax(0, 3fr); gap: 0.4rem 0.8rem; font-size: 0.9rem; }}
}}
"""


def main() -> None:
    """Read the command line and serve the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="glyphs-uvit", choices=BASES, help="the backbone to start with")
    parser.add_argument("--port", type=int, help="the first free one from 7860 by default")
    parser.add_argument("--share", action="store_true", help="also serve it at a public address, through gradio.live")
    args = parser.parse_args()
    build(args.model).launch(server_port=args.port, share=args.share, **LOOK)


FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}  # none from the network
LOOK = {
    "theme": gr.themes.Default(primary_hue="indigo", neutral_hue="stone", **FONTS).set(body_text_color_subdued="*neutral_500"),
    "css": CSS, "footer_links": ["api", "settings"], "run_history": False, "ssr_mode": False,
}  # fmt: skip

if __name__ == "__main__":
    main()
