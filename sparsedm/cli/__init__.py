"""The command line: `python -m sparsedm COMMAND --help`."""

import sys
import textwrap

import typer

from . import artefacts, experiments, training
from .options import Stopped

LONGEST = 600  # letters of an error message

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
for group in (training, artefacts, experiments):
    for command in group.COMMANDS:
        app.command()(command)


def main() -> None:
    """Run the command; an error is one readable line and exit code 1, a run stopped by Ctrl-C or SIGTERM has exit code 130."""
    try:
        app()
    except Stopped as stopped:
        typer.echo(str(stopped), err=True)
        raise SystemExit(130) from stopped
    except (ValueError, OSError, FloatingPointError, ImportError, RuntimeError) as error:
        typer.echo(f"error: {textwrap.shorten(str(error), LONGEST, placeholder=' ...')}", err=True)
        raise SystemExit(1) from error
    finally:
        torch = sys.modules.get("torch")  # --help does without
        if torch and torch.distributed.is_initialized():  # else its threads may abort the process at its end
            torch.distributed.destroy_process_group()
