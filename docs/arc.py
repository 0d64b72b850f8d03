"""The arc of the notebooks: writes a map, and a cell that installs, at the top of each of them:

python docs/arc.py
"""

import json
from pathlib import Path

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
PARTS = {  # by notebook, in the order of reading: what a reader learns there
    "Start": {"00_quickstart": "a sparse model in five lines"},
    "SparseDM": {
        "01_nm_masks": "which weights a mask takes away, and what that costs",
        "02_straight_through": "how a pruned weight can come back",
        "03_transfer_learning": "how a dense teacher trains its sparse student",
        "04_unet": "the same on convolutions",
        "05_sparsity_ratios": "more and fewer zeros than 2:4",
    },
    "Diff-Pruning": {"06_diff_pruning": "whole channels instead of single weights"},
    "Verdicts": {
        "07_head_to_head": "both methods and their rivals, with the same training",
        "08_speed": "what becomes of the saved MACs on a clock",
    },
    "Use": {
        "09_your_own_model": "your model, your pictures, an export",
        "10_without_training": "2:4 in minutes, without training",
    },
}
STOPS = {name: subject for part in PARTS.values() for name, subject in part.items()}
INSTALL = """\
# Installs the package where it is missing, as on Colab; asks for an address outside the repository.
import importlib.util
from pathlib import Path

if importlib.util.find_spec("sparsedm") is None:
    here = Path("../pyproject.toml").exists()
    source = ".." if here else "git+" + input("Git address of sparsedm: ")
    %pip install -q {source} ipywidgets"""


def link(name: str) -> str:
    return f"[{name}]({name}.ipynb)"


def chart(name: str) -> str:
    """The map (Markdown) at the top of a notebook: all notebooks, the previous and the next one."""
    lines = []
    for part, stops in PARTS.items():
        links = (f"**{stop[:2]} (here)**" if stop == name else f"[{stop[:2]}]({stop}.ipynb)" for stop in stops)
        lines.append(f"{part} {' '.join(links)}")
    order = list(STOPS)
    place = order.index(name)
    ways = [f"Previous: {link(order[place - 1])}"] if place else []
    ways += [f"Next: {link(after)}, {STOPS[after]}" for after in order[place + 1 : place + 2]]
    return f"{' · '.join(lines)}\n\n{'. '.join(ways)}."


def tops(name: str) -> tuple[dict, dict]:
    """The cells that follow a notebook's title: the map, and the one that installs."""
    code = {"execution_count": None, "outputs": [], "metadata": {"tags": ["install"]}}
    return (
        {"cell_type": "markdown", "id": "map", "metadata": {}, "source": chart(name).splitlines(keepends=True)},
        {"cell_type": "code", "id": "install", **code, "source": INSTALL.splitlines(keepends=True)},
    )


def main() -> None:
    for path in (NOTEBOOKS / f"{name}.ipynb" for name in STOPS):
        if path.exists():
            notebook = json.loads(path.read_text())
            title, *rest = (cell for cell in notebook["cells"] if cell["id"] not in ("map", "install"))
            notebook["cells"] = [title, *tops(path.stem), *rest]
            path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
