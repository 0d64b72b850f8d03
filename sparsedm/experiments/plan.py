"""The plan of a run: what a recipe is carried out with, checked before anything is computed, and what its folder must hold."""

import contextlib
import hashlib
import json
import subprocess
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

from .. import data
from ..checkpoints import folders
from ..data import latents
from ..measure import evaluation, fingerprint
from ..support.files import read_json, restore, write_json
from ..training.checkpoint import TrainConfig
from .recipes import Protocol, Recipe, recipe, run_name
from .results import RESULTS_FILE


@dataclass(frozen=True)
class Plan:
    """One run of a recipe, checked before anything is computed.

    Attributes:
        name: of the recipe.
        recipe: the recipe itself.
        out: the folder of all runs.
        protocol: how to score, with the noise of this seed.
        settings: of the training; {} for a recipe without one.
        seed: of the training's draws and of the pictures' noise.
        inception: path of Inception's weights, if FID is wanted.
        vae: folder of the autoencoder that decodes latents.
        reference: data set for FID instead of the training set.
        commit: of the code that runs; the files may change during a long training.
    """

    name: str
    recipe: Recipe
    out: Path
    protocol: Protocol
    settings: dict
    seed: int
    inception: str | None
    vae: str | None
    reference: str
    commit: str

    @property
    def run(self) -> str:
        return run_name(self.name, self.seed)

    @property
    def folder(self) -> Path:
        return self.out / self.run

    @property
    def model(self) -> Path:
        """The folder of the run's model."""
        return self.folder / "model"

    @property
    def results(self) -> Path:
        return self.folder / RESULTS_FILE


def prepare(
    name: str,
    out: Path,
    protocol: Protocol | None,
    seed: int,
    inception: str | None,
    vae: str | None,
    reference: str,
    train_options: dict,
) -> Plan:
    """The plan of a run. Raises ValueError if the run cannot be carried out."""
    chosen, commit = recipe(name), code_version()
    if seed:
        chosen = replace(chosen, watch=())  # one curve is enough
    settings = {**chosen.train, **train_options} if chosen.train else {}
    if settings:
        TrainConfig.of(settings)
    if settings and seed:
        settings["seed"] = seed
    if data.kind(chosen.data) == "latents" and (not vae or (inception and not reference)):
        raise ValueError(f"{name} makes latents: name the folder of an autoencoder (vae), and for FID real pictures (reference)")
    protocol = protocol or chosen.protocol
    evaluation.check(protocol.n, chosen.data, inception, reference)
    if vae:
        latents.autoencoder(vae)
    protocol = replace(protocol, seed=protocol.seed + seed)
    return Plan(name, chosen, out, protocol, settings, seed, inception, vae, reference, commit)


def code_version() -> str:
    """The package's commit, "" outside a repository; "+" says that files were changed since."""
    try:
        git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--exclude=*"]
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def base_of(chosen: Recipe, out: Path) -> tuple[str | Path, bool]:
    """As `model_of`, of the recipe's base."""
    return model_of(chosen.base, out)


def model_of(name: str, out: Path) -> tuple[str | Path, bool]:
    """Where the model of a recipe is, and whether this model was made in `out` (else the bundled one counts)."""
    made_here = out / name / "model"
    restore(made_here)
    if (made_here / folders.CONFIG).exists():
        return made_here, True
    if name not in folders.bundled():
        raise ValueError(
            f"the model {name} is not there; train it with `python -m sparsedm reproduce {name}`, or put the folder of a trained"
            f" one at {made_here}"
        )
    return name, False


def sources_of(plan: Plan) -> dict[str, str]:
    """Fingerprints of the models, weights and data that the scores rest on, as far as they are there and named."""
    sources = {}
    if (plan.model / folders.CONFIG).exists():
        sources["model"] = fingerprint.of_model(folders.load(plan.model))
    with contextlib.suppress(ValueError):  # a finished run does not need its base
        sources["base"] = fingerprint.of_model(folders.load(base_of(plan.recipe, plan.out)[0])) if plan.recipe.base else ""
    if plan.inception:
        sources["inception"] = fingerprint.of_tensors({}, hashlib.sha256(Path(plan.inception).read_bytes()).hexdigest())
    if plan.vae:
        sources["vae"] = fingerprint.of_model(latents.autoencoder(plan.vae))
    if plan.reference:
        sources["reference"] = fingerprint.of_tensors({}, plan.reference)
    if data.kind(plan.reference) == "folder" and (folder := Path(plan.reference.removeprefix("folder:"))).is_dir():
        sources["reference_files"] = _of_pictures(folder)
    return sources


def _of_pictures(folder: Path) -> str:
    """A fingerprint of the names, sizes and times of change of the pictures under a folder: their content takes too long."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in data.IMAGE_SUFFIXES)
    facts = [(str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    return fingerprint.of_tensors({}, repr(facts))


def finished(path: Path, protocol: Protocol, sources: dict) -> dict | None:
    """The stored results, if this protocol and these sources gave them."""
    results = read_json(path, "remove it, and the model is scored again") if path.exists() else {}
    if results.get("protocol") != protocol.facts():
        return None
    if "sources" not in results:
        warnings.warn(f"{path} does not say which weights it is about; remove it to score the model again", stacklevel=3)
        return results
    return results if results["sources"].items() >= sources.items() else None


def note_settings(folder: Path, settings: dict) -> None:
    """Note the settings in the folder, or refuse a folder that holds a run with others."""
    path, settings = folder / "settings.json", json.loads(json.dumps(settings))
    if path.exists() and read_json(path, "remove it if the run beside it has the same settings") != settings:
        raise ValueError(f"{folder} holds a run with other settings ({path}); use another output folder, or remove it")
    write_json(path, settings)
