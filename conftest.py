"""Tests and notebooks run side by side (pytest-xdist): a file in one worker, long ones first, so that none is left at the end.

Tests marked `alone` run by themselves, since they measure time; they come last, when nobody has to wait for them.
"""

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported: one thread for each worker and for what it starts
    os.environ["OMP_NUM_THREADS"] = "1"

ALONE_NOTEBOOKS = ("08_speed.ipynb",)
LONG = (
    "test_kernels.py",
    "test_export.py",
    "test_recipes.py",
    "test_denoisers.py",
    "test_distill.py",
    "test_browser.py",
    "test_jupyterlab.py",
)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "alone: runs while no other test does")


def pytest_report_header() -> str:
    return "about fifteen minutes on two cores, notebooks included; -n 0 runs one test at a time"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Notebooks first, then long files, then the rest, and last the files with a test that runs alone."""
    late = {item.path for item in items if _alone(item)}

    def turn(item: pytest.Item) -> int:
        if item.path in late:
            return 3
        return 0 if item.path.suffix == ".ipynb" else 1 if item.path.name in LONG else 2

    items.sort(key=turn)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    run = getattr(item.config, "workerinput", {}).get("testrunuid")
    with _turn(run, _alone(item)) if run else contextlib.nullcontext():
        return (yield)


def _alone(item: pytest.Item) -> bool:
    return item.get_closest_marker("alone") is not None or item.path.name in ALONE_NOTEBOOKS


@contextlib.contextmanager
def _turn(run: str, alone: bool) -> Iterator[None]:
    """Others run meanwhile, or none if `alone`. Who waits to be alone keeps the gate, so that nobody else begins."""
    path = Path(tempfile.gettempdir(), f"sparsedm-{run}")
    with open(f"{path}.gate", "w") as gate, open(f"{path}.turn", "w") as turn:
        fcntl.flock(gate, fcntl.LOCK_EX)
        fcntl.flock(turn, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        if not alone:
            fcntl.flock(gate, fcntl.LOCK_UN)
            yield
            return
        threads = os.environ.pop("OMP_NUM_THREADS")  # a notebook's kernel may have all
        yield
        os.environ["OMP_NUM_THREADS"] = threads
