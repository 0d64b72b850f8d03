"""The demo: two diffusion models draw a word side by side from the same noise (`python app.py`)."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sparsedm.demo import models


def main() -> None:
    """Read the command line and serve the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--model", action="append", default=[], metavar="NAME_OR_FOLDER",
        help="a bundled model to start with, or a folder of your own to offer; may be given several times")  # fmt: skip
    add("--port", type=int, help="the first free one from 7860 by default")
    add("--share", action="store_true", help="also serve it at a public address, through gradio.live")
    add("--device", default="auto", help="cpu, cuda, ...; by default the GPU if there is one")
    args = parser.parse_args()

    from sparsedm.demo import page  # --help does without

    try:
        catalogue, left, right = choose(args.model, args.device)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    page.build(catalogue, left, right).launch(server_port=args.port, share=args.share, **page.LOOK)


def choose(asked: list[str], device: str = "auto") -> tuple["models.Catalogue", str, str]:
    """The catalogue with the asked folders, and the models to start with. Raises ValueError for what is no model."""
    from sparsedm.demo import models

    bundled = [name for name in asked if name in models.Catalogue().titles]
    folders = [Path(name) for name in asked if name not in bundled]
    catalogue = models.Catalogue(folders, models.device_of(device))
    for folder in folders:
        catalogue.load(folder.resolve().name)
    first = [folder.resolve().name for folder in folders] + bundled
    if len(first) > 1:
        return catalogue, first[0], first[1]
    left = first[0] if first else "glyphs-uvit"
    right = f"{left}-2x4" if f"{left}-2x4" in catalogue.titles else left
    return catalogue, left, right


if __name__ == "__main__":
    main()
