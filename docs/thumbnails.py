"""The README's gallery of the notebooks, made from the rendered pages:

    python docs/pages.py
    python docs/thumbnails.py

Of each page in rendered/ it takes the first figure of the cell with the tag "thumbnail" (of the whole page, if there is none),
writes it to docs/thumbnails as a small PNG, and puts the table of all of them between the README's gallery marks.
"""

import base64
import io
import re
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parent.parent
PAGES, THUMBNAILS, README = ROOT / "rendered", ROOT / "docs" / "thumbnails", ROOT / "README.md"
SIZE, MARGIN, COLORS, COLUMNS = (300, 190), 6, 64, 3
MARKS = "<!-- gallery: python docs/thumbnails.py -->\n", "<!-- /gallery -->"


def figure(page: str) -> Image.Image:
    """The figure that stands for a page (HTML of nbconvert). Raises ValueError if it has none."""
    cells = page.split('class="jp-Cell ')
    tagged = [cell for cell in cells if "celltag_thumbnail" in cell.partition('"')[0]]
    found = re.search(r'src="data:image/png;base64,([^"]+)"', "".join(tagged or cells))
    if found is None:
        raise ValueError("the page, or its cell tagged thumbnail, has no figure")
    return Image.open(io.BytesIO(base64.b64decode(found[1]))).convert("RGB")


def thumbnail(picture: Image.Image) -> Image.Image:
    """The picture in the middle of white paper of SIZE, in few colours."""
    picture.thumbnail([length - 2 * MARGIN for length in SIZE], Image.Resampling.LANCZOS)
    paper = Image.new("RGB", SIZE, "white")
    paper.paste(picture, tuple((whole - part) // 2 for whole, part in zip(SIZE, picture.size)))
    return paper.quantize(COLORS)


def gallery(names: list[str]) -> str:
    """A Markdown table of thumbnails that link to their notebooks."""
    cells = [f"[![{name}](docs/thumbnails/{name}.png)](notebooks/{name}.ipynb)<br>`{name}`" for name in names]
    cells += [""] * (-len(cells) % COLUMNS)
    lines = [cells[start : start + COLUMNS] for start in range(0, len(cells), COLUMNS)]
    return "\n".join(["|" + " |" * COLUMNS, "|---" * COLUMNS + "|", *(f"| {' | '.join(line)} |" for line in lines), ""])


def main() -> None:
    THUMBNAILS.mkdir(exist_ok=True)
    pages = sorted(PAGES.glob("*.html"))
    for page in pages:
        thumbnail(figure(page.read_text())).save(THUMBNAILS / f"{page.stem}.png", optimize=True)
    before, _, rest = README.read_text().partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    README.write_text(f"{before}{MARKS[0]}{gallery([page.stem for page in pages])}{MARKS[1]}{after}")


if __name__ == "__main__":
    main()
