"""The README's figures are those of the results files."""

import json
from pathlib import Path

import pytest

from sparsedm import bench, claims, results, speed

ROOT = Path(__file__).parent.parent
README, SPEED, COMPARISON = ((ROOT / name).read_text() for name in ("README.md", "docs/speed.md", "docs/comparison.md"))


def section(name: str, page: str = README) -> str:
    return page.split(f"<!-- {name}: ", 1)[1].split("-->\n", 1)[1].split(f"<!-- /{name} -->", 1)[0].strip()


def test_results_table_is_the_stored_one():
    assert section("results") == results.headline_table()


def test_verdicts_are_those_of_the_stored_results():
    assert section("claims") == claims.table()


@pytest.mark.parametrize("base", results.bases())
def test_short_runs_are_the_stored_ones(base):
    assert section(f"short {base}", COMPARISON) == results.short_table(base)


@pytest.mark.parametrize(
    ("name", "page"), [("step", README), ("paper", README), ("layers", SPEED)], ids=["step", "paper", "layers"]
)
def test_times_are_the_stored_ones(name, page):
    stored = json.loads((results.RESULTS / f"bench-{name}.json").read_text())
    assert section(name, page) == speed.words(stored)


def test_training_cost_is_the_stored_one():
    stored = json.loads((results.RESULTS / "bench-train-step.json").read_text())
    assert section("bench") == bench.train_step_words(stored)
