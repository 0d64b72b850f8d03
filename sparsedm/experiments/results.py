"""The stored results of the experiments, as tables and model cards."""

import functools
import json
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from ..checkpoints import folders
from ..masking.nm import NMPattern
from ..measure import cards, judges
from ..support import markdown
from .recipes import RECIPES, Recipe, recipe, run_name

RESULTS = folders.ASSETS / "results"
RESULTS_FILE = "results.json"  # of a run, in its folder
SUITES = ("headline", "short", "one-shot")  # on the letter models, each under one protocol
_SEEDS = "±: largest deviation of two or three seeds."
_FASTER = (
    "Times faster: the dense model's time for a step of 16 pictures, divided by this model's (float32, two threads, each model in"
    " the fastest of eager, channels-last, compiled and oneDNN). Models of the same shape and pattern share one measurement."
)


@dataclass(frozen=True)
class Row:
    """A recipe and its stored runs, one per seed, in the order of the seeds; there is at least one."""

    name: str
    recipe: Recipe
    runs: tuple[dict, ...]

    def mean(self, score: str) -> float:
        """Mean of a score over the seeds."""
        return statistics.mean(run["scores"][score] for run in self.runs)

    @property
    def fd(self) -> float:
        """The Fréchet distance on the features of the data's judge."""
        return self.mean(_distance(self.runs[0]))

    @property
    def fd_text(self) -> str:
        """This distance as tables show it, with the largest deviation of a seed if there are several."""
        deviation = max(abs(run["scores"][_distance(run)] - self.fd) for run in self.runs)
        return f"{self.fd:.2f}" + (f" ± {deviation:.2f}" if len(self.runs) > 1 else "")

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one picture and step, zeros skipped, attention's products included."""
        return self.runs[0]["macs"]["sparse"]

    @property
    def images(self) -> int:
        """Training pictures."""
        return self.runs[0]["train_images"]

    @property
    def speedup(self) -> float | None:
        """How many times faster than the teacher's a step is, both as they run fastest (`_FASTER`); None if not measured."""
        return self._timed.get("speedup_best")

    @property
    def timed_with(self) -> str:
        """The batch and the threads of these times."""
        return f"{self._timed['what'].partition(', ')[2]}, {self._timed['threads']} threads"

    @functools.cached_property
    def _timed(self) -> dict:
        return next((row for row in times() if row["name"] == _timed_as(self.name)), {})


def _judge(run: dict) -> judges.Judge:
    """Whose features gave a stored run its Fréchet distance."""
    return next(judge for judge in judges.JUDGES if f"fd_{judge.name}" in run["scores"])


def _distance(run: dict) -> str:
    return f"fd_{_judge(run).name}"


def pictures(name: str) -> Image.Image | None:
    """One picture of every character by the model of a stored run, in two rows; None if the package has no such picture."""
    path = RESULTS / f"{name}.png"
    return Image.open(path).convert("RGB") if path.exists() else None


def load(suite: str, base: str = "") -> list[Row]:
    """The stored results of a suite ("headline", "faces", "paper", ...), of one teacher and its students or of all.

    Raises:
        ValueError: unknown suite, or runs that were scored by different protocols and must not stand in one table.
    """
    if suite not in (*SUITES, "rivals", "faces", "paper"):
        raise ValueError(f"unknown suite {suite!r}; known: {', '.join(SUITES)}, rivals, faces, paper")
    rows = []
    for name, known in RECIPES.items():
        if known.suite == suite and base in ("", known.base or name):
            paths = (RESULTS / f"{run_name(name, seed)}.json" for seed in range(known.seeds))
            runs = tuple(json.loads(path.read_text()) for path in paths if path.exists())
            if runs:
                rows.append(Row(name, known, runs))
    if suite != "rivals":  # which differ in sampling
        _one_protocol(rows, suite)
    return rows


def _one_protocol(rows: list[Row], what: str) -> None:
    protocols = {json.dumps({**run["protocol"], "seed": 0}) for row in rows for run in row.runs}
    if len(protocols) > 1:
        raise ValueError(f"{len(protocols)} protocols among the {what} results in {RESULTS}; score them all under one")


def times() -> list[dict]:
    """The stored rows of `sparsedm bench --what methods`."""
    path = RESULTS / "bench-methods.json"
    return json.loads(path.read_text())["rows"] if path.exists() else []


def _timed_as(name: str) -> str:
    """The recipe whose measured time counts: the first of the same teacher with the same pattern and number of channels."""
    return next((other for other in timed_recipes() if _cost(other) == _cost(name)), "")


def timed_recipes() -> list[str]:
    """One recipe of the short suite for every width, and for every pattern that has kernels."""
    first = {}
    for name, known in RECIPES.items():
        quick = known.prune or (known.pattern and NMPattern.parse(known.pattern).m == 4)
        if known.suite == "short" and quick:
            first.setdefault(_cost(name), name)
    return list(first.values())


def _cost(name: str) -> tuple[str, str, float]:
    """The teacher, the pattern and the share of pruned channels: recipes that agree in all three take the same time."""
    known = recipe(name)
    return known.base or name, known.pattern, known.prune.get("ratio", 0.0)


SUMMARY = ("teacher", "more", "2x4", "diffpruned")  # roles


def summary_table() -> str:
    """Each teacher, the dense baseline and the students at half the MACs, as a Markdown table."""
    rows = [row for row in load("headline") if row.recipe.role in SUMMARY]
    teachers = [row.name for row in rows if row.recipe.role == "teacher"]
    rows.sort(key=lambda row: (teachers.index(row.recipe.base or row.name), SUMMARY.index(row.recipe.role)))
    head = ("model", "FD-glyph ↓", "M MACs", "times faster ↑", "MB")
    caption = f"""FD-glyph measures quality: the Fréchet distance on a glyph classifier's features ({_drawn(rows[0].runs[0])});
        it is not FID. {_SEEDS} MACs: multiply-accumulates per picture and step, zeros skipped. {_FASTER}
        MB: the float16 file, without the zeros of 2:4 layers."""
    return f"{markdown.table(head, map(_summary_row, rows))}\n\n{' '.join(caption.split())}"


def _summary_row(row: Row) -> tuple:
    dense = not row.recipe.pattern and not row.recipe.prune
    faster = "1" if dense else f"{row.speedup:.2f}" if row.speedup else ""
    return row.recipe.title, row.fd_text, f"{row.macs / 1e6:.1f}", faster, f"{_bytes(row) / 1e6:.1f}"


def _bytes(row: Row) -> int:
    """The bytes of the weights in float16, of bundled N:M models without their zeros."""
    if not (row.recipe.pattern and row.name in folders.bundled()):
        return row.runs[0]["bytes"]
    with tempfile.TemporaryDirectory() as temporary:
        folders.save(folders.load(row.name), Path(temporary, "model"), torch.float16, packed=True)
        return folders.bytes_of(Path(temporary, "model"))


def headline_table() -> str:
    """The letters' models that were trained long, as a Markdown table."""
    return _trained_table(load("headline"), "readability")


def faces_table() -> str:
    """The faces' teachers and their students as a Markdown table."""
    return _trained_table(load("faces"), "attributes right")


def _trained_table(rows: list[Row], right: str) -> str:
    """A row per model; `right` is the title of the share of what was asked that the judge reads."""
    distance = f"FD-{_judge(rows[0].runs[0]).name} ↓"
    head = ("model", distance, f"{right} ↑", "SSIM to teacher ↑", "M MACs", "nonzero weights", "training pictures")
    caption = f"{_caption(rows[0].runs[0])} {_SEEDS} The bundled models are those of seed 0."
    return f"{markdown.table(head, map(_headline_row, rows))}\n\n{caption}"


def _headline_row(row: Row) -> tuple:
    return (
        row.recipe.title, row.fd_text, f"{row.mean(_judge(row.runs[0]).accuracy):.1%}", _ssim(row), f"{row.macs / 1e6:.1f}",
        f"{row.runs[0]['nonzero_parameters'] / 1e6:.2f} M",
        f"{'+ ' if row.recipe.base and row.images else ''}{row.images // 1000} k" if row.images else "none",
    )  # fmt: skip


def _ssim(row: Row) -> str:
    return f"{row.mean('ssim_to_base'):.3f}" if row.recipe.base and row.name not in teachers() else ""


def teachers() -> tuple[str, ...]:
    """The recipes of the short suite that score the teachers themselves."""
    short = (name for name, known in RECIPES.items() if known.suite == "short" and not known.train)
    return tuple(name for name in short if not any(_cost(name)[1:]))


def bases() -> tuple[str, ...]:
    """The teachers of the short suite."""
    return tuple(recipe(name).base for name in teachers())


def short_table(base: str) -> str:
    """One teacher and its students of the short suite as a Markdown table: most MACs first, then the best."""
    rows = load("short", base)
    whole = next(row.macs for row in rows if row.name in teachers())
    rows.sort(key=lambda row: (row.name not in teachers(), -round(row.macs / whole, 1), row.fd))
    head = ("method", "MACs", "FD-glyph ↓", "readability ↑", "SSIM to teacher ↑", "times faster ↑")
    training = f"Training: {max(row.images for row in rows) // 1000} k pictures each."
    caption = f"{_caption(rows[0].runs[0])} {training} {_SEEDS} {_FASTER}"
    return f"{markdown.table(head, (_short_row(row, whole) for row in rows))}\n\n{caption}"


def _short_row(row: Row, whole: int) -> tuple:
    return (
        row.recipe.method, f"{row.macs / whole:.0%}", row.fd_text, f"{row.mean('readability'):.1%}", _ssim(row),
        f"{row.speedup:.2f}" if row.speedup else "",
    )  # fmt: skip


def one_shot_table() -> str:
    """The teachers and what calibration alone makes of them, as a Markdown table: a teacher's students by MACs, then the best."""
    plain = [row for row in load("short") if row.recipe.role in ("teacher", "2x4-oneshot")]  # of the same protocol
    rows = plain + load("one-shot")
    _one_protocol(rows, "one-shot and short")
    rows.sort(key=lambda row: (bases().index(row.recipe.base), -round(row.macs / 1e6), row.fd))
    head = ("model", "M MACs", "FD-glyph ↓", "readability ↑", "SSIM to teacher ↑", "calibration inputs", "training pictures")
    return f"{markdown.table(head, map(_one_shot_row, rows))}\n\n{_caption(rows[0].runs[0])}"


def _one_shot_row(row: Row) -> tuple:
    return (
        row.recipe.title, f"{row.macs / 1e6:.1f}", row.fd_text, f"{row.mean('readability'):.1%}", _ssim(row),
        f"{row.recipe.calibrate['n']:,}" if row.recipe.calibrate else "none", f"{row.images:,}" if row.images else "none",
    )  # fmt: skip


def paper_bases() -> tuple[str, ...]:
    """The teachers of the papers' size that have stored results, or whose students have."""
    stored = (name for name in RECIPES if RECIPES[name].suite == "paper" and (RESULTS / f"{name}.json").exists())
    bases = {RECIPES[name].base or name for name in stored}
    return tuple(name for name in RECIPES if name in bases)


def paper_table(base: str) -> str:
    """One teacher of the papers' size and its students as a Markdown table: most MACs first, then the best."""
    rows = sorted(load("paper", base), key=lambda row: (-row.macs, row.mean("fid") if "fid" in row.runs[0]["scores"] else 0.0))
    head = ("model", "FID ↓", "SSIM to teacher ↑", "G MACs", "M nonzero weights", "training pictures")
    caption = (
        f"{_drawn(rows[0].runs[0])}. MACs: per picture and step, zeros skipped. FID: where Inception's weights were at hand."
    )
    return f"{markdown.table(head, map(_paper_row, rows))}\n\n{caption}"


def _paper_row(row: Row) -> tuple:
    scores, run = row.runs[0]["scores"], row.runs[0]
    return (
        row.recipe.title, f"{scores['fid']:.2f}" if "fid" in scores else "", _ssim(row) if "ssim_to_base" in scores else "",
        f"{row.macs / 1e9:.2f}", f"{run['nonzero_parameters'] / 1e6:.1f}", f"{row.images / 1e6:.1f} M" if row.images else "none",
    )  # fmt: skip


def _drawn(result: dict) -> str:
    protocol = result["protocol"]
    return (
        f"n = {protocol['n']:,} pictures a row, {protocol['sampler'].upper()} with {protocol['steps']} steps,"
        f" guidance {protocol['guidance']:g}, {protocol['precision']}"
    )


def _caption(result: dict) -> str:
    judge = _judge(result)
    return (
        f"{_drawn(result)}, against as many test {judge.data}. MACs: per picture and step, zeros skipped. FD-{judge.name} is the"
        f" Fréchet distance on the {judge.name} classifier's features; it is not FID."
    )


_ORIGIN = {
    "glyphs": "It draws characters like those of the fonts that matplotlib ships.",
    "faces": "It draws cartoon faces like those of this package's own code.",
}


def card(name: str, result: dict) -> str:
    """The model card (Markdown) of a bundled checkpoint."""
    chosen = recipe(name)
    lines = [
        f"# {name}", "", f"{chosen.title}. {_how(chosen, result['train'])}. Made by `{result['command']}`.", "",
        f"- Weights: float16, {cards.weights(result['parameters'], result['nonzero_parameters'])}.",
        f"- {cards.macs(result['macs']['dense'], result['macs']['sparse'])}", "",
        cards.scores({name: value for name, value in result["scores"].items() if name != "n"}), "",
        _caption(result), "",
        f"Licence: MIT, as the package. {_ORIGIN[chosen.data]}", "",
    ]  # fmt: skip
    return "\n".join(lines)


def _how(chosen: Recipe, train: dict) -> str:
    """How the model was made, in a sentence."""
    if chosen.calibrate and not train:
        return f"Calibrated from `{chosen.base}` with {chosen.calibrate['n']:,} noised pictures of `{chosen.data}`, not trained"
    training = f"on `{chosen.data}` for {train['steps']:,} steps of {train['batch_size']}"
    if not chosen.base:
        return f"Trained from random weights {training}"
    how = f"Fine-tuned from `{chosen.base}` {training}"
    if chosen.prune:
        how += f", without {chosen.prune['ratio']:.0%} of its channels (Diff-Pruning, arXiv 2305.10924)"
    if chosen.distil:
        how += ", masks by SR-STE, knowledge transferred from the dense teacher (SparseDM, arXiv 2404.10445)"
    return how
