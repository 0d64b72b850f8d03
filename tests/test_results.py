"""Tables, verdicts and figures from stored results: here from invented ones, whose outcome is known."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sparsedm.experiments import claims, figures, results
from sparsedm.experiments.recipes import RECIPES, run_name
from sparsedm.measure import evaluation

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
    rows = [{"name": names[key], "speedup_best": value, "speedup": 1.25 * value} for key, value in speedups.items()]
    rows = [{**row, "what": f"{row['name']}, batch 3", "threads": 5} for row in rows]
    (path / "bench-methods.json").write_text(json.dumps({"rows": rows}))


def verdict(claim: str) -> claims.Verdict:
    return next(found for (_, name, _), found in zip(claims.CLAIMS, claims.verdicts(BASE), strict=True) if name == claim)


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


def test_faces_have_a_table_by_their_own_judge(store):
    for name, fd in (("faces-unet", 4.0), ("faces-unet-2x4-calibrated", 5.0)):
        store(name, 0.0, scores={"fd_face": fd, "attribute_accuracy": 0.98, "ssim_to_base": 0.9})
    lines = results.faces_table().splitlines()
    assert lines[0].startswith("| model | FD-face ↓ | attributes right ↑ |") and "test faces" in lines[-1]
    assert lines[2].startswith("| UNet teacher | 4.00 | 98.0% |  |")
    assert lines[3].startswith("| UNet 2:4, calibrated, no training | 5.00 | 98.0% | 0.900 |")


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
    own = f"most of all, {b.std(ddof=1):.0%}, in {RECIPES[f'{BASE}-short-diffpruned'].title})"
    assert own in claims.table((BASE,))
    one, three = claims.Score(3.0), claims.Score(3.0, 3)
    for runs_of_each, mine in (((1, 1), one), ((3, 1), three)):
        reach = 3.1824 * deviation * np.sqrt(sum(1 / n for n in runs_of_each))  # 95 % of Student's t lies within it
        assert found.reach(*runs_of_each) == pytest.approx(reach, rel=1e-4)
        for sign in (1, -1):
            assert found.compare(mine, claims.Score(3.0 * np.exp(0.99 * sign * reach))) == 0
            assert found.compare(mine, claims.Score(3.0 * np.exp(1.01 * sign * reach))) == -sign
        reach *= 2.3534 / 3.1824  # 95 % of Student's t lies below it
        for share, word in ((0.99, 0), (1.01, 1)):
            for sign in (1, -1):
                assert found.within(mine, claims.Score(3.0 / 1.1 / np.exp(share * sign * reach))) == word * sign
    between = claims.between(claims.Score(2.0, 3), claims.Score(8.0), 0.5)
    assert between.fd == pytest.approx(4.0) and 1 / between.runs == pytest.approx((1 / 3 + 1) / 4)


def test_without_seeds_nothing_is_told_apart(store):
    for end in ("", "-2x4", "-short-teacher", "-short-2x4", "-short-2x4-progressive", "-more", "-more-gentle"):
        store(BASE + end, 2.0)
    assert "how large chance is: no method has several seeds" in claims.table((BASE,))
    assert verdict("... at the same quality") == claims.Verdict(claims.OPEN, "not run (several seeds of a method)")


def test_verdicts_take_the_seeds_into_account(runs):
    helps = verdict("the teacher's term helps")
    assert helps.word == claims.OPEN and helps.figures.endswith("3.20 (2:4, SR-STE without teacher); teacher's loss alone 4.50")
    assert verdict("better than removing channels at half the MACs").word == claims.HOLDS
    assert verdict("pictures stay close to the original's").figures == "not run (pruned shape from scratch)"
    runs(f"{BASE}-short-2x4-srste", 2.0, macs=500)
    rows = [claims.Evidence(BASE).short(role) for role in ("2x4", "2x4-srste", "2x4-progressive")]
    assert claims.Evidence(BASE).better(rows[0], rows[1:]).word == claims.FAILS


def test_a_mistake_in_a_judge_is_no_verdict(runs, monkeypatch):
    """Only missing evidence makes a claim "not run"; a wrong key fails."""
    for broken in (lambda found: {}["2x4"], lambda found: found.short("no such role")):
        monkeypatch.setattr(claims, "CLAIMS", (("SparseDM", "a claim", broken),))
        with pytest.raises(KeyError):
            claims.verdicts(BASE)


@pytest.mark.parametrize(("fd", "word"), [(1.75, claims.HOLDS), (2.2, claims.OPEN), (2.75, claims.FAILS)])
def test_cheap_is_a_tenth_or_a_fifth_of_the_teachers_training(runs, fd, word):
    assert (
        verdict("... at 10 to 20 % of the training, quality kept").figures
        == "not run (Diff-Pruning, a fifth of the teacher's training)"
    )
    runs(BASE, 2.0, train_images=640_000)
    runs(f"{BASE}-diffpruned-fifth", fd, train_images=128_000)
    found = verdict("... at 10 to 20 % of the training, quality kept")
    figures = f"5.00, teacher 2.00, after 10% of its training; {fd:.2f}, teacher 2.00, after 20% of its training"
    assert found == claims.Verdict(word, figures)


@pytest.mark.parametrize(("teacher", "dense", "gentle", "word"), [
    (2.0, 2.0, 2.0, claims.HOLDS), (2.0, 1.6, 2.0, claims.OPEN), (1.6, 2.0, 2.0, claims.OPEN), (2.0, 2.0, 1.6, claims.OPEN),
    (2.0, 1.0, 2.0, claims.FAILS), (1.0, 2.0, 2.0, claims.FAILS), (2.0, 2.0, 1.0, claims.FAILS),
])  # fmt: skip
def test_quality_is_kept_if_chance_does_not_explain_it(runs, teacher, dense, gentle, word):
    for end, fd in (("", teacher), ("-more", dense), ("-more-gentle", gentle), ("-2x4", 1.7)):
        runs(BASE + end, fd)
    rivals = f"teacher {teacher:.2f}, dense with the same extra training {dense:.2f}, at lr 3e-4 {gentle:.2f}"
    assert verdict("... at the same quality") == claims.Verdict(word, f"1.70; {rivals}")


@pytest.mark.parametrize(("taylor", "word"), [(7.0, claims.HOLDS), (5.2, claims.OPEN), (3.5, claims.FAILS)])
def test_dropping_timesteps_helps_if_the_papers_threshold_does(runs, taylor, word):
    for key, fd in (("taylor", taylor), ("threshold-0.02", 1.0), ("threshold-0.2", 9.0)):
        runs(f"{BASE}-short-{key}", fd)
    found = verdict("dropping noisy timesteps from the importance helps")
    assert found == claims.Verdict(word, f"{taylor:.2f} with all timesteps, 1.00 (0.02), 5.00 (0.05), 9.00 (0.2)")


@pytest.mark.parametrize(("ssim", "scratch", "word"), [
    (0.94, 0.9, claims.HOLDS), (0.92, 0.9, claims.FAILS), (0.94, 0.95, claims.FAILS),
])  # fmt: skip
def test_close_is_as_close_as_in_the_paper_and_closer_than_from_scratch(runs, ssim, scratch, word):
    runs(f"{BASE}-short-diffpruned", 5.0, ssim=ssim)
    runs(f"{BASE}-short-scratch", 9.0, ssim=scratch)
    assert verdict("pictures stay close to the original's").word == word


def test_fixed_and_progressive_are_judged_at_the_papers_constant_rate(runs):
    runs(f"{BASE}-short-2x4-constant", 3.0, macs=500)
    runs(f"{BASE}-short-2x4-progressive-constant", 3.1, macs=500)
    found = verdict("a fixed 2:4 beats progressive patterns")
    assert found.word == claims.OPEN and found.figures.startswith("3.00 against 3.10 (2:4, SparseDM, progressive, constant rate)")
    assert found.figures.endswith("3.03 against 4.00 with a rate that falls to 0")


@pytest.mark.parametrize(("speedup", "word"), [(1.12, claims.HOLDS), (1.04, claims.FAILS)])
def test_faster_is_faster_than_onednn_too(runs, tmp_path, speedup, word):
    timed(tmp_path, **{"2x4": speedup})
    found = verdict("it runs faster")
    assert found == claims.Verdict(word, f"{speedup:.2f} times faster; batch 3, 5 threads")


def test_equal_time_is_between_two_widths(runs, tmp_path):
    runs(f"{BASE}-short-more", 2.0)
    runs(f"{BASE}-short-more-gentle", 2.5)
    runs(f"{BASE}-short-diffpruned-most", 4.0, macs=800)
    runs(f"{BASE}-short-diffpruned-quarter", 8.0, macs=250)
    shares = {"2x4": 0.8, "diffpruned": 0.5, "diffpruned_most": 0.6, "diffpruned_quarter": 0.3}  # of the dense model's best time
    timed(tmp_path, **{name: 1 / share for name, share in shares.items()})
    claim = "better than Diff-Pruning at equal measured time"
    found = verdict(claim)  # 0.8 is half way, logarithmically, from 2.0 (at 1) to 4.0 (at 0.6)
    assert found.figures == "3.03 against 2.83 at 80% of the dense time (3.16 if the dense model counts at lr 3e-4)"
    assert found.word == claims.OPEN
    timed(tmp_path, **{name: 1 / share for name, share in {**shares, "2x4": 1.05}.items()})  # slower than the dense model
    assert verdict(claim).figures.startswith("3.03 against 2.00 at 105% of the dense time (2.50")
    timed(tmp_path, **{name: 1 / share for name, share in {**shares, "2x4": 0.2}.items()})  # faster than all
    assert verdict(claim).figures == "no pruned model is as fast (0.20 of the dense time)"
    timed(tmp_path, **{name: 1 / share for name, share in shares.items()})
    runs(f"{BASE}-short-more-gentle", 1.0)  # against which it loses, while against the other chance decides
    assert verdict(claim).word == claims.OPEN
    runs(f"{BASE}-short-more", 1.0)
    assert verdict(claim).word == claims.FAILS


def test_every_stored_run_says_how_it_was_made_and_what_came_out():
    facts = {"name", "command", "seed", "commit", "date", "machine", "scores", "curve", "protocol", "macs", "parameters",
             "bytes", "train", "train_images", "train_seconds"}  # fmt: skip
    stored = [run for suite in results.SUITES for row in results.load(suite) for run in row.runs]
    assert len(stored) > 80 and not [(run["name"], facts - set(run)) for run in stored if facts - set(run)]
    assert all(run["commit"] and run["name"] == run_name(run["command"].split()[4], run["seed"]) for run in stored)


@pytest.mark.parametrize(
    "table",
    [
        results.headline_table,
        results.one_shot_table,
        claims.table,
        *(lambda b=b: results.short_table(b) for b in results.bases()),
    ],
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


def test_one_shot_runs_stand_beside_magnitudes_mask(runs):
    runs(f"{BASE}-short-2x4-oneshot", 30.0, macs=500 * 10**6)
    runs(f"{BASE}-oneshot-recovered", 3.0, macs=500 * 10**6, train_images=4480)
    runs(f"{BASE}-oneshot-wanda", 20.0, macs=500 * 10**6)
    runs(f"{BASE}-oneshot-3x4", 2.5, macs=750 * 10**6)
    runs(f"{BASE}-short-teacher", 2.0, macs=1000 * 10**6)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in results.one_shot_table().splitlines()[2:-2]]
    assert [(row[0], row[2], *row[5:]) for row in rows] == [
        ("UNet teacher", "2.00", "none", "none"), ("UNet 3:4, ADMM", "2.50", "1,024", "none"),
        ("UNet 2:4, ADMM, a minute of recovery", "3.00", "1,024", "4,480"), ("UNet 2:4, Wanda", "20.00", "1,024", "none"),
        ("UNet 2:4, one-shot", "30.00", "none", "none"),
    ]  # fmt: skip
    runs(f"{BASE}-oneshot-obs", 3.0, protocol=vars(RECIPES[BASE].protocol))
    with pytest.raises(ValueError, match="2 protocols among the one-shot"):
        results.one_shot_table()


@pytest.mark.parametrize(("wanda", "word"), [(20.0, claims.HOLDS), (9.1, claims.OPEN), (4.0, claims.FAILS)])
def test_claims_on_calibration_rest_on_the_one_shot_runs(runs, wanda, word):
    claim = "OBS beats Wanda at 2:4, without training"
    runs(f"{BASE}-oneshot-obs", 9.0)
    assert verdict(claim).figures == "not run (2:4, Wanda)"
    runs(f"{BASE}-oneshot-wanda", wanda)
    assert verdict(claim) == claims.Verdict(word, f"9.00 against {wanda:.2f} (2:4, Wanda)")


def test_runs_of_the_papers_size_have_tables(store):
    assert results.paper_bases() == ()
    for name, fid, ssim in (
        ("cifar10-ddpm", 4.2, None),
        ("cifar10-ddpm-diffpruned", 5.3, 0.93),
        ("cifar10-ddpm-taylor", 5.5, 0.92),
    ):
        scores = {"n": 50_000, "fid": fid} | ({"ssim_to_base": ssim} if ssim else {})
        store(name, 0.0, macs=6 * 10**9 if ssim is None else 3 * 10**9, scores=scores)
    store("celeba64-ddpm-diffpruned", 0.0, macs=10**9, scores={"n": 50_000, "ssim_to_base": 0.9})  # scored without Inception
    assert results.paper_bases() == ("cifar10-ddpm", "celeba64-ddpm")
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in results.paper_table("cifar10-ddpm").splitlines()[2:5]]
    assert [row[1:4] for row in cells] == [["4.20", "", "6.00"], ["5.30", "0.930", "3.00"], ["5.50", "0.920", "3.00"]]
    assert "| ddpm-celeba64 Diff-Pruning |  | 0.900 | 1.00 |" in results.paper_table("celeba64-ddpm")


def test_unknown_suites_are_refused():
    with pytest.raises(ValueError, match="unknown suite 'long'; known: headline, short, one-shot, rivals, faces, paper"):
        results.load("long")


def test_every_seed_is_shown_with_an_interval_that_shrinks_with_the_seeds(runs):
    axes = figures.every_method(results.load("short", BASE)).axes[0]
    names = [label.get_text() for label in axes.get_yticklabels()]
    seeds = {names[int(line.get_ydata()[0])]: list(line.get_xdata()) for line in axes.lines if line.get_marker() == "o"}
    assert names[0] == "teacher" and seeds["2:4, SparseDM"] == [2.9, 3.0, 3.2]
    bars = {names[int(line.get_ydata()[0])]: line.get_xdata() for line in axes.lines if line.get_linewidth() == 5}
    wide, narrow = (np.log(bars[name][1] / bars[name][0]) for name in ("2:4, SR-STE without teacher", "2:4, SparseDM"))
    assert wide == pytest.approx(narrow * 3**0.5)


def test_the_strip_shows_every_verdict(runs):
    axes = figures.verdicts((BASE,)).axes[0]
    assert [text.get_text() for text in axes.texts] == [found.word for found in claims.verdicts(BASE)]


def test_a_scatter_with_labels_has_about_eight_methods():
    for base in results.bases():
        assert len(figures.few(results.load("short", base))) == len(figures.FEW) <= 9
