"""Notebooks in JupyterLab: Chromium runs the cells up to the first control, moves the control, and sees the figure change.

All other cells run under nbmake (`pytest notebooks`).
"""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
WAIT = 120_000  # ms; generous, for other work may share the machine
FEWER = {"sampling_steps": 2, "pictures": 1}  # by parameter; enough to draw
SETTINGS = {  # all cells are in the page, and nothing is fetched from elsewhere
    "notebook-extension/tracker": {"windowingMode": "none"},
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}


def to_the_first_control(name: str) -> dict:
    """The notebook's cells up to the first control, with less work where a parameter says how much."""
    notebook = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text())
    sources = ["".join(cell["source"]) for cell in notebook["cells"]]
    last = next(i for i, source in enumerate(sources) if "explorer(" in source)
    notebook["cells"] = notebook["cells"][: last + 1]
    for cell in notebook["cells"]:
        if "parameters" in cell["metadata"].get("tags", ()):
            cell["source"] = "".join(cell["source"]) + "".join(f"\n{key} = {value}" for key, value in FEWER.items())
    return notebook


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """The address of a JupyterLab with the shortened notebooks."""
    folder = tmp_path_factory.mktemp("lab")
    for name, settings in SETTINGS.items():
        path = folder / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings))
    (folder / "notebooks").mkdir()
    for name in ("01_nm_masks", "05_sparsity_ratios", "06_diff_pruning"):
        (folder / "notebooks" / f"{name}.ipynb").write_text(json.dumps(to_the_first_control(name)))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--expose-app-in-browser"]
    command += [f"--ServerApp.port={port}", "--IdentityProvider.token=", f"--ServerApp.root_dir={folder / 'notebooks'}"]
    environment = {**os.environ, "JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"), "PYTHONPATH": str(ROOT)}
    with open(folder / "log", "w") as log, subprocess.Popen(command, env=environment, stdout=log, stderr=log) as server:
        address = f"http://127.0.0.1:{port}"
        try:
            answer(f"{address}/api/status", server, folder / "log")
            yield address
        finally:
            server.terminate()


def answer(address: str, server: subprocess.Popen, log: Path) -> None:
    """Wait until the server answers."""
    for _ in range(WAIT // 500):
        assert server.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(address, timeout=5).read()
            return
        except OSError:
            time.sleep(0.5)
    raise TimeoutError(log.read_text())


def choose(sheet, name: str, value: str) -> None:
    sheet.locator(f".widget-dropdown:has(label:text-is('{name}')) select").select_option(value)


def slide(sheet, name: str) -> None:
    sheet.locator(f".widget-slider:has(label:text-is('{name}')) .noUi-handle").focus()
    for _ in range(5):
        sheet.keyboard.press("ArrowRight")


@pytest.mark.parametrize(
    ("name", "move"),
    [
        ("01_nm_masks", lambda sheet: choose(sheet, "M", "8")),
        ("05_sparsity_ratios", lambda sheet: choose(sheet, "pattern", "1:4")),
        ("06_diff_pruning", lambda sheet: slide(sheet, "threshold")),
    ],
)
def test_a_control_changes_its_figure(browser, lab, name, move):
    sheet = browser.new_page()
    sheet.set_default_timeout(WAIT)
    sheet.goto(f"{lab}/doc/tree/{name}.ipynb")
    sheet.wait_for_function(
        "window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status == 'idle'", timeout=WAIT
    )
    done = sheet.evaluate("jupyterapp.commands.execute('notebook:run-all-cells')")
    assert done and not sheet.locator("[data-mime-type='application/vnd.jupyter.error']").count()
    figure = sheet.locator("img.widget-image")
    before = figure.get_attribute("src")
    move(sheet)
    sheet.wait_for_function("before => document.querySelector('img.widget-image').src != before", arg=before)
    sheet.close()
