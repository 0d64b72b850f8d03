"""Pictures drawn batch by batch, for people to look at. Several processes share the batches."""

import statistics
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL
from torch import nn

from .. import data, diffusion
from ..data import latents
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


def draw(
    model: nn.Module,
    n: int,
    labels: torch.Tensor | None = None,
    *,
    batch_size: int = 16,
    seed: int = 0,
    vae: AutoencoderKL | None = None,
    **options,
) -> Iterator[Progress]:
    """Draw n pictures of the classes `labels` [n], `batch_size` at a time; each depends on (seed, its number) alone.

    A generator that returns `Drawn` in the main process, and None in the others. Its progress counts sampling steps.

    Args:
        vae: the autoencoder that decodes the latents of a latent model.
        **options: sampler, steps and guidance, as for `diffusion.sample`.

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
        for state in diffusion.sample(model, noise, class_labels=some, generator=generators, **options):
            seconds.append(state.seconds)
            total, note = state.steps * len(starts), f"{state.seconds * 1e3:.0f} ms"
            yield Progress("sample", len(seconds), total, note, pictures=min(batch_size, n) / state.steps)
        images[first] = (latents.decode(vae, state.sample) if vae else state.sample).cpu()
    images = processes.collect(images)
    return Drawn(torch.cat([*images.values()]), statistics.median(seconds)) if processes.is_main() else None
