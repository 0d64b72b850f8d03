"""What the notebooks promise, read from their source; `pytest notebooks` runs them."""

import ast
import json
import re
import runpy
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = {path.stem: path for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}
ARC = runpy.run_path(str(ROOT / "docs" / "arc.py"))


def cells(name: str) -> list[dict]:
    """The code cells after the one that installs, which is not Python alone; `source` is one text."""
    found = [cell for cell in json.loads(NOTEBOOKS[name].read_text())["cells"] if cell["cell_type"] == "code"]
    return [cell | {"source": "".join(cell["source"])} for cell in found if not tagged(cell, "install")]


def tagged(cell: dict, tag: str) -> bool:
    return tag in cell["metadata"].get("tags", ())


def names(tree: ast.AST) -> set[str]:
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


def used(tree: ast.AST) -> set[str]:
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}


def assigned(statement: ast.stmt) -> set[str]:
    """Names that a top-level statement binds or changes an item of; those of loops, or inside a function, are not among them."""
    if isinstance(statement, ast.FunctionDef):
        return {statement.name}
    nodes = [node for node in ast.walk(statement) if isinstance(node, ast.Assign | ast.AugAssign)]
    targets = [target for node in nodes for target in (node.targets if isinstance(node, ast.Assign) else [node.target])]
    whole = [target.value if isinstance(target, ast.Subscript) else target for target in targets]
    return set().union(*map(names, whole))


def made_from(root: str, code: str) -> Iterator[tuple[ast.stmt, set[str]]]:
    """Each top-level statement with the names that hold what was made from `root` by then."""
    made = {root}
    for statement in ast.parse(code).body:
        if isinstance(statement, ast.For) and not used(statement.iter) & made:
            made -= names(statement.target)
        if used(statement) & made:
            made |= assigned(statement)
        elif isinstance(statement, ast.Assign):
            made -= assigned(statement)
        yield statement, made


def thresholds_on(root: str, code: str) -> list[str]:
    """The asserts that compare what was made from the variable `root` with a number."""
    found = []
    for statement, made in made_from(root, code):
        for node in ast.walk(statement):
            if isinstance(node, ast.Assert):
                compared = [part for part in ast.walk(node) if isinstance(part, ast.Compare) and used(part) & made]
                values = [leaf.value for part in compared for leaf in ast.walk(part) if isinstance(leaf, ast.Constant)]
                found += [ast.unparse(node)] if any(isinstance(value, int | float) for value in values) else []
    return found


def test_a_threshold_on_what_was_made_from_a_variable_is_found():
    code = "x = f(word)\ny = [a for a in x]\nz = 3\nx = 1\nassert y == 1\nassert x > 0\nassert close(y, z)\nassert z == 3"
    assert thresholds_on("word", code) == ["assert y == 1"]


# 04 and 06 keep the word and the measured pictures in one table, which this reading cannot tell apart.
@pytest.mark.parametrize("name", ["00_quickstart", "01_nm_masks", "03_transfer_learning", "07_head_to_head"])
def test_readers_may_change_the_word_that_is_spelled(name):
    parameters, *rest = cells(name)
    assert "word = " in parameters["source"] and tagged(parameters, "parameters")
    assert thresholds_on("word", "\n".join(cell["source"] for cell in rest)) == []


def test_the_thumbnail_of_the_speed_notebook_shows_stored_times_only():
    found = cells("08_speed")
    (place,) = (i for i, cell in enumerate(found) if tagged(cell, "thumbnail"))
    code = "\n".join(cell["source"] for cell in found[: place + 1])
    code, calls = re.subn(r"latency\.interleaved|speed\.measure_\w+|speed\.compare|shares\.measure", "measured_here", code)
    *_, (figure, made) = made_from("measured_here", code)
    assert calls and not used(figure) & made


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_solutions_are_folded_and_no_outputs_are_stored(name):
    for cell in cells(name):
        assert not cell["outputs"] and cell["execution_count"] is None
        assert cell["metadata"].get("jupyter", {}).get("source_hidden", False) == tagged(cell, "solution")


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_map_and_a_cell_that_installs_follow_the_title(name):
    _, *top = json.loads(NOTEBOOKS[name].read_text())["cells"][:3]
    assert top == list(ARC["tops"](name)), "python docs/arc.py writes both"


def test_the_map_leads_to_all_notebooks_and_on_from_each():
    order = list(ARC["STOPS"])
    assert order == sorted(order) and set(NOTEBOOKS) <= set(order)
    for before, name, after in zip(["", *order], order, [*order[1:], ""]):
        above, ways = ARC["chart"](name).split("\n\n")
        assert re.findall(r"\]\((\w+)\.ipynb\)", above) == [other for other in order if other != name]
        assert re.findall(r"\]\((\w+)\.ipynb\)", ways) == [other for other in (before, after) if other]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_links_of_a_notebook_lead_somewhere(name):
    found = [cell for cell in json.loads(NOTEBOOKS[name].read_text())["cells"] if cell["cell_type"] == "markdown"]
    for target in re.findall(r"\]\(([^)\s]+)\)", "\n".join("".join(cell["source"]) for cell in found)):
        place = NOTEBOOKS[name].parent / target.partition("#")[0]
        assert target.startswith("http") or place.stem in ARC["STOPS"] or place.exists(), target


def test_the_quickstart_keeps_its_promise_of_five_lines():
    (code,) = (cell["source"] for cell in cells("00_quickstart") if "sparsedm.finetune(" in cell["source"])
    steps = [ast.unparse(line) for line in ast.parse(code).body if not isinstance(line, ast.Import)]
    assert [re.search(r"sparsedm\.(\w+)", step)[1] for step in steps] == ["load", "sparsify", "finetune", "fold"]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_solution_names_its_exercise_and_checks_its_number(name):
    found = json.loads(NOTEBOOKS[name].read_text())["cells"]
    exercises = next("".join(cell["source"]) for cell in reversed(found) if cell["cell_type"] == "markdown")
    solutions = [cell["source"] for cell in cells(name) if tagged(cell, "solution")]
    numbers = [re.match(r"# Exercise (\d)\. ", source)[1] for source in solutions]
    assert numbers == sorted(set(numbers) & set(re.findall(r"^(\d)\. ", exercises, re.MULTILINE)))
    assert all("\nassert " in source for source in solutions) and (not numbers or "folded cell" in exercises)


@pytest.fixture(scope="module")
def pages():
    pytest.importorskip("latex2mathml")
    return runpy.run_path(str(ROOT / "docs" / "pages.py"))


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_page_of_each_notebook_needs_no_network(name, pages):
    notebook = nbformat.read(NOTEBOOKS[name], 4)
    html = pages["page"](notebook)
    assert not re.findall(r'<(?:script|img|iframe)[^>]*src="(?!data:)|<link[^>]*href=|@import|url\((?!["\']?data:)', html)
    prose = re.sub(r"<(pre|code|style|script|math)\b.*?</\1>", "", html, flags=re.DOTALL)
    formulas = [cell.source.count("$$") for cell in notebook.cells if cell.cell_type == "markdown"]
    assert "$" not in prose and html.count('display="block"') == sum(formulas) // 2
    assert ".ipynb" not in "".join(re.findall(r'href="(\w[^"]*)"', html))


def test_figures_of_a_page_have_texts(pages):
    shown = nbformat.v4.new_output("display_data", {"image/png": "AAAA"})
    words = nbformat.v4.new_markdown_cell("## Masks at work\n\nEach row is *one* output.")
    html = pages["page"](nbformat.v4.new_notebook(cells=[words, nbformat.v4.new_code_cell("draw()", outputs=[shown])]))
    assert re.findall(r'<img alt="([^"]*)"', html) == ["Figure in the section Masks at work. Each row is one output."]
