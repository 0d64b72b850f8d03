"""Tables, verdicts and figures from stored results: here from invented ones, whose outcome is known."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sparsedm import claims, evaluation, figures, results
from sparsedm.recipes import RECIPES, run_name

BASE = "glyphs-unet"


@pytest.fixture
def store(monkeypatch, tmp_path):
    """`store(name, fd, seed=0, ...)` stores a run's results."""
    monkeypatch.setattr(results, "RESULTS", tmp_path)

    def add(name: str, fd: float, seed: int = 0, macs: int = 1000, ssim: float = 0.9, **changes) -> None:
        found = RECIPES[name]
        protocol = vars(found.protocol) | {"seed": found.protocol.seed + seed}
        result = {
            "scores": {"fd_glyph": fd, "readability": 0.5, "ssim_to_base": ssim}, "macs": {"sparse": macs, "attention": 0},
            "train_images": 64_000 if found.train else 0, "nonzero_parameters": 10, "protocol": protocol,
            "curve": [{"step": 0, "fd_glyph": 9.0}, {"step": 1000, "fd_glyph": fd}] if found.watch else [], **changes,
        }  # fmt: skip
        (tmp_path / f"{run_name(name, seed)}.json").write_text(json.dumps(result))

    return add


@pytest.fixture
def runs(store):
    """A teacher and some students, the seeds 10 % apart."""
    store(BASE, 2.0)
    store(f"{BASE}-short-teacher", 2.0)
    for seed, fd in enumerate((2.9, 3.0, 3.2)):
        store(f"{BASE}-short-2x4", fd, seed, 500)
    store(f"{BASE}-short-2x4-srste", 3.2, macs=500)
    store(f"{BASE}-short-2x4-teacher-only", 4.5, macs=500)
    store(f"{BASE}-short-2x4-progressive", 4.0, macs=500)
    store(f"{BASE}-short-diffpruned", 5.0, macs=520, ssim=0.96)
    store(f"{BASE}-short-magnitude", 6.0, macs=520)
    return store


def timed(path, **speedups) -> None:
    names = {key: f"{BASE}-short-{key.replace('_', '-').strip('-')}" for key in speedups}
    rows = [{"name": names[key], "speedup": value, "speedup_over_onednn": 0.8 * value} for key, value in speedups.items()]
    (path / "bench-methods.json").write_text(json.dumps({"rows": rows}))


def test_seeds_make_one_row_with_mean_and_deviation(runs):
    lines = results.short_table(BASE).splitlines()
    methods = [line.split("|")[1].strip() for line in lines[2:-2]]
    assert methods == [
        "teacher", "2:4, SparseDM", "2:4, SR-STE without teacher", "2:4, SparseDM, progressive",
        "2:4, teacher's loss only", "Diff-Pruning",
        "magnitude pruning",
    ]  # fmt: skip
    assert "| 2:4, SparseDM | 50% | 3.03 ± 0.17 | 50.0% | 0.900 |  |" in lines
    assert "| teacher | 100% | 2.00 | 50.0% |  |  |" in lines


def test_times_count_for_all_of_the_same_cost(runs, tmp_path):
    timed(tmp_path, **{"2x4": 1.5, "diffpruned": 2.0})
    rows = {row.name.removeprefix(f"{BASE}-short-"): row.speedup for row in results.load("short", BASE)}
    assert rows["2x4"] == rows["2x4-srste"] == 1.5 and rows["magnitude"] == 2.0 and rows["teacher"] is None


def test_results_of_other_protocols_are_not_mixed(runs):
    runs(f"{BASE}-short-random", 5.0, protocol={**vars(RECIPES[BASE].protocol), "n": 17})
    with pytest.raises(ValueError, match="2 protocols among the short results"):
        results.load("short", BASE)


def test_scores_are_told_apart_by_a_t_test_with_the_spread_of_all_seeds(runs):
    for seed, fd in enumerate((8.0, 9.0)):
        runs(f"{BASE}-short-diffpruned", fd, seed, 520)
    a, b = np.log([2.9, 3.0, 3.2]), np.log([8.0, 9.0])
    deviation = np.sqrt((((a - a.mean()) ** 2).sum() + ((b - b.mean()) ** 2).sum()) / 3)
    found = claims.chance()
    assert (found.deviation, found.freedom) == (pytest.approx(deviation), 3)
    one, three = claims.Score(3.0), claims.Score(3.0, 3)
    for runs_of_each, mine in (((1, 1), one), ((3, 1), three)):
        reach = 3.1824 * deviation * np.sqrt(sum(1 / n for n in runs_of_each))  # 95 % of Student's t lies within it
        assert found.reach(*runs_of_each) == pytest.approx(reach, rel=1e-4)
        for sign in (1, -1):
            assert found.compare(mine, claims.Score(3.0 * np.exp(0.99 * sign * reach))) == 0
            assert found.compare(mine, claims.Score(3.0 * np.exp(1.01 * sign * reach))) == -sign
    between = claims._between(claims.Score(2.0, 3), claims.Score(8.0), 0.5)
    assert between.fd == pytest.approx(4.0) and 1 / between.runs == pytest.approx((1 / 3 + 1) / 4)


def test_without_seeds_nothing_is_told_apart(store):
    for end in ("", "-2x4", "-short-teacher", "-short-2x4", "-short-2x4-progressive", "-more"):
        store(BASE + end, 2.0)
    assert "how large chance is: no method has several seeds" in claims.table((BASE,))
    verdict = dict(zip([claim for _, claim, _ in claims.CLAIMS], claims.verdicts(BASE), strict=True))
    assert verdict["a fixed 2:4 beats progressive patterns"] == claims.Verdict(claims.OPEN, "not run (several seeds of a method)")


def test_verdicts_take_the_seeds_into_account(runs):
    verdict = dict(zip([claim for _, claim, _ in claims.CLAIMS], claims.verdicts(BASE), strict=True))
    helps = verdict["the teacher's term helps"]
    assert helps.word == claims.OPEN and helps.figures.endswith("3.20 (2:4, SR-STE without teacher); teacher's loss alone 4.50")
    assert verdict["a fixed 2:4 beats progressive patterns"].word == claims.HOLDS
    assert verdict["pictures stay close to the original's"].figures == "not run (pruned shape from scratch)"
    assert verdict["... at 10 to 20 % of the training, quality kept"].word == claims.FAILS
    runs(f"{BASE}-short-2x4-srste", 2.0, macs=500)
    assert claims.Evidence(BASE).better("2x4", ["2x4-srste", "2x4-progressive"]).word == claims.FAILS


@pytest.mark.parametrize(("speedup", "word"), [(1.5, claims.HOLDS), (1.3, claims.FAILS)])
def test_faster_is_faster_than_onednn_too(runs, tmp_path, speedup, word):
    timed(tmp_path, **{"2x4": speedup})
    verdict = claims._faster("2x4")(claims.Evidence(BASE))
    assert verdict.figures.startswith(f"{speedup:.2f} times faster, {0.8 * speedup:.2f} over oneDNN") and verdict.word == word


def test_equal_time_is_between_two_widths(runs, tmp_path):
    runs(f"{BASE}-short-more", 2.0)
    runs(f"{BASE}-short-more-gentle", 2.5)
    runs(f"{BASE}-short-diffpruned-most", 4.0, macs=800)
    runs(f"{BASE}-short-diffpruned-quarter", 8.0, macs=250)
    timed(tmp_path, **{"2x4": 1 / 0.8, "diffpruned": 1 / 0.5, "diffpruned_most": 1 / 0.6, "diffpruned_quarter": 1 / 0.3})
    verdict = claims._equal_time(claims.Evidence(BASE))  # 0.8 is half way, logarithmically, from 2.0 (at 1) to 4.0 (at 0.6)
    assert verdict.figures == "3.03 against 2.83 at 80% of the dense time (3.16 if the dense model counts at lr 3e-4)"
    assert verdict.word == claims.OPEN


@pytest.mark.parametrize(
    "table", [results.headline_table, claims.table, *(lambda b=b: results.short_table(b) for b in results.bases())]
)
def test_rows_of_stored_tables_have_as_many_cells_as_their_head(table):
    counts = {line.count("|") for line in table().splitlines() if line.startswith("|")}
    assert len(counts) == 1 and counts.pop() > 4


def test_figures_are_drawn(runs, tmp_path):
    timed(tmp_path, **{"2x4": 1.5, "diffpruned": 2.0})
    for key in ("teacher", "2x4", "diffpruned"):
        name = f"{BASE}-short-{key}"
        path = evaluation.samples_file(tmp_path / "runs" / name, RECIPES[name].protocol)
        path.parent.mkdir(parents=True)
        save_file({"images": torch.randint(0, 255, (20, 1, 16, 16), dtype=torch.uint8)}, path)
    drawn = list(figures.draw(BASE, tmp_path / "figures", tmp_path / "runs"))
    assert [path.name for path in drawn] == [f"{BASE}-{kind}.png" for kind in ("macs", "latency", "training", "grid")]
    assert all(path.stat().st_size > 10_000 for path in drawn)
    assert list(figures.pictures(BASE, tmp_path / "runs")) == ["teacher", "2:4, SparseDM", "Diff-Pruning"]


def test_unknown_suites_are_refused():
    with pytest.raises(ValueError, match="unknown suite 'long'; known: headline, short"):
        results.load("long")
