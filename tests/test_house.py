"""The floors of the house (docs/design.md): a room imports only from rooms below its own, and no files import in a circle."""

import ast
import subprocess
from graphlib import TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "sparsedm"
FLOORS = (
    {"support"},
    {"masking"},
    {"models", "data", "plots"},
    {"packing", "diffusion"},
    {"training", "pruning"},
    {"checkpoints"},
    {"measure"},
    {"experiments"},
    {"cli", "demo"},
)
FLOOR = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}


def module_of(path: Path) -> str:
    """The dotted name of a file below the package: "masking.nm", "data" for its __init__.py."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip(".")


FILES = {module_of(path): path for path in PACKAGE.rglob("*.py")}


def imports(module: str) -> set[str]:
    """The modules of this package that a file imports, wherever in the file the statement stands."""
    package = FILES[module].relative_to(PACKAGE).parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").split(".")[0] == "sparsedm"):
            above = package[: len(package) - node.level + 1] if node.level else ()
            parts = (node.module or "").split(".") if node.level else (node.module or "").split(".")[1:]
            source = ".".join(part for part in (*above, *parts) if part)
            for name in (alias.name for alias in node.names):
                full = f"{source}.{name}".lstrip(".")
                found.add(full if full in FILES else source)
    return found - {module, ""}


ARROWS = {module: imports(module) for module in FILES if module not in ("", "__main__")}


def test_every_room_has_a_floor():
    rooms = {module.split(".")[0] for module in ARROWS}
    assert rooms == set(FLOOR)
    assert len(ARROWS) > 50 and sum(map(len, ARROWS.values())) > 150  # the imports were really read


def test_imports_point_down():
    upward = []
    for module, targets in ARROWS.items():
        room = module.split(".")[0]
        others = {target.split(".")[0] for target in targets} - {room}
        upward += [f"{module} -> {other}" for other in others if FLOOR[other] >= FLOOR[room]]
    assert upward == []


def test_files_import_in_no_circle():
    inside = {module: {target for target in targets if not module.startswith(target + ".")} for module, targets in ARROWS.items()}
    assert len(list(TopologicalSorter(inside).static_order())) >= len(ARROWS)  # raises CycleError, which names the circle


def test_nothing_of_the_package_is_ignored_by_git():
    """A rule such as "data/" would leave a room out of every clone."""
    command = ["git", "ls-files", "--others", "--ignored", "--exclude-standard", "--", "*.py", "*.cpp", "*.css"]
    assert subprocess.run(command, cwd=PACKAGE, capture_output=True, text=True).stdout == ""
