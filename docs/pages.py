"""Pages of the notebooks for readers, one file each, which needs neither a kernel nor a network:

python docs/pages.py [NAME ...]

Runs the notebooks (all, or those named) and writes rendered/NAME.html. Formulas are MathML, figures have alternative texts,
widgets are still pictures, and links between notebooks lead from page to page.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import nbformat
from jinja2 import DictLoader, pass_context
from latex2mathml.converter import convert
from nbconvert.exporters import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from nbconvert.preprocessors import CoalesceStreamsPreprocessor, ExecutePreprocessor
from traitlets.config import Config

ROOT = Path(__file__).parent.parent
NOTEBOOKS, PAGES = ROOT / "notebooks", ROOT / "rendered"
# What the usual page fetches from the network is left out. Figures get their texts.
TEMPLATE = """
{%- extends "lab/index.html.j2" -%}
{%- block html_head_js -%}{%- endblock -%}
{%- block jupyter_widgets -%}{%- endblock -%}
{%- block html_head_js_mathjax -%}{%- endblock -%}
{%- block html_head_js_mermaidjs -%}{%- endblock -%}
{%- block data_png -%}{{ super() | replace("<img ", '<img alt="' ~ (output.metadata.alt | escape_html) ~ '" ') }}{%- endblock -%}
"""
# Widgets bring a still picture, which comes first.
SHOWN = ["text/html", "image/png", "text/markdown", "text/latex", "text/plain"]


class Renderer(IPythonRenderer):
    """Markdown with formulas as MathML."""

    def block_math(self, body: str) -> str:
        return convert(body, display="block")

    def inline_math(self, body: str) -> str:
        return convert(body)


class PageExporter(HTMLExporter):
    """A notebook with its outputs as one file."""

    def __init__(self):
        loader = DictLoader({"page.html.j2": TEMPLATE})
        super().__init__(
            extra_loaders=[loader], template_file="page.html.j2", config=Config(NbConvertBase={"display_data_priority": SHOWN})
        )
        self.register_preprocessor(CoalesceStreamsPreprocessor(), enabled=True)  # of a progress bar the last state

    @pass_context
    def markdown2html(self, context, source: str) -> str:
        html = MarkdownWithMath(renderer=Renderer(escape=False)).render(source)
        return re.sub(r'href="(\w+)\.ipynb', r'href="\1.html', html)

    def from_notebook_node(self, nb, resources=None, **options):
        for output, text in figures(nb):
            output.metadata["alt"] = text
        return super().from_notebook_node(nb, resources, **options)


def figures(notebook) -> Iterator[tuple]:
    """The outputs that are figures, each with an alternative text: its section, and the sentence that leads to it."""
    heading, words = "", ""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            heading = (re.findall(r"^#+ (.+)$", cell.source, re.MULTILINE) or [heading])[-1]
            prose = [part for part in cell.source.split("\n\n") if part[:1].isalpha()]
            words = re.sub(r"[*`$\[\]]|\([^)]*\.ipynb[^)]*\)", "", prose[-1].replace("\n", " ")) if prose else ""
        for output in cell.get("outputs", ()):
            if "image/png" in output.get("data", {}):
                yield output, f"Figure in the section {heading}. {words}".strip()


def page(notebook) -> str:
    """The HTML of a notebook node, with the outputs that it has."""
    return PageExporter().from_notebook_node(notebook)[0]


def main(names: list[str]) -> None:
    PAGES.mkdir(exist_ok=True)
    run = ExecutePreprocessor(timeout=1800)
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        if not names or path.stem in names:
            print(path.stem, flush=True)
            notebook, _ = run.preprocess(nbformat.read(path, 4), {"metadata": {"path": NOTEBOOKS}})
            notebook.metadata["title"] = path.stem
            (PAGES / f"{path.stem}.html").write_text(page(notebook))


if __name__ == "__main__":
    main(sys.argv[1:])
