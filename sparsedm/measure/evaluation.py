"""Scoring a model by a protocol: sample its pictures, resuming where a killed run stopped, and compare them with others.

Several processes share the pictures, batch by batch; the pictures are the same for any number of processes.
"""

import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import nn
from torch.utils.data import Dataset, default_collate

from .. import data, diffusion
from ..data import faces, latents
from ..models import denoisers
from ..support import processes, tensorfiles
from ..support.files import replacing
from . import fingerprint, judges, metrics
from .protocol import Protocol

CHUNK = 500  # pictures sampled between two saves, or more: whole batches, and one for every process
_ORIGIN = {"model": "another model", "vae": "another autoencoder", "texts": "other texts"}  # what pictures are of


@dataclass(frozen=True)
class Progress:
    """How far a stage is.

    Attributes:
        stage: the stage's name.
        done: finished units of work.
        total: all units of work.
        note: a line to show.
        pictures: pictures that one unit of work stands for.
    """

    stage: str
    done: int
    total: int
    note: str = ""
    pictures: float = 0


def sample(
    model: nn.Module, folder: Path, protocol: Protocol, stage: str = "sample", dataset: str = "", vae: AutoencoderKL | None = None
) -> Iterator[Progress]:
    """Sample the protocol's pictures, saving them every `CHUNK` in `folder`: in parts, at the end in one file.

    A generator that returns the pictures, uint8 [n, C, H, W], in the main process, and None in the others. Pictures of the same
    model that are there already are kept; pictures that do not say which model drew them are drawn again with a warning.

    Args:
        dataset: the data set whose first texts condition the pictures of models that take text.
        vae: the autoencoder that decodes the latents of a latent model.

    Raises:
        ValueError: `folder` holds pictures of another model, autoencoder or texts, or damaged ones; raised at the call.
    """
    path, texts, settings, parts = samples_file(folder, protocol), _texts(model, dataset, protocol.n), {}, []
    if processes.is_main():
        settings = {k: str(v) for k, v in protocol.facts().items() if k != "n"} | _origin(model, vae, texts)
        parts = _saved(path, settings)
    return _sample(model, path, protocol, stage, texts, vae, settings, parts)


def _sample(model, path, protocol, stage, texts, vae, settings, parts) -> Iterator[Progress]:
    done, asked = processes.from_main(sum(map(len, parts))), _asked(model, protocol.n, texts)
    batches = range(done, protocol.n, protocol.batch_size)
    at_once = processes.state().num_processes
    between_saves = max(-(-CHUNK // protocol.batch_size), at_once)
    for first in range(0, len(batches), between_saves):
        drawn = {}
        for start in processes.share(batches[first : first + between_saves]):
            end = min(start + protocol.batch_size, protocol.n)
            batch = _draw(model, protocol, start, end, asked(start, end))
            drawn[start] = data.to_uint8(batch if vae is None else latents.decode(vae, batch)).cpu()
            yield Progress(stage, min(end + (at_once - 1) * protocol.batch_size, protocol.n), protocol.n, pictures=1)
        if collected := processes.collect(drawn):
            parts.append(torch.cat(list(collected.values())))
            _save(parts[-1], _parts(path) / f"{batches[first]:08d}.safetensors", settings)
    if not processes.is_main():
        return None
    images = torch.cat(parts)
    if _parts(path).exists():
        _save(images, path, settings)
        shutil.rmtree(_parts(path))
    return images[: protocol.n]


def _draw(model: nn.Module, protocol: Protocol, start: int, end: int, asked: dict) -> torch.Tensor:
    """The pictures from number `start` to `end`: the noise of each depends on the protocol's seed and its number alone."""
    noise = diffusion.start_noise(model, end - start, protocol.seed, start)
    options = {"sampler": protocol.sampler, "steps": protocol.steps, "guidance": protocol.guidance, **asked}
    options["cache_interval"] = protocol.cache_interval
    options["generator"] = diffusion.step_generators(end - start, protocol.seed, start)
    with torch.autocast(model.device.type, torch.bfloat16, enabled=protocol.precision == "bf16"):
        return diffusion.generate(model, noise, **options)


def _texts(model: nn.Module, dataset: str, n: int) -> data.Latents | data.Faces | None:
    """The data set whose first n texts condition the model; None if the model takes no text."""
    if denoisers.null_label(model) is not None or data.kind(dataset) not in ("latents", "faces"):
        return None
    texts = data.load(dataset, **_options(dataset, n, denoisers.picture_size(model)))
    return texts if isinstance(texts[0][1], dict) else None


def _origin(model: nn.Module, vae: AutoencoderKL | None, texts: data.Latents | data.Faces | None) -> dict[str, str]:
    """Fingerprints of the model, autoencoder and texts that make the pictures, by the keys of `_ORIGIN`."""
    origin = {"model": fingerprint.of_model(model)}
    if vae is not None:
        origin["vae"] = fingerprint.of_model(vae)
    if texts is not None:
        drawn = isinstance(texts, data.Faces)
        origin["texts"] = fingerprint.of_tensors({}, texts.name) if drawn else fingerprint.of_files(texts.files)
    return origin


def _asked(model: nn.Module, n: int, texts: data.Latents | data.Faces | None) -> Callable[[int, int], dict]:
    """A function from two picture numbers to the conditions in between, as arguments of `diffusion.generate`."""
    classes = labels(model, n)
    if classes is not None:
        return lambda start, end: {"class_labels": classes[start:end]}
    if texts is None:
        return lambda start, end: {}

    def conditions(start: int, end: int) -> dict:
        given = default_collate([texts[i % len(texts)][1] for i in range(start, end)])
        nothing = {name: value.expand(end - start, *value.shape) for name, value in texts.null.items()}
        return {"conditioning": given, "negative": nothing or None}

    return conditions


def samples_file(folder: Path, protocol: Protocol) -> Path:
    """Where `sample` keeps the pictures."""
    cached = f"-cache{protocol.cache_interval}" if protocol.cache_interval > 1 else ""
    return folder / f"samples-{protocol.sampler}{protocol.steps}{cached}-{protocol.seed}.safetensors"


def sampled(folder: Path, protocol: Protocol, n: int) -> torch.Tensor:
    """The first n pictures [n, C, H, W] that `sample` left in `folder`, in [-1, 1].

    Raises:
        OSError: there are none.
        ValueError: their file is damaged.
    """
    return data.to_float(_read(samples_file(folder, protocol))[0]["images"][:n])


def _parts(path: Path) -> Path:
    """The folder of sampled pictures that are not in the file `path` yet; a part's name is the number of its first picture."""
    return path.with_suffix(".parts")


def _save(images: torch.Tensor, path: Path, settings: dict[str, str]) -> None:
    with replacing(path) as temporary:
        tensorfiles.save(temporary, {"images": images.contiguous()}, settings)


def _saved(path: Path, settings: dict[str, str]) -> list[torch.Tensor]:
    """Pictures of an earlier run of the same model under the same protocol: from the file, and from the parts that follow it."""
    kept = []
    for source in ([path] if path.exists() else []) + sorted(_parts(path).glob("*.safetensors")):
        begins = 0 if source == path else int(source.stem)
        (tensors, stored), place = _read(source), path if source == path else source.parent
        if "model" not in stored:
            warnings.warn(f"{place} does not say which model drew its pictures; they are drawn again", stacklevel=3)
            continue
        for key, other in _ORIGIN.items():
            if stored.get(key) != settings.get(key):
                raise ValueError(f"{path.parent} holds pictures of {other}; choose another folder, or remove {place}")
        if begins == sum(map(len, kept)) and stored.items() >= settings.items():
            kept.append(tensors["images"])
    return kept


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    return tensorfiles.read(path, "remove it, and its pictures are drawn again")


def labels(model: nn.Module, n: int) -> torch.Tensor | None:
    """The classes [n] to draw, all in turn; None for an unconditional model."""
    null = denoisers.null_label(model)
    return None if null is None else torch.arange(n) % null


def asked(model: nn.Module, dataset: str, n: int) -> torch.Tensor | None:
    """What a model is asked to draw when it is scored: the classes [n], or the attributes of faces [n, 10]; None for nothing."""
    if dataset == "faces":
        texts = data.load("faces", split="test", n=n)
        return torch.stack([faces.row(texts.named(i)) for i in range(n)])
    return labels(model, n)


def check(n: int, dataset: str, inception: str | None = None, reference: str = "") -> None:
    """Check, before pictures are drawn, that `score` can score n of them.

    Raises:
        ValueError: too few pictures on either side, an unknown data set, latents to compare with, or Inception's weights that
            cannot be used.
        OSError: no data set to compare with, or no file of Inception's weights.
    """
    if inception and (reference or dataset).startswith("latents:"):
        raise ValueError(f"{reference or dataset} holds latents, no pictures to compare with; name real pictures (reference)")
    if inception:
        metrics.check_inception(inception)
    if judges.of(dataset) or inception:
        metrics.require("a Fréchet distance", n, metrics.MIN_SAMPLES["fd"])
        compared = _compared(n, None, dataset, reference)
        metrics.require(f"a Fréchet distance to {reference or dataset}", len(compared), metrics.MIN_SAMPLES["fd"])
    elif reference:
        data.load(reference)


def _compared(n: int, size: int | None, dataset: str, reference: str) -> Dataset:
    """The data set that n pictures of this size are compared with."""
    return data.load(reference or dataset, **_options(dataset, n, size))


def _options(dataset: str, n: int, size: int | None) -> dict:
    """Options of `data.load` for n pictures that training has not seen, where a data set has some; letters have one size."""
    if data.kind(dataset) == "glyphs":
        return {"split": "test", "n": n}
    return {"split": "test", "n": n, "size": size} if dataset == "faces" else {"size": size}


def check_decoder(model: nn.Module, vae: AutoencoderKL | None) -> None:
    """Raise ValueError if the model makes latents and there is no `vae`."""
    channels = denoisers.of(model).shape(model)[0]
    if channels not in (1, 3) and vae is None:
        raise ValueError(f"{type(model).__name__} makes latents of {channels} channels; name their autoencoder's folder (vae)")


def check_model(model: nn.Module, dataset: str, base: str, inception: str | None) -> None:
    """Raise ValueError or OSError if there is nothing to score the model's pictures by, or no such data set."""
    channels, name = denoisers.of(model).shape(model)[0], type(model).__name__
    if judges.of(dataset):
        size = denoisers.picture_size(model)
        picture, condition = data.load(dataset, **_options(dataset, 1, size))[0]
        if (channels, size) != tuple(picture.shape[:2]):
            expected = list(picture.shape)
            raise ValueError(f"{dataset} are pictures of shape {expected}, and those of {name} are not; name its own data")
        _check_text(model, dataset, condition)
    elif not (base or inception):
        raise ValueError(f"{dataset} is scored with Inception's weights (FID) or against a base (SSIM); name one")
    elif dataset not in data.NAMES:  # SSIM needs no pictures of a known set
        data.load(dataset)


def _check_text(model: nn.Module, dataset: str, condition: dict | int) -> None:
    """Raise ValueError unless the model takes text of the shape in `condition`, or takes none where there is none."""
    needed = denoisers.of(model).conditioning(model, lambda *shape: torch.empty(shape, device="meta"))
    shapes = {name: list(value.shape) for name, value in (condition.items() if isinstance(condition, dict) else ())}
    if {name: list(value.shape) for name, value in needed.items() if name != "class_labels"} != shapes:
        raise ValueError(f"{type(model).__name__} is not conditioned as {dataset} are; name its own data")


def check_base(model: nn.Module, base: nn.Module) -> None:
    """Raise ValueError if the pictures of `base` cannot be compared with the model's: to call before drawing."""
    shape, expected = (list(denoisers.of(each).shape(each)) for each in (base, model))
    if shape != expected:
        raise ValueError(f"the base makes pictures of shape {shape}, the model of {expected}; take a base of the same shape")


def score(
    images: torch.Tensor,
    asked: torch.Tensor | None,
    dataset: str,
    base: torch.Tensor | None = None,
    inception: str | None = None,
    reference: str = "",
) -> dict[str, float]:
    """Scores of pictures uint8 [n, C, H, W].

    Fréchet distance, kernel distance, precision and recall compare sets of pictures. Glyphs and faces are compared with as many
    of the test split, on the features of their classifier; other pictures with the training set, on Inception's features, if
    its weights are at hand.

    Args:
        asked: what the model was asked to draw, as `asked` gives it.
        base: the teacher's pictures from the same noise, for the score "ssim_to_base".
        inception: path of torch-fidelity's Inception weights.
        reference: name of a data set to compare with instead of the training set.
    """
    judge, scores = judges.of(dataset), {"n": len(images)}
    if judge or inception:
        compared = _compared(len(images), images.shape[-1], dataset, reference)
        scores |= metrics.frechet(images, compared, inception, judge or judges.GLYPHS)
    if judge and asked is not None:
        metrics.require(judge.accuracy, len(images), metrics.MIN_SAMPLES[judge.accuracy])
        scores[judge.accuracy] = judge.share_read(images, asked)
    if base is not None:
        scores["ssim_to_base"] = metrics.ssim(images, base).mean().item()
    return scores
