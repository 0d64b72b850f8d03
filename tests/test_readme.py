"""The README's figures are those of the results files."""

import json
from pathlib import Path

import pytest

from sparsedm import bench, results, speed

ROOT = Path(__file__).parent.parent
README, SPEED = ((ROOT / name).read_text() for name in ("README.md", "docs/speed.md"))


def section(name: str, page: str = README) -> str:
    return page.split(f"<!-- {name}: ", 1)[1].split("-->\n", 1)[1].split(f"<!-- /{name} -->", 1)[0].strip()


def test_results_table_is_the_stored_one():
    assert section("results") == results.headline_table()


@pytest.mark.parametrize(
    ("name", "page"), [("step", README), ("paper", README), ("layers", SPEED)], ids=["step", "paper", "layers"]
)
def test_times_are_the_stored_ones(name, page):
    stored = json.loads((results.RESULTS / f"bench-{name}.json").read_text())
    assert section(name, page) == speed.words(stored)


def test_training_cost_is_the_stored_one():
    stored = json.loads((results.RESULTS / "bench-train-step.json").read_text())
    assert section("bench") == bench.train_step_words(stored)
