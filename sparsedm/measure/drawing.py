"""Pictures drawn batch by batch, for people to look at. Several processes share the batches."""

import statistics
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL
from torch import nn

from .. import data, diffusion
from ..data import faces, latents, prompts
from ..models import denoisers
from ..support import processes
from . import evaluation
from .evaluation import Progress


@dataclass(frozen=True)
class Drawn:
    """The outcome of `draw`.

    Attributes:
        images: pictures [n, C, H, W] in about [-1, 1].
        seconds: median of a sampling step in the main process.
    """

    images: torch.Tensor
    seconds: float


def labels(model: nn.Module, n: int, word: str = "", label: int | None = None) -> torch.Tensor | None:
    """The classes [n] to draw: the letters of `word` (n is then its length), or `label` n times, or all classes in turn.

    None for a model without classes.

    Raises:
        ValueError: both `word` and `label`, or letters without glyphs.
    """
    if word and label is not None:
        raise ValueError("a word has a label for each of its letters; give the word or the label, not both")
    if word:
        return data.word_labels(word)
    return evaluation.labels(model, n) if label is None else torch.full((n,), label)


def conditions(model: nn.Module, n: int, prompt: str = "") -> dict[str, torch.Tensor] | None:
    """The tokens of n faces that `prompt` describes, for a model that draws faces; None for other models without a prompt.

    Raises:
        ValueError: a prompt for a model that does not draw faces, or words that are not known (with the nearest known ones).
    """
    if not draws_faces(model):
        if prompt:
            raise ValueError(f"{type(model).__name__} here does not draw faces; leave the prompt out")
        return None
    tokens = faces.tokens(prompts.parse(prompt))
    return {latents.TEXT: tokens.expand(n, *tokens.shape)}


def draws_faces(model: nn.Module) -> bool:
    """Whether the model takes the tokens of `data.Faces`, and nothing else, and draws in colour."""
    try:
        needed = denoisers.of(model).conditioning(model, lambda *shape: torch.empty(shape, device="meta"))
        channels = denoisers.of(model).shape(model)[0]
    except ValueError:  # a config that does not tell
        return False
    shapes = {name: getattr(value, "shape", None) for name, value in needed.items()}
    return channels == 3 and shapes == {latents.TEXT: (faces.TOKENS, faces.DIM)}


def draw(
    model: nn.Module,
    n: int,
    labels: torch.Tensor | None = None,
    conditioning: dict[str, torch.Tensor] | None = None,
    negative: dict[str, torch.Tensor] | None = None,
    *,
    batch_size: int = 16,
    seed: int = 0,
    vae: AutoencoderKL | None = None,
    **options,
) -> Iterator[Progress]:
    """Draw n pictures of the classes `labels` [n], `batch_size` at a time; each depends on (seed, its number) alone.

    A generator that returns `Drawn` in the main process, and None in the others. Its progress counts sampling steps.

    Args:
        conditioning: the model's other arguments [n, ...], such as `conditions` gives them.
        negative: those of the unconditional half of guidance [n, ...].
        vae: the autoencoder that decodes the latents of a latent model.
        **options: sampler, steps, guidance and cache_interval, as for `diffusion.sample`.

    Raises:
        ValueError: the model makes latents and there is no `vae`, or as `diffusion.sample`.
    """
    evaluation.check_decoder(model, vae)
    starts, seconds, images = processes.share(range(0, n, batch_size)), [], {}
    for first in starts:
        count = min(batch_size, n - first)
        some = None if labels is None else labels[first : first + count]
        generators = diffusion.step_generators(count, seed, first)
        noise = diffusion.start_noise(model, count, seed, first)
        given, without = (
            inputs and denoisers.each(lambda x, first=first, count=count: x[first : first + count], inputs)
            for inputs in (conditioning, negative)
        )
        arguments = {"class_labels": some, "conditioning": given, "negative": without, "generator": generators, **options}
        for state in diffusion.sample(model, noise, **arguments):
            seconds.append(state.seconds)
            total, note = state.steps * len(starts), f"{state.seconds * 1e3:.0f} ms"
            yield Progress("sample", len(seconds), total, note, pictures=min(batch_size, n) / state.steps)
        images[first] = (latents.decode(vae, state.sample) if vae else state.sample).cpu()
    images = processes.collect(images)
    return Drawn(torch.cat([*images.values()]), statistics.median(seconds)) if processes.is_main() else None
