"""The demo: two diffusion models draw faces or a word side by side from the same noise (`python app.py`)."""

import argparse
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sparsedm.demo import models


def main() -> None:
    """Read the command line and serve the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    what = "a bundled model to start with, or a folder of your own to offer; may be given several times"
    add("--model", action="append", default=[], metavar="NAME_OR_FOLDER", help=what)
    add("--port", type=int, help="the first free one from 7860 by default")
    add("--share", action="store_true", help="also serve it at a public address, through gradio.live")
    add("--device", default="auto", help="cpu, cuda, ...; by default the GPU if there is one")
    args = parser.parse_args()

    from sparsedm.demo import page, serving  # --help does without

    try:
        check_port(args.port)
        for name in serving.LIMITS:
            serving.limit(name)
        catalogue, left, right = choose(args.model, args.device)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    page.launch(page.build(catalogue, left, right), server_port=args.port, share=args.share)


def check_port(port: int | None) -> None:
    """Raises ValueError for a port that does not exist, OSError for one that cannot be had."""
    if port is None:
        return
    if not 1 <= port <= 65535:
        raise ValueError(f"there is no port {port}: choose one from 1 to 65535 with --port")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise OSError(f"port {port} cannot be had ({error.strerror}): choose another one with --port") from error


def choose(asked: list[str], device: str = "auto") -> tuple["models.Catalogue", str, str]:
    """The catalogue with the asked folders, and the models to start with. Raises ValueError for what is no model."""
    from sparsedm.demo import models

    bundled = [name for name in asked if name in models.Catalogue().entries]
    folders = [Path(name) for name in asked if name not in bundled]
    catalogue = models.Catalogue(folders, models.device_of(device))
    for folder in folders:
        catalogue.load(folder.resolve().name)
    first = [folder.resolve().name for folder in folders] + bundled
    if len(first) > 1:
        return catalogue, first[0], first[1]
    left = first[0] if first else next(iter(models.pairs().values()))[0]
    return catalogue, left, catalogue.rival(left)


if __name__ == "__main__":
    main()
