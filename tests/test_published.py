"""The papers' numbers beside the stored ones."""

import re

import pytest

from sparsedm.experiments import published, results
from sparsedm.experiments.recipes import RECIPES


def rows(table: str) -> dict[str, list[str]]:
    """The cells of every row, by the first one."""
    lines = [line for line in table.splitlines() if line.startswith("|")][2:]
    found = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return {first: cells for first, *cells in found}


@pytest.mark.parametrize("base", results.bases())
def test_our_side_is_read_from_the_stored_runs(base):
    long = {row.recipe.role: row for row in results.load("headline", base)}
    short = {row.recipe.role: row for row in results.load("short", base)}
    found = rows(published.sparsedm_table(base))
    assert found["trained 2:4 against dense"][1].startswith(f"{long['teacher'].fd_text} to {long['2x4'].fd_text};")
    assert found["ASP (first masks kept) against dense"][1].startswith(f"{short['more'].fd_text} to {short['2x4-asp'].fd_text}")
    assert found["masks without training"][1].endswith(long["2x4-oneshot"].fd_text)


def test_sparsedms_numbers_are_the_published_ones():
    found = rows(published.sparsedm_table("glyphs-uvit"))
    assert re.findall(r"\+[\d.]+", found["trained 2:4 against dense"][0]) == ["+1.5", "+1.22", "+0.44"]
    assert re.findall(r"[\d.]+\d", found["ASP (first masks kept) against dense"][0])[:2] == ["3.97", "319.87"]


def test_patterns_that_nobody_ran_are_said_to_be_missing():
    found = rows(published.ratios_table())
    assert set(published.RATIOS) < set(found) and found["1:32"][1:] == ["not run"] * 2
    uvit, unet = ({row.recipe.role: row for row in results.load("short", base)} for base in results.bases())
    assert found["1:8"][1:] == [uvit["1x8"].fd_text, unet["1x8"].fd_text]


def test_diff_prunings_tables_stand_beside_the_runs_of_the_same_method():
    found = rows(published.diffpruning_table("glyphs-unet"))
    (pruned,) = (row for row in results.load("short", "glyphs-unet") if row.recipe.role == "diffpruned")
    cifar, celeba = ["5.29", "0.932", "100k"], ["6.52", "0.878", "100k"]
    assert found["Diff-Pruning, T = 0.05"] == [*cifar, *celeba, pruned.fd_text, f"{pruned.mean('ssim_to_base'):.3f}"]
    assert found["... trained longer"][-2:] == ["not run", ""]


def test_larger_sets_name_the_recipe_that_would_repeat_a_row():
    named = re.findall(r"`reproduce (\S+)`", published.larger_table())
    stored = {row.name for row in results.load("paper")}
    assert named == [recipe for *_, recipe in published.LARGER if recipe and recipe not in stored]
    assert set(named) <= set(RECIPES)


def test_times_are_those_of_the_log_and_of_the_stored_rows():
    found = rows(published.speed_table())
    assert found["one block, 8,192 wide, random weights, 12 shapes (log)"][0] == "0.97 to 1.23, mean 1.07"
    timed = next(row for row in results.load("short", "glyphs-uvit") if row.recipe.role == "2x4")
    assert found["bundled U-ViT"] == ["", f"{timed.speedup:.2f}"]
