"""The README's figures are those of the results files."""

import json
from pathlib import Path

from sparsedm import bench, results

README = (Path(__file__).parent.parent / "README.md").read_text()


def section(name: str) -> str:
    return README.split(f"<!-- {name}: ", 1)[1].split("-->\n", 1)[1].split(f"<!-- /{name} -->", 1)[0].strip()


def test_results_table_is_the_stored_one():
    assert section("results") == results.table()


def test_step_times_are_the_stored_ones():
    stored = json.loads((results.RESULTS / "bench-step.json").read_text())
    assert section("step") == bench.step_words(stored)


def test_training_cost_is_the_stored_one():
    stored = json.loads((results.RESULTS / "bench-train-step.json").read_text())
    assert section("bench") == bench.train_step_words(stored)
