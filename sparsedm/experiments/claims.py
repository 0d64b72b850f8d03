"""The claims of the papers, and the verdict of the stored results on each: holds, does not hold, or cannot be told.

Chance counts: a claim about FD-glyph holds, or does not, only if a t-test says so (`significance`).
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ..masking import layers
from ..masking.dense import default_rule
from ..masking.plain import weight_layers
from ..measure import macs
from ..models.uvit import UViTModel
from ..support import markdown
from . import results, rivals
from .recipes import RECIPES, Recipe
from .results import Row
from .significance import TOLERANCE, Chance, MissingEvidence, Score, between, chance, told_apart

HOLDS, FAILS, OPEN = "holds", "does not hold", "cannot be told"
HALF = 0.55  # share of the MACs that counts as half
CONSISTENT = 0.93  # SSIM that counts as close to the original's pictures: the Diff-Pruning paper's on CIFAR-10
FASTER = 1.1  # speed-up that counts as faster


@dataclass(frozen=True)
class Verdict:
    """The judgement on a claim.

    Attributes:
        word: HOLDS, FAILS or OPEN.
        figures: the scores that the word rests on, as text.
    """

    word: str
    figures: str

    def __str__(self) -> str:
        return f"**{self.word}**: {self.figures}"


class Evidence:
    """The stored results of one teacher and its students, by suite and by the recipe's role ("2x4", "diffpruned")."""

    def __init__(self, base: str):
        self.base = base
        suites = (*results.SUITES, "rivals")
        self._rows = {(row.recipe.suite, row.recipe.role): row for suite in suites for row in results.load(suite, base)}

    def short(self, role: str) -> Row:
        """The row of the short suite. Raises MissingEvidence if the recipe was not run."""
        return self._row("short", role)

    def long(self, role: str) -> Row:
        """The row of the headline suite. Raises MissingEvidence if the recipe was not run."""
        return self._row("headline", role)

    def one_shot(self, role: str) -> Row:
        """The row of the suite without training. Raises MissingEvidence if the recipe was not run."""
        return self._row("one-shot", role)

    def rival(self, role: str) -> Row:
        """The row of the suite of other ways to save time. Raises MissingEvidence if the recipe was not run."""
        return self._row("rivals", role)

    def _row(self, suite: str, role: str) -> Row:
        if row := self._rows.get((suite, role)):
            return row
        own = (known for name, known in RECIPES.items() if (known.base or name) == self.base)
        methods = {(known.suite, known.role): known.method for known in own}
        raise MissingEvidence(methods[suite, role])

    @functools.cached_property
    def chance(self) -> Chance:
        return chance()

    def compare(self, a: Row, b: Row) -> int:
        """-1 if FD-glyph of `a` is the lower one, 1 if that of `b` is, 0 if chance may explain the difference."""
        return self.chance.compare(Score.of(a), Score.of(b))

    def within(self, a: Row, b: Row) -> int:
        """-1 if FD-glyph of `a` is at most `TOLERANCE` times that of `b`, 1 if more, 0 if chance may explain the difference."""
        return self.chance.within(Score.of(a), Score.of(b))

    def better(self, row: Row, rivals: Sequence[Row]) -> Verdict:
        """Whether a row is better than every one of the others."""
        scores = ", ".join(f"{rival.fd:.2f} ({rival.recipe.method})" for rival in rivals)
        return Verdict(_all(self.compare(row, rival) for rival in rivals), f"{row.fd:.2f} against {scores}")


def _all(outcomes: Iterable[int]) -> str:
    """The word for a claim that holds if every outcome is -1 and does not if one is 1."""
    signs = set(outcomes)
    return FAILS if 1 in signs else HOLDS if signs == {-1} else OPEN


def _half(key: str) -> Callable[[Evidence], Verdict]:
    def judge(evidence: Evidence) -> Verdict:
        row, teacher = evidence.long(key), evidence.long("teacher")
        products = [model.runs[0]["macs"]["attention"] for model in (row, teacher)]
        share, layers_alone = row.macs / teacher.macs, (row.macs - products[0]) / (teacher.macs - products[1])
        shares = f"{share:.0%} of the MACs, {layers_alone:.0%} without attention's products"
        if row.recipe.pattern and teacher.recipe.model[0] is UViTModel:
            shares += f"; {_skips_dense(teacher.recipe, row.recipe.pattern) / teacher.macs:.0%} with skip_linear dense"
        return Verdict(HOLDS if share <= HALF else FAILS, shares)

    return judge


def _skips_dense(teacher: Recipe, pattern: str) -> int:
    """MACs of a U-ViT whose skip_linear layers are left out, as in the paper's quality experiments."""
    cls, config = teacher.model
    model = cls(**config)
    excluded = default_rule(model)
    dense = [name for name, _ in weight_layers(model) if excluded(name) or name.endswith(".skip_linear")]
    return macs.count(layers.sparsify(model, pattern, exclude=dense)).sparse


def _kept(key: str) -> Callable[[Evidence], Verdict]:
    """The quality of a headline model against the teacher's, and the dense model's after the same training at both rates."""

    def judge(evidence: Evidence) -> Verdict:
        row, teacher, rival, gentle = (evidence.long(name) for name in (key, "teacher", "more", "more-gentle"))
        word = _all(evidence.within(row, other) for other in (teacher, rival, gentle))
        dense = f"dense with the same extra training {rival.fd:.2f}, at lr 3e-4 {gentle.fd:.2f}"
        return Verdict(word, f"{row.fd:.2f}; teacher {teacher.fd:.2f}, {dense}")

    return judge


def _better(a: str, *others: str, rows: Callable[[Evidence, str], Row] = Evidence.short) -> Callable[[Evidence], Verdict]:
    return lambda evidence: evidence.better(rows(evidence, a), [rows(evidence, name) for name in others])


def _teacher_helps(evidence: Evidence) -> Verdict:
    verdict, alone = _better("2x4", "2x4-srste")(evidence), evidence.short("2x4-teacher-only")
    better = evidence.compare(alone, evidence.short("2x4-srste")) == -1
    return Verdict(verdict.word, f"{verdict.figures}; teacher's loss alone {alone.fd:.2f}{', which is better' if better else ''}")


def _fixed(evidence: Evidence) -> Verdict:
    """The runs at a constant rate, as in the paper, decide: a falling rate leaves little to the last pattern."""
    verdict = _better("2x4-constant", "2x4-progressive-constant")(evidence)
    falling = [evidence.short(key).fd for key in ("2x4", "2x4-progressive")]
    return Verdict(verdict.word, f"{verdict.figures}; {falling[0]:.2f} against {falling[1]:.2f} with a rate that falls to 0")


def _faster(key: str) -> Callable[[Evidence], Verdict]:
    def judge(evidence: Evidence) -> Verdict:
        row = evidence.short(key)
        speedup = _timed(row)
        return Verdict(HOLDS if speedup >= FASTER else FAILS, f"{speedup:.2f} times faster; {row.timed_with}")

    return judge


def _equal_time(evidence: Evidence) -> Verdict:
    """2:4 against models of the same measured time: FD-glyph between those of two widths, on a logarithmic scale.

    The widest is the dense model, trained at the students' rate or at the rate that suits it better; both must agree.
    """
    row = evidence.short("2x4")
    time = 1 / _timed(row)
    rival, gentle = (_rival(evidence, dense, time) for dense in ("more", "more-gentle"))
    if rival is None or gentle is None:
        return Verdict(OPEN, f"no pruned model is as fast ({time:.2f} of the dense time)")
    words = {_all([evidence.chance.compare(Score.of(row), other)]) for other in (rival, gentle)}
    scores = f"{row.fd:.2f} against {rival.fd:.2f} at {time:.0%} of the dense time"
    if gentle != rival:  # the dense model is one of the two neighbours
        scores += f" ({gentle.fd:.2f} if the dense model counts at lr 3e-4)"
    return Verdict(words.pop() if len(words) == 1 else OPEN, scores)


def _rival(evidence: Evidence, dense: str, time: float) -> Score | None:
    """The score of a pruned model that takes this share of the dense time, or less; None if all pruned models take more."""
    widths = [(1.0, Score.of(evidence.short(dense)))]
    for key in ("diffpruned-most", "diffpruned", "diffpruned-quarter"):
        widths.append((1 / _timed(evidence.short(key)), Score.of(evidence.short(key))))
    return _at(time, widths) or (widths[0][1] if time > 1 else None)


def _at(time: float, points: Iterable[tuple[float, Score]]) -> Score | None:
    """The score at this time, between the nearest of the points (time, score); None outside of them."""
    for (t0, one), (t1, other) in itertools.pairwise(sorted(points)):
        if t0 <= time <= t1:
            return between(one, other, (time - t0) / (t1 - t0))
    return None


def _same_time(cached: bool) -> Callable[[Evidence], Verdict]:
    """The 2:4 student at the usual steps against its teacher, which saves as much time by DeepCache or by fewer steps."""

    def judge(evidence: Evidence) -> Verdict:
        student, usual = evidence.rival("2x4-50-steps"), evidence.rival("50-steps").name
        teacher = [row for row in rivals.rows(evidence.base) if row.recipe.draws == evidence.base]
        ways = [row for row in teacher if row.name == usual or (row.recipe.protocol.cache_interval > 1) == cached]
        time = _picture_ms(student)
        rival = _at(time, ((_picture_ms(row), Score.of(row)) for row in ways))
        if rival is None:
            return Verdict(OPEN, f"{student.fd:.2f}, but no such run of the teacher takes {time:.1f} ms a picture")
        word = _all([evidence.chance.compare(Score.of(student), rival)])
        return Verdict(word, f"{student.fd:.2f} against {rival.fd:.2f} at {time:.1f} ms a picture")

    return judge


def _picture_ms(row: Row) -> float:
    if (ms := rivals.picture_ms(row)) is None:
        raise MissingEvidence(f"time of {row.name}")
    return ms


def _timed(row: Row) -> float:
    if row.speedup is None:
        raise MissingEvidence(f"time of {row.name}")
    return row.speedup


def _cheap(evidence: Evidence) -> Verdict:
    """Diff-Pruning's 10 to 20 % of the training: the short run has a tenth of the teacher's, another run a fifth."""
    images = evidence.long("teacher").images
    rows = (
        (evidence.short("diffpruned"), evidence.short("teacher")),
        (evidence.long("diffpruned-fifth"), evidence.long("teacher")),
    )
    outcomes = {evidence.within(row, teacher) for row, teacher in rows}
    word = HOLDS if -1 in outcomes else FAILS if outcomes == {1} else OPEN
    scores = (f"{row.fd:.2f}, teacher {teacher.fd:.2f}, after {row.images / images:.0%} of its training" for row, teacher in rows)
    return Verdict(word, "; ".join(scores))


def _thresholds(evidence: Evidence) -> Verdict:
    keys = ("threshold-0.02", "diffpruned", "threshold-0.2")
    taylor = evidence.short("taylor")
    word = _all([evidence.compare(evidence.short("diffpruned"), taylor)])  # at the paper's threshold
    sweep = ", ".join(f"{evidence.short(key).fd:.2f} ({evidence.short(key).recipe.prune['threshold']:g})" for key in keys)
    return Verdict(word, f"{taylor.fd:.2f} with all timesteps, {sweep}")


def _consistent(evidence: Evidence) -> Verdict:
    rows = [evidence.short(key) for key in ("diffpruned", "scratch", "2x4")]
    pruned, scratch = (row.mean("ssim_to_base") for row in rows[:2])
    word = HOLDS if pruned >= CONSISTENT and pruned > scratch else FAILS
    return Verdict(word, "SSIM " + ", ".join(f"{r.mean('ssim_to_base'):.3f} ({r.recipe.method})" for r in rows))


# Paper, claim, judge.
CLAIMS = (
    ("SparseDM", "2:4 halves the MACs", _half("2x4")),
    ("SparseDM", "... at the same quality", _kept("2x4")),
    ("SparseDM", "better than removing channels at half the MACs", _better("2x4", "diffpruned", "magnitude")),
    ("SparseDM", "better than other ways to 2:4", _better("2x4", "2x4-asp", "2x4-ste", "2x4-srste", "2x4-teacher-only")),
    ("SparseDM", "better than Diff-Pruning at equal measured time", _equal_time),
    ("SparseDM", "the teacher's term helps", _teacher_helps),
    ("SparseDM", "a fixed 2:4 beats progressive patterns", _fixed),
    ("SparseDM", "it runs faster", _faster("2x4")),
    ("Diff-Pruning", "half the MACs", _half("diffpruned")),
    ("Diff-Pruning", "... at 10 to 20 % of the training, quality kept", _cheap),
    ("Diff-Pruning", "dropping noisy timesteps from the importance helps", _thresholds),
    ("Diff-Pruning", "pictures stay close to the original's", _consistent),
    ("Diff-Pruning", "better than magnitude, random, Taylor, scratch",
     _better("diffpruned", "magnitude", "random", "taylor", "scratch")),
    ("both", "2:4 on a pruned model beats 1:4 and harder pruning at about a quarter of the MACs",
     _better("diffpruned-2x4", "1x4", "diffpruned-quarter")),
    ("OBS-Diff", "OBS beats Wanda at 2:4, without training", _better("obs", "wanda", rows=Evidence.one_shot)),
    ("OBS-Diff", "... and timestep weights help", _better("weighted", "admm", rows=Evidence.one_shot)),
    ("rivals", "2:4 beats fewer steps of the teacher at equal measured time", _same_time(cached=False)),
    ("rivals", "... and DeepCache on the teacher", _same_time(cached=True)),
)  # fmt: skip


def verdicts(base: str, chance: Chance | None = None) -> list[Verdict]:
    """A verdict on every one of `CLAIMS` from one teacher's results; what has not been run cannot be told.

    `chance` takes the place of the deviation that all stored runs have together.
    """
    evidence = Evidence(base)
    if chance:
        evidence.chance = chance
    return [_judged(judge, evidence) for _, _, judge in CLAIMS]


def _judged(judge: Callable[[Evidence], Verdict], evidence: Evidence) -> Verdict:
    try:
        return judge(evidence)
    except MissingEvidence as missing:
        return Verdict(OPEN, f"not run ({missing})")


_RULES = (
    "*Scores* are FD-glyph where nothing else is said. They are those of the short runs; *the same quality* and a fifth of the"
    " training are judged by the long runs, which have more pictures and sampling steps, OBS-Diff by those without training.",
    "*Better* means better than every rival that is named. The claim does not hold if one rival is better.",
    f"*The same quality*: FD-glyph is at most {TOLERANCE - 1:.0%} above the teacher's, and above the dense model's after the same"
    " extra training, at either learning rate (t-test, one side).",
    f"*Half the MACs*: at most {HALF:.0%}.",
    f"*Faster*: by {FASTER - 1:.0%}, both models in the fastest of eager, channels-last, compiled and oneDNN.",
    "*Equal time*: the rival's score is interpolated, on a logarithmic scale, between the two models nearest in time, among the"
    " pruned ones and the dense one.",
    f"*Close to the original*: SSIM of at least {CONSISTENT}, the paper's on CIFAR-10, and above that of the same shape from"
    " scratch.",
)


def table(bases: tuple[str, ...] = ("glyphs-uvit", "glyphs-unet")) -> str:
    """The claims and their verdicts as a Markdown table, one column per teacher."""
    columns = [verdicts(base) for base in bases]
    names = [results.load("headline", base)[0].recipe.backbone for base in bases]
    rows = ((paper, claim, *cells) for (paper, claim, _), *cells in zip(CLAIMS, *columns, strict=True))
    notes = "\n".join(f"- {note}" for note in (*_RULES, told_apart()))
    return f"{markdown.table(('paper', 'claim', *names), rows)}\n\n{notes}"
