"""The options that commands share, with their types and ranges. The module does not import torch, so that `--help` is quick."""

import dataclasses
import json
from collections.abc import Collection
from pathlib import Path
from typing import Annotated

import typer

from ..support.fields import SEEDS


class Stopped(Exception):
    """A run that the user stopped; the message says how to go on."""


Model = Annotated[str, typer.Argument(help="A bundled model's name or a model folder.")]
Data = Annotated[
    str, typer.Option(help="glyphs, glyphs-rgb, faces, digits, cifar10, celeba, lsun-..., folder:PATH or latents:PATH.")
]
Set = Annotated[
    list[str] | None, typer.Option("--set", help="Another training setting, such as lr=1e-4 or optimizer=muon; may be repeated.")
]
Half = Annotated[str, typer.Option(help="Of the saved weights: float32, float16 or bfloat16.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps; the fastest there is by default.")]
Seed = Annotated[int, typer.Option(min=0, max=SEEDS, help="Of every random draw.")]
Vae = Annotated[str, typer.Option(help="For models that make latents: the folder of the autoencoder (AutoencoderKL).")]
Json = Annotated[bool, typer.Option("--json", help="Print the outcome as one line of JSON, and nothing else.")]
Sampler = Annotated[str, typer.Option(help="ddim, ddpm or dpm++.")]
SampleSteps = Annotated[int, typer.Option(min=1, help="Sampling steps.")]
Batch = Annotated[int, typer.Option(min=1, help="Pictures drawn at a time.")]
Guidance = Annotated[float, typer.Option(min=0, max=1000, help="Classifier-free guidance; 0 is none.")]
CacheInterval = Annotated[
    int, typer.Option(min=1, help="A UNet computes its deep blocks at the first of so many steps (DeepCache); 1: at all.")
]
Pattern = Annotated[str, typer.Option(help="N:M, such as 2:4.")]
Globs = Annotated[list[str] | None, typer.Option(help="Layers to leave dense, such as 'mid_block.*'; may be repeated.")]


@dataclasses.dataclass(frozen=True)
class JobOptions:
    """The options that the commands for training share."""

    out: Annotated[Path, typer.Argument(help="A folder for checkpoints, log and, in OUT/model, the model.")]
    data: Data = "glyphs"
    steps: Annotated[int, typer.Option(min=1, help="Training steps in all.")] = 1000
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures per step, over all processes.")] = 64
    set_: Set = None
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in OUT.")] = False
    track: Annotated[str, typer.Option(help="tensorboard, wandb, ... or none; TensorBoard by default, if it is installed.")] = ""
    samples_every: Annotated[int, typer.Option(min=0, help="Draw a grid of pictures every so many steps; 0 never does.")] = 0
    dtype: Half = "float16"
    device: Device = ""
    seed: Seed = 0
    json: Json = False


def settings(given: list[str] | None) -> dict:
    """{"lr": 0.1} of ["lr=0.1"]. Raises ValueError for other text."""
    values = {}
    for setting in given or ():
        key, equals, text = setting.partition("=")
        if not key or not equals:
            raise ValueError(f"--set takes NAME=VALUE, not {setting!r}")
        try:
            values[key] = json.loads(text)
        except json.JSONDecodeError:
            values[key] = text
    return values


def numbers(option: str, text: str) -> list[int]:
    """[1, 4] of "1,4". Raises ValueError, with the option's name, for none, or other than whole numbers of at least 1."""
    parts = [part.strip() for part in text.split(",") if part]
    if wrong := [part for part in parts or [text] if not part.isdecimal() or int(part) < 1]:
        raise ValueError(f"{option} takes whole numbers of at least 1, such as 1,4, not {wrong[0]!r}")
    return list(map(int, parts))


def words(option: str, text: str, known: Collection[str]) -> list[str]:
    """["float32", "bfloat16"] of "float32,bfloat16". Raises ValueError, with the option, for none or words not in `known`."""
    parts = [part.strip() for part in text.split(",") if part]
    if wrong := [part for part in parts or [text] if part not in known]:
        raise ValueError(f"{option} takes {', '.join(known)}, not {wrong[0]!r}")
    return parts


def free(out: Path) -> None:
    """Raise ValueError if something is at `out`."""
    if out.exists():
        raise ValueError(f"{out} is there already; choose another name or remove it")
