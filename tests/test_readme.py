"""The README's figures are those of the results files."""

import base64
import io
import json
import re
import runpy
from pathlib import Path

import pytest
from diffusers import UNet2DModel
from PIL import Image

import sparsedm
from sparsedm.experiments import claims, results, rivals
from sparsedm.masking import layers
from sparsedm.measure import large, shares, speed, training_cost

ROOT = Path(__file__).parent.parent
PAGES = {path.name: path.read_text() for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))}
README, SPEED, COMPARISON = (PAGES[name] for name in ("README.md", "speed.md", "comparison.md"))


def section(name: str, page: str = README) -> str:
    return page.split(f"<!-- {name}: ", 1)[1].split("-->\n", 1)[1].split(f"<!-- /{name} -->", 1)[0].strip()


def test_results_tables_are_the_stored_ones():
    assert section("summary") == results.summary_table()
    assert section("results", COMPARISON) == results.headline_table()
    assert section("one-shot", COMPARISON) == results.one_shot_table()
    assert section("faces", COMPARISON) == results.faces_table()
    assert section("rivals", COMPARISON) == rivals.table()


def test_verdicts_are_those_of_the_stored_results():
    assert section("claims", COMPARISON) == claims.table()


@pytest.mark.parametrize("base", results.bases())
def test_short_runs_are_the_stored_ones(base):
    assert section(f"short {base}", COMPARISON) == results.short_table(base)


@pytest.mark.parametrize("name", ["step", "paper", "layers", "methods", "layers-xeon", "large"])
def test_times_are_the_stored_ones(name):
    stored = json.loads((results.RESULTS / f"bench-{name}.json").read_text())
    assert section(name, SPEED) == (large if name == "large" else speed).words(stored)


def test_shares_are_the_stored_ones():
    assert section("shares", SPEED) == shares.words(json.loads((results.RESULTS / "bench-shares.json").read_text()))


def test_training_cost_is_the_stored_one():
    stored = json.loads((results.RESULTS / "bench-train-step.json").read_text())
    assert section("bench", SPEED) == training_cost.train_step_words(stored)


def test_the_lines_for_an_own_model_and_own_pictures_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = {"block_out_channels": (16, 16), "down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    UNet2DModel(sample_size=32, norm_num_groups=4, **config).save_pretrained("google/ddpm-cifar10-32")
    (tmp_path / "pictures").mkdir()
    for i in range(64):
        Image.new("RGB", (40, 36), (i, 2 * i, 255 - i)).save(tmp_path / "pictures" / f"{i}.png")
    lines = PAGES["models.md"].split("## Your own model, your own pictures", 1)[1].split("```python\n", 1)[1].split("```", 1)[0]
    exec(lines.replace("steps=20_000", "steps=2"), {})  # noqa: S102
    assert set(map(str, layers.patterns(sparsedm.load("student")).values())) == {"2:4"}


NOTEBOOKS = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
THUMBNAILS = runpy.run_path(str(ROOT / "docs" / "thumbnails.py"))


def test_every_notebook_has_its_row_and_its_picture_in_the_gallery():
    assert section("gallery") == THUMBNAILS["gallery"](NOTEBOOKS).strip()
    for name in NOTEBOOKS:
        assert f"| `{name}` | " in README
        path = ROOT / "docs" / "thumbnails" / f"{name}.png"
        assert Image.open(path).size == THUMBNAILS["SIZE"] and path.stat().st_size < 25_000


def page(*cells: tuple[str, str]) -> str:
    """A rendered page with a figure of one colour in every cell, given by its classes."""
    html = ""
    for classes, color in cells:
        png = io.BytesIO()
        Image.new("RGB", (900, 200), color).save(png, "PNG")
        data = base64.b64encode(png.getvalue()).decode()
        html += f'<div id="a" class="jp-Cell {classes}"><img src="data:image/png;base64,{data}"></div>'
    return html


def test_a_thumbnail_is_the_tagged_figure_or_the_first_on_white_paper():
    tagged = page(("jp-CodeCell", "red"), ("jp-CodeCell celltag_thumbnail", "blue"))
    assert THUMBNAILS["figure"](tagged).getpixel((0, 0)) == (0, 0, 255)
    small = THUMBNAILS["thumbnail"](THUMBNAILS["figure"](page(("jp-CodeCell", "red"), ("jp-CodeCell", "blue")))).convert("RGB")
    width, height = small.size
    assert small.getpixel((width // 2, height // 2)) == (255, 0, 0) and small.getpixel((0, 0)) == (255, 255, 255)
    with pytest.raises(ValueError, match="no figure"):
        THUMBNAILS["figure"]("<html></html>")


def anchors(page: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", sorted(PAGES))
def test_links_lead_somewhere(name):
    folder = ROOT if name == "README.md" else ROOT / "docs"
    links = re.findall(r"\]\(([^)\s]+)\)", PAGES[name])
    for target, _, anchor in (link.partition("#") for link in links if not link.startswith("http")):
        assert (folder / target).exists(), target
        assert not anchor or anchor in anchors((folder / target).read_text()), f"{target}#{anchor}"


def test_the_readme_stays_short():
    assert len(README.splitlines()) <= 110
