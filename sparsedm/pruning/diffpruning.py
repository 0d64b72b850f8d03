"""Diff-Pruning (arXiv 2305.10924), structured pruning: channels are scored by a Taylor expansion of the loss, and removed.

`importance` accumulates gradients over selected timesteps, `prune` removes the channels of the lowest scores once, and training
goes on with `sparsedm.train`. Threshold 0 gives the plain Taylor baseline; magnitude and random scores need no gradients.
"""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ..diffusion import add_noise, predict_noise, training_scheduler
from ..masking import layers
from ..models import denoisers, dryrun
from ..models.denoisers import Inputs, null_label
from ..packing.packed import has_packed
from . import structure
from .structure import Group

SCORES = ("squared", "absolute", "magnitude", "random")


@dataclass(frozen=True)
class TimestepLoss:
    """One timestep of `importance`.

    Attributes:
        timestep: t, from 0.
        timesteps: how many timesteps the noise schedule has.
        loss: the noise-prediction loss at t.
        used: whether the gradient at t counts; that of the last timestep may not.
    """

    timestep: int
    timesteps: int
    loss: float
    used: bool


def importance(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor | Inputs | None = None,
    *,
    threshold: float = 0.05,
    seed: int = 0,
) -> Iterator[TimestepLoss]:
    """Accumulate in the model's `.grad` the gradients of the noise loss at t = 0, 1, 2, ..., unweighted.

    All timesteps share the pictures [B, C, H, W], one noise (section 3.2 and the official code), and the labels [B], or a dict of
    the arguments that condition the model (such as {"encoder_hidden_states": [B, tokens, dim]}), if the model takes any. The sum
    ends before the first t whose loss is below `threshold` times the largest so far: noisy steps say little about the picture.
    Models that predict velocity or the picture are scored by the noise that their prediction implies.

    Raises:
        ValueError: a threshold outside [0, 1), or a model that this package cannot call or that needs other arguments.
        FloatingPointError: a loss that is not finite (its timestep is named), or in the end a gradient (its parameter is named).
    """
    if not 0 <= threshold < 1:
        raise ValueError(f"threshold {threshold} is not in [0, 1)")
    remedy = "the scores magnitude and random do without a call"
    denoisers.refuse_unknown(model, remedy)
    given = dict(labels) if isinstance(labels, Mapping) else {"class_labels": labels}
    denoisers.require(model, given, f"give a dict of the arguments instead of labels; {remedy}")
    model.eval().requires_grad_(True).zero_grad()
    scheduler = training_scheduler(model)
    images = images.to(next(model.parameters()).device)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed)).to(images)
    if given.get("class_labels") is None or null_label(model) is None:
        given.pop("class_labels", None)
    given = denoisers.each(lambda x: x.to(images.device), given)
    steps, largest = scheduler.config.num_train_timesteps, 0.0
    for t in range(steps):
        at = torch.full((images.shape[0],), t, device=images.device)
        loss = _noise_loss(model, scheduler, images, noise, at, given)
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss at timestep {t} is {loss.item()}")
        largest = max(largest, loss.item())
        used = loss.item() >= threshold * largest
        if used:
            loss.backward()
        yield TimestepLoss(t, steps, loss.item(), used)
        if not used:
            break
    broken = [name for name, p in model.named_parameters() if p.grad is not None and not torch.isfinite(p.grad).all()]
    if broken:
        raise FloatingPointError(f"the gradient of {broken[0]} is not finite")


def _noise_loss(model, scheduler, images, noise, t, conditioning: Inputs) -> torch.Tensor:
    """Squared error of the predicted noise, summed over the picture, mean over the batch (as the official code)."""
    noisy = add_noise(scheduler, images, noise, t)
    output = predict_noise(scheduler, denoisers.of(model).predict(model, noisy, t, conditioning), t, noisy)
    return (noise - output).square().flatten(1).sum(1).mean()


def scores(model: nn.Module, group: Group, kind: str = "squared", generator: torch.Generator | None = None) -> torch.Tensor:
    """The importance [channels] of a group's channels.

    "squared" sums (w * grad)^2 over all weights that touch a channel, as the paper's experiments, "absolute" |w * grad|, as the
    authors' diffusers script; norm weights add |w * grad| to both. "magnitude" is the mean over the layers of the sum of w^2.

    Raises:
        ValueError: an unknown kind, or no gradients (run `importance` first).
    """
    _check_score(kind)
    if kind == "random":
        return torch.rand(group.channels, generator=generator)
    total, counted = torch.zeros(group.channels), 0
    for member in group.members:
        layer = model.get_submodule(member.layer)
        norm = isinstance(layer, (nn.GroupNorm, nn.LayerNorm))
        if isinstance(layer, nn.Embedding) or layer.weight is None or (norm and kind == "magnitude"):
            continue
        weight = layer.weight.detach().float()
        if kind == "magnitude":
            values = weight.square()
        elif layer.weight.grad is None:
            raise ValueError(f"{member.layer} has no gradient; run sparsedm.importance first")
        else:
            products = weight * layer.weight.grad.float()
            values = products.square() if kind == "squared" and not norm else products.abs()
        if member.axis == "in":
            values = values.transpose(0, 1)
        per_entry = values.reshape(values.shape[0], -1).sum(1)
        total.index_add_(0, member.root, per_entry[member.index].cpu())
        counted += 1
    return total / counted if kind == "magnitude" else total


def _check_score(kind: str) -> None:
    if kind not in SCORES:
        raise ValueError(f"unknown score {kind!r}; known: {', '.join(SCORES)}")


def check(model: nn.Module, ratio: float, score: str = "squared", round_to: int = 1) -> None:
    """Raise ValueError for arguments that `prune` would refuse, before `importance` computes gradients for them."""
    _check_score(score)
    if not 0 < ratio < 1:
        raise ValueError(f"ratio {ratio} is not between 0 and 1")
    if round_to < 1:
        raise ValueError(f"round_to {round_to} is not a positive number of channels")
    if getattr(getattr(model, "config", None), "pruning", None):
        raise ValueError("the model is pruned already; prune the original with a higher ratio")
    if layers.is_sparse(model) or has_packed(model):
        raise ValueError("the model is in sparse training or packed; prune the dense one, and sparsify what is left")


def prune(
    model: nn.Module,
    ratio: float,
    *,
    score: str = "squared",
    round_to: int = 1,
    seed: int = 0,
    inputs: Mapping[str, torch.Tensor] | None = None,
) -> nn.Module:
    """A copy of `model` without the share `ratio` (0 to 1) of the channels of every group, chosen by their `scores`.

    The config of the copy, if it has one, holds the record of the kept channels, from which `sparsedm.load` rebuilds the saved
    model. The scores "squared" and "absolute" need the gradients of `importance`.

    Args:
        ratio: the share of channels to remove, 0 to 1.
        score: one of `SCORES`.
        round_to: the number of kept channels is rounded up to a multiple; with 4 every layer can become 2:4 sparse afterwards.
        seed: of the random scores.
        inputs: keyword arguments of one call, for models whose config does not tell their shapes.

    Raises:
        ValueError: a ratio that leaves nothing of a layer (named) or removes nothing, a model that cannot be traced or does not
            run without the channels, a score without gradients, or a model that is pruned already, in sparse training or packed.
    """
    check(model, ratio, score, round_to)
    groups = structure.groups(model, inputs or dryrun.example_inputs(model))
    generator = torch.Generator().manual_seed(seed)
    kept = [(group, structure.keep(group, scores(model, group, score, generator), ratio, round_to)) for group in groups]
    if all(len(channels) == group.channels for group, channels in kept):
        raise ValueError(f"ratio {ratio} with round_to {round_to} removes nothing; take a higher ratio or a lower round_to")
    record = structure.record(model, kept)
    pruned = copy.deepcopy(model)
    pruned.zero_grad()
    return structure.apply(pruned, record, inputs)
