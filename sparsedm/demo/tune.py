"""The tab "Fine-tune": a dense teacher becomes an N:M student while one watches."""

import copy
import shutil
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import gradio as gr
import torch
from torch import nn

from .. import diffusion, plots
from ..checkpoints import folders
from ..experiments.recipes import recipe
from ..masking import layers
from ..measure import judges, macs, metrics
from ..models import students
from ..training import distill
from . import checks, race, turns
from .models import LETTER_BASES, Catalogue, copy_of, student
from .words import about, said, saved, si

PATTERNS = ("2:4", "1:4", "3:4", "4:8", "1:8", "7:8")
MAX_STEPS, EVERY, SAMPLING_STEPS = 400, 10, 15
LEARNING_RATE, EMA_DECAY, WARMUP, BATCH = 1e-3, 0.9, 10, 32
running: dict[str, threading.Event] = {}  # the sessions that train now; a training ends when its event is set


@dataclass
class Watched:
    """The course of a training so far.

    Attributes:
        noise: the noise term of the loss at every step.
        teacher: the teacher's term of the loss at every step.
        steps: the steps at which the page was updated, every `EVERY` ones.
        flips: share of mask entries that changed between two of `steps`.
        right: letters that the classifier reads right at `steps`.
    """

    noise: list[float]
    teacher: list[float]
    steps: list[int]
    flips: list[float]
    right: list[int]

    def figure(self):
        """Loss terms and, below, the share of mask entries that changed since the last look."""
        return plots.live({"noise term": self.noise, "teacher's term": self.teacher}, self.steps[1:], self.flips)


def check(catalogue: Catalogue, base, pattern, decay, weight, steps, word) -> torch.Tensor:
    """The word's labels. Raises ValueError, with the remedy, if the order cannot be carried out."""
    checks.one_of("model", base, LETTER_BASES)
    checks.one_of("pattern", pattern, PATTERNS)
    checks.within("decay", decay, 0, 0.01)
    checks.within("teacher's weight", weight, 0, 1)
    checks.within("number of steps", steps, EVERY, MAX_STEPS, whole=True)
    return race.check(catalogue, word, base, base, 0, SAMPLING_STEPS, "ddim", 0).asked.labels


def tune(catalogue: Catalogue, session: str, base, pattern, decay, weight, steps, word) -> Iterator[tuple]:
    """Fine-tune a bundled dense model to an N:M student (SR-STE, with its teacher), streaming pictures, loss and mask flips.

    The last result has the packed student as a zip file.
    """
    stopped = running[session] = threading.Event()
    try:
        yield from turns.long(_tune(catalogue, stopped, base, pattern, decay, weight, steps, word))
    except (ValueError, OSError) as error:
        raise said(error) from error
    finally:
        if running.get(session) is stopped:
            del running[session]


def _tune(catalogue: Catalogue, stopped: threading.Event, base, pattern, decay, weight, steps, word) -> Iterator[tuple | None]:
    """The page's outputs every `EVERY` steps, and None after the other steps."""
    labels = check(catalogue, base, pattern, decay, weight, steps, word)
    decay, weight, steps = float(decay), float(weight), int(steps)
    teacher = copy_of(catalogue.load(base))
    student = students.sparsify(copy.deepcopy(teacher), pattern, decay=decay)
    noise = diffusion.start_noise(teacher, len(labels), seed=0)
    aim, before = _drawn(teacher, noise, labels), layers.masks(student)
    watched, counts = Watched([], [], [], [], []), macs.count(student)
    settings = {**_settings(base), "steps": steps, "teacher_weight": weight}

    def look(model: nn.Module, step: int) -> tuple:
        images = _drawn(layers.folded(model), noise, labels)
        watched.steps.append(step)
        watched.right.append(int((judges.GLYPHS.read(images) == labels).sum()))
        return _page(watched, aim, images, steps, counts)

    yield *look(student, 0), None
    step = 0
    for state in distill.finetune(student, teacher, "glyphs", **settings):
        step = state.step
        watched.noise.append(state.terms["noise"])
        watched.teacher.append(state.terms["teacher"])
        if step % EVERY == 0 or stopped.is_set():
            now = layers.masks(state.model)
            watched.flips.append(layers.mask_change(before, now))
            before, averaged = now, state.ema_model()
            yield *look(averaged, step), None
        else:
            yield None
        if stopped.is_set():
            break
    with tempfile.TemporaryDirectory() as folder:  # Gradio copies the file while the generator waits
        path = _packed(averaged, Path(folder), f"{base}-{pattern.replace(':', 'x')}")
        yield *_page(watched, aim, _drawn(layers.folded(averaged), noise, labels), steps, counts), path


def _settings(base: str) -> dict:
    """The training settings of the recipe, changed for a run of a minute."""
    full = recipe(student(base)).train
    return full | {"lr": LEARNING_RATE, "ema_decay": EMA_DECAY, "warmup": WARMUP, "batch_size": BATCH, "mixed_precision": "no"}


def _drawn(model: nn.Module, noise: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return diffusion.generate(model.eval(), noise, class_labels=labels, steps=SAMPLING_STEPS).float().cpu()


def _page(watched: Watched, aim: torch.Tensor, images: torch.Tensor, steps: int, counts: macs.Macs) -> tuple:
    """Pictures of teacher and student, the curves, and a line of words."""
    done = watched.steps[-1]  # fewer than `steps` at the end of a training that was stopped
    text = (
        f"Step **{done} of {steps}**. The student needs {si(counts.sparse)} MACs per picture and step, its teacher "
        f"{si(counts.dense)}. The classifier reads **{watched.right[-1]} of {len(images)}** of its letters right"
        f" ({watched.right[0]} before training); SSIM to the teacher's **{metrics.ssim(images, aim).mean():.2f}**."
    )
    cards = saved(plots.word_card(aim)), saved(plots.word_card(images, ink=plots.SPARSE_INK))
    return *cards, watched.figure() if watched.noise else None, text


def _packed(model: nn.Module, folder: Path, name: str) -> str:
    """A zip file of the student's packed folder."""
    folders.save_packed(layers.fold(model), folder / name, torch.float16)
    return shutil.make_archive(str(folder / name), "zip", folder, name)


def stop(request: gr.Request) -> str:
    """Ask this page's training to end after its step; the student so far can be downloaded."""
    stopping = running.get(request.session_hash or "")
    if stopping is None:
        return "Nothing is training."
    stopping.set()
    return "Stopping after this step."


def build(catalogue: Catalogue, job: dict) -> None:
    """The tab. `job` are the queue's options of every heavy event."""
    gr.HTML(
        "<p>The dense model gets masks and learns to live with them, as in SparseDM: the straight-through estimator lets pruned "
        "weights return, their decay holds them back, and the teacher's answers are learned too.</p>"
    )
    with gr.Row():
        base = gr.Radio(
            [(title, name) for name, title in LETTER_BASES.items()], value="glyphs-uvit", label="Teacher", min_width=160
        )
        pattern = gr.Dropdown(list(PATTERNS), value="2:4", label="Pattern", min_width=90)
        decay = gr.Slider(0, 0.01, 2e-4, step=1e-4, label="Decay of pruned weights", buttons=[], min_width=160)
        weight = gr.Slider(0, 1, 0.1, step=0.05, label="Teacher's weight", buttons=[], min_width=160)
        steps = gr.Slider(EVERY, MAX_STEPS, 100, step=EVERY, label="Steps", buttons=[], min_width=160)
    with gr.Row(elem_classes=["order"]):
        word = gr.Textbox("SPARSE", label="Word to watch", max_lines=1, scale=3)
        run = gr.Button("Train", variant="primary", min_width=90)
        halt = gr.Button("Stop", min_width=90)
    text = gr.Markdown(elem_id="tuning")
    with gr.Row():
        with gr.Column(elem_classes=["side", "left"], min_width=320):
            gr.HTML("<h2>Teacher</h2>")
            aim = gr.Image(show_label=False, label="Teacher", format="png", buttons=[], alt_text="What the teacher draws")
        with gr.Column(elem_classes=["side", "right"], min_width=320):
            gr.HTML("<h2>Student</h2>")
            now = gr.Image(show_label=False, label="Student", format="png", buttons=[], alt_text="What the student draws now")
    curves = gr.Plot(show_label=False, label="Loss and mask flips", elem_classes=["later"])
    title = "The packed student (zip); load it with sparsedm.load"
    file = gr.File(label=title, interactive=False, elem_classes=["later"])

    def train(base, pattern, decay, weight, steps, word, request: gr.Request):
        yield from tune(catalogue, request.session_hash or "", base, pattern, decay, weight, steps, word)

    inputs, outputs = [base, pattern, decay, weight, steps, word], [aim, now, curves, text, file]
    job = {**job, "show_progress_on": text, "api_name": "finetune", "api_description": about(tune)}
    gr.on([run.click, word.submit], train, inputs, outputs, **job)
    halt.click(stop, None, text, queue=False, api_visibility="private")
