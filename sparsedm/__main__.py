"""The command line: `python -m sparsedm COMMAND --help`."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import sparsedm

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.command()
def reproduce(
    name: Annotated[str, typer.Argument(help="A recipe, such as glyphs-uvit-2x4; 'list' shows them all.")],
    out: Annotated[
        Path, typer.Option(help="Folder for checkpoints, pictures and results; a stopped run goes on from it.")
    ] = Path("runs"),
    n: Annotated[int, typer.Option(help="Pictures to score.")] = 10_000,
    bundle: Annotated[bool, typer.Option(help="Copy model, card and results into the package.")] = False,
    steps: Annotated[int | None, typer.Option(help="Training steps instead of the recipe's, for a trial.")] = None,
) -> None:
    """Train, save and score one of the experiments. Example: python -m sparsedm reproduce glyphs-uvit-2x4"""
    from sparsedm import experiment, recipes

    if name == "list":
        for known in recipes.NAMES:
            print(known)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns) as bar:
        tasks = {}
        overrides = {} if steps is None else {"steps": steps}
        for state in experiment.reproduce(name, out, recipes.Protocol(n=n), bundle, **overrides):
            if state.stage not in tasks:
                tasks[state.stage] = bar.add_task(f"{name}: {state.stage}", total=state.total, note="")
            bar.update(tasks[state.stage], completed=state.done, note=state.note)
    print(f"results in {out / name / 'results.json'}")


@app.command()
def compare() -> None:
    """Print the stored results as a table. Example: python -m sparsedm compare"""
    from sparsedm import results

    print(results.table())


@app.command()
def info(model: Annotated[str, typer.Argument(help="A bundled model's name or a model folder.")]) -> None:
    """What a model is: its layers, their verified patterns, MACs. Example: python -m sparsedm info glyphs-uvit-2x4"""
    print(sparsedm.report(sparsedm.load(model)))


@app.command()
def bench(
    what: Annotated[
        str, typer.Option(help="train-step (sparse against dense) or masks (each way of choosing them).")
    ] = "train-step",
    output: Annotated[Path | None, typer.Option(help="Write the figures to this JSON file.")] = None,
) -> None:
    """Measure this machine: what packing gains, what masks cost. Example: python -m sparsedm bench --what step"""
    from sparsedm import bench as benches

    if what not in benches.BENCHES:
        raise ValueError(f"unknown benchmark {what!r}; known: {', '.join(benches.BENCHES)}")
    text = json.dumps(benches.BENCHES[what](), indent=2)
    if output:
        output.write_text(text + "\n")
    print(text)


def main() -> None:
    """Run the command; an error is one readable line and exit code 1."""
    try:
        app()
    except (ValueError, OSError, FloatingPointError) as error:
        typer.echo(f"error: {error}", err=True)
        raise SystemExit(1) from error


if __name__ == "__main__":
    main()
