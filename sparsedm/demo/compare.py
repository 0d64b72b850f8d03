"""The tab "Compare": two models side by side, timed in turn."""

import functools
import html
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import gradio as gr
import torch

from .. import data, diffusion, plots
from ..data import faces
from ..measure import judges, metrics
from ..support import latency
from . import chips, race, subjects, turns
from .models import FACES, LETTERS, Catalogue, Variant
from .race import Asked, Lane, Order
from .subjects import SUBJECTS
from .words import about, said, saved, si

KINDS = (("the line", "word"), ("classes by number", "classes"), ("anything", "anything"))


def _counts(needed: float, executed: float) -> str:
    return si(executed) if needed == executed else f"{si(needed)} needed, {si(executed)} executed"


def figures(lane: Lane, order: Order) -> str:
    """The table under a picture, as HTML; the bar is full when the side with more multiplications is done."""
    variant, counts, timing = lane.variant, lane.variant.macs, latency.Timing(lane.seconds)
    calls = order.asked.n * counts.calls(len(lane.seconds), order.guidance)
    most = max(order.left.macs.executed, order.right.macs.executed)
    share = len(lane.seconds) / order.steps / most * 100
    low, high = timing.spread
    wasted = counts.executed - counts.sparse
    bar = f"<i style='width:{counts.sparse * share:.1f}%'></i><b style='width:{wasted * share:.1f}%'></b>"
    rows = {"A classifier reads": _reading_words(reading(lane.images, order.asked))} if order.asked.judge else {}
    rows |= {
        "MACs per picture and step": _counts(counts.sparse, counts.executed),
        "MACs so far": _counts(counts.sparse * calls, counts.executed * calls) + f"<span class='bar'>{bar}</span>",
        "Time per step": f"<strong>{timing.median * 1e3:.1f} ms</strong> median, quartiles {low * 1e3:.1f} to {high * 1e3:.1f}",
        "Time in total": f"{sum(lane.seconds):.2f} s in {len(lane.seconds)} of {order.steps} steps",
        "Parameters not zero": f"{si(variant.nonzero)} of {si(variant.parameters)}",
        "Weights in memory": f"{si(variant.bytes)}B",
        "Layers": html.escape(variant.kernels),
    }
    table = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in rows.items())
    return f"<h3>{html.escape(variant.title)}</h3><dl>{table}</dl>"


@dataclass(frozen=True)
class Reading:
    """What the classifier reads in some pictures.

    Attributes:
        right: how many characters, or asked attributes, are right.
        of: how many there are.
        text: the characters; "" for faces.
        faces: the words that were asked for, each with the number of faces where it is read.
    """

    right: int
    of: int
    text: str = ""
    faces: Mapping[str, int] = field(default_factory=dict)

    @property
    def what(self) -> str:
        return "characters" if self.text else "asked attributes"


def reading(images: torch.Tensor, asked: Asked) -> Reading:
    """What the classifier reads in the pictures that were asked for."""
    read, expected = asked.judge.read(images), asked.expected
    right, of = int((read == expected)[expected >= 0].sum()), int((expected >= 0).sum())
    if asked.judge is judges.GLYPHS:
        return Reading(right, of, "".join(data.GLYPHS[c] for c in read))
    counts = (read == expected).sum(0).tolist()
    words = (values[value] if value >= 0 else "" for values, value in zip(faces.ATTRIBUTES.values(), expected[0].tolist()))
    return Reading(right, of, faces={word: count for word, count in zip(words, counts) if word})


def _reading_words(found: Reading) -> str:
    if found.text:
        return f"<kbd>{found.text}</kbd> {found.right} of {found.of} right"
    n = found.of // len(found.faces)
    return " ".join(f"<span class='read'>{word} <b>{count}/{n}</b></span>" for word, count in found.faces.items())


def work_words(left: Variant, right: Variant) -> str:
    """How many fewer MACs the right model needs and executes than the left one, in words."""
    needed, executed = (1 - b / a for a, b in ((left.macs.sparse, right.macs.sparse), (left.macs.executed, right.macs.executed)))
    needs = f"{right.title} needs **{_fewer(needed)} MACs** than {left.title}"
    if right.macs.executed == right.macs.dense > right.macs.sparse:
        return f"{needs}; skipping its zeros is no faster on this machine, so they are multiplied too"
    return f"{needs}, and executes {_fewer(executed)} here"


def _fewer(saved: float) -> str:
    return "as many" if abs(saved) < 0.005 else f"{abs(saved) * 100:.0f} % {'fewer' if saved > 0 else 'more'}"


def time_words(left: Lane, right: Lane) -> str:
    """A right step's time over a left one's, in words; equal if 1 lies between the quartiles of the steps' ratios."""
    if len(left.seconds) < 5:
        return "Too few steps to compare their times"
    ratios = latency.Timing(tuple(b / a for a, b in zip(left.seconds, right.seconds, strict=True)))
    low, high = ratios.spread
    if low <= 1 <= high:
        words = "as much time as one on the left**, within this run's noise"
    else:
        words = f"{abs(1 - ratios.median) * 100:.0f} % {'less' if ratios.median < 1 else 'more'} time than one on the left**"
    return f"A step on the right took **{words} (ratio {ratios.median:.2f}, quartiles {low:.2f} to {high:.2f})"


def verdict(left: Lane, right: Lane, order: Order) -> str:
    """The outcome in two or three sentences (Markdown)."""
    text = f"{work_words(left.variant, right.variant)}. {time_words(left, right)}. "
    if order.asked.judge:
        a, b = (reading(lane.images, order.asked) for lane in (left, right))
        text += (
            f"The classifier reads **{a.right} of {a.of}** {a.what} right on the left and **{b.right} of {b.of}** on the right; "
        )
    return f"{text}SSIM between the two is **{_similarity(left, right):.2f}**."


def _similarity(left: Lane, right: Lane) -> float:
    return metrics.ssim(left.images, right.images).mean().item()


def show(left: Lane, right: Lane, order: Order) -> tuple:
    """Values for the page's outputs; slider, difference, SSIM and verdict wait for the last step."""
    size = SUBJECTS[FACES if order.left.draws_faces else LETTERS].card
    cards = saved(plots.word_card(left.images, size=size)), saved(plots.word_card(right.images, size=size, ink=plots.SPARSE_INK))
    titles = _title(order.left), _title(order.right)
    tables = figures(left, order), figures(right, order)
    done = len(left.seconds)
    if done < order.steps:
        return *titles, *cards, *tables, gr.skip(), gr.skip(), "", f"Denoising: step {done} of {order.steps} on both sides."
    apart = (left.images - right.images).abs().mean(1, keepdim=True)  # 0 to 2
    difference = saved(plots.word_card(apart - 1, size=size, ink="#111111"))
    score = f"<b>{_similarity(left, right):.2f}</b><span>SSIM</span>"
    return *titles, *cards, *tables, cards, difference, score, verdict(left, right, order)


def _title(variant: Variant) -> str:
    return f"<h2>{html.escape(variant.title)}</h2>"


def compare(catalogue: Catalogue, text, left, right, seed, steps, sampler, guidance, kind="word") -> Iterator[tuple]:
    """Draw the same with two models from the same noise, step by step in turn; the last of the streamed results is complete.

    `text` is a word, or what faces show, or class numbers, by `kind` ("word", "classes", "anything"); left and right are models'
    names.
    """
    try:
        yield from turns.short(_pages(catalogue, text, left, right, seed, steps, sampler, guidance, kind))
    except (ValueError, OSError) as error:
        raise said(error) from error


def _pages(catalogue: Catalogue, *wanted) -> Iterator[tuple | None]:
    """The page's outputs about ten times, and None after the other steps."""
    order = race.check(catalogue, *wanted)
    every = order.steps // 10 | 1  # odd: otherwise the same side would come first after every drawing
    for step, lanes in enumerate(race.race(order), 1):
        yield show(*lanes, order) if step % every == 0 or step == order.steps else None


def build(catalogue: Catalogue, demo: gr.Blocks, left: str, right: str, job: dict) -> None:
    """The tab; it draws its default order as soon as the page is opened. `job` are the queue's options of every heavy event."""
    offered = subjects.offered(catalogue, left, right)
    subject = subjects.of(catalogue, left)
    for key in (left, right):
        catalogue.load(key)  # before the first visitor comes
    line, switch, run, again, *clicked = _order(offered, subject)
    with gr.Row():
        lanes = [_lane(side, catalogue.choices(data=subject), key) for side, key in zip(("left", "right"), offered[subject])]
    sides, titles, pictures = zip(*lanes, strict=True)
    summary, *outcome = _outcome()
    settings = _settings()
    seed = settings[0]
    event = {
        "fn": functools.partial(compare, catalogue),
        "inputs": [line, *sides, *settings],
        "outputs": [*titles, *pictures, *outcome, summary],
        "show_progress_on": summary,
        **job,
    }
    triggers = [demo.load, run.click, line.submit, *(side.input for side in sides)]
    gr.on(triggers, **event, api_name="compare", api_description=about(compare), trigger_mode="always_last")
    private = {"api_visibility": "private", "queue": False}
    rolled = again.click(lambda: random.randrange(10_000), None, seed, **private)
    switched = switch.input(functools.partial(subjects.switched, catalogue, offered), switch, [line, *sides], **private)
    steps_before = [rolled, switched, *clicked]
    gr.HTML("Try:", elem_id="try")
    for name in offered:
        with gr.Row(elem_classes=["examples", f"for-{name}"]):
            for text, *keys in SUBJECTS[name].examples:
                if not {*keys} <= {*catalogue.entries}:
                    continue
                models = f": {' against '.join(catalogue.entries[key].title for key in keys)}" if keys else ""
                button = gr.Button(text + models, size="sm", variant="secondary", min_width=200)
                values = functools.partial(tuple, (text, *(keys or offered[name])))
                steps_before.append(button.click(values, None, [line, *sides], **private))
    for step in steps_before:
        step.then(**event, api_visibility="private", trigger_mode="always_last")


def _order(offered: dict, subject: str) -> tuple:
    """What is to be drawn; last the event of a click on a chip, if there are chips."""
    known = SUBJECTS[subject]
    with gr.Row(elem_id="subject"):
        gr.HTML("<p>Two models turn the same noise into pictures and take turns, step by step, so that both are timed alike.</p>")
        names = [(SUBJECTS[name].title, name) for name in offered]
        switch = gr.Radio(names, value=subject, visible=len(names) > 1, show_label=False, label="Subject", container=False)
    with gr.Row(elem_classes=["order"]):
        line = gr.Textbox(known.text, label=known.label, info=known.info or None, max_lines=1, scale=3, min_width=300)
        run = gr.Button("Draw", variant="primary", scale=0, min_width=110)
        again = gr.Button("New seed", scale=0, min_width=110)
    clicked = [chips.build(line)] if FACES in offered else []
    return line, switch, run, again, *clicked


def _lane(side: str, choices: list, key: str) -> tuple[gr.Dropdown, gr.HTML, gr.Image]:
    """One side's model, to be chosen, and what the model draws; its title is for scripts."""
    with gr.Column(elem_classes=["side", side], min_width=320):
        model = gr.Dropdown(choices, value=key, label=side.title(), show_label=False, container=False)
        title = gr.HTML(f"<h2>{side.title()}</h2>", label=f"{side}: model", visible="hidden")
        alt = f"What the model on the {side} draws"
        return model, title, gr.Image(label=side, show_label=False, format="png", buttons=["download"], alt_text=alt)


def _settings() -> list[gr.components.Component]:
    with gr.Accordion("Seed, steps, sampler, guidance, classes", open=False):
        with gr.Row():
            seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=race.MAX_SEED, min_width=110)
            steps = gr.Slider(1, race.MAX_STEPS, 25, step=1, label="Steps", buttons=[])
            sampler = gr.Dropdown(list(diffusion.SAMPLERS), value="ddim", label="Sampler", min_width=120)
            guidance = gr.Slider(0, race.MAX_GUIDANCE, 0, step=0.1, label="Guidance", buttons=[])
        info = "Models that draw neither faces nor letters take classes or anything."
        kind = gr.Radio(KINDS, value="word", label="Draw", info=info)
    return [seed, steps, sampler, guidance, kind]


def _outcome() -> tuple:
    """Where the outcome appears: the summary, both tables, slider, difference and SSIM."""
    summary = gr.Markdown("Loading the models.", label="Verdict", elem_id="verdict")
    tables = []
    with gr.Row():
        for side in ("left", "right"):
            with gr.Column(elem_classes=["side", side], min_width=320):
                tables.append(gr.HTML(label=f"{side}: figures", elem_classes=["figures"]))
    gr.HTML(
        "<h2>One over the other</h2><p>Drag the handle: left of it is the left model's picture. Beside is where they differ.</p>"
    )
    with gr.Row(elem_id="difference"):
        slider = gr.ImageSlider(show_label=False, label="Left against right", format="png", buttons=[], min_width=280, scale=5)
        alt = "Where the two differ"
        apart = gr.Image(label="Difference", show_label=False, format="png", buttons=[], alt_text=alt, min_width=280, scale=5)
        score = gr.HTML(label="SSIM", elem_id="ssim", min_width=100, scale=1)
    return summary, *tables, slider, apart, score


def offer_generate(catalogue: Catalogue, job: dict) -> None:
    """An endpoint for scripts alone."""

    def generate(
        text: str,
        model: str = "glyphs-uvit-2x4",
        seed: int = 0,
        steps: int = 25,
        sampler: str = "ddim",
        guidance: float = 0,
        kind: str = "word",
    ) -> tuple[dict, dict]:
        """Draw with one model. Returns the picture's file and the cost in numbers."""
        try:
            [(order, lane)] = turns.short(_drawn(catalogue, text, model, model, seed, steps, sampler, guidance, kind))
        except (ValueError, OSError) as error:
            raise said(error) from error
        return gr.FileData(path=saved(plots.word_card(lane.images))).model_dump(), {"model": model, **facts(lane, order)}

    gr.api(generate, api_description=about(generate), **job)


def facts(lane: Lane, order: Order) -> dict:
    """The cost of one model's pictures, and how many the classifier reads right, as numbers."""
    numbers = {
        "pictures": order.asked.n,
        "steps": order.steps,
        "ms_per_step": latency.Timing(lane.seconds).median * 1e3,
        "macs_per_picture_and_step": order.left.macs.sparse,
        "macs_executed": order.left.macs.executed,
    }
    if order.asked.judge:
        found = reading(lane.images, order.asked)
        numbers |= {"read": found.text, "right": found.right, "of": found.of}
    return numbers


def _drawn(catalogue: Catalogue, *wanted) -> Iterator[tuple[Order, Lane] | None]:
    """The order and its pictures after the last step, None after the other steps."""
    order = race.check(catalogue, *wanted)
    for step, lane in enumerate(race.alone(order), 1):
        yield (order, lane) if step == order.steps else None
