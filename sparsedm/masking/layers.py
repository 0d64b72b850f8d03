"""The life of a model's layers: sparsify, densify, fold, and what is asked of them while they are trained.

`sparsify` swaps the class of `nn.Linear` and `nn.Conv2d` modules in place. Parameters keep their identity and their
state-dict key, so optimisers, EMA, accelerate and checkpoints go on working; the mask is derived from the dense master
weight in every forward and never stored.
"""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import nn

from . import nm
from .dense import by_globs, check_globs, default_rule, shared_weights, why_dense
from .nm import NMPattern
from .plain import TRANSPOSED, refuse_adapters, refuse_fused, save_as, save_as_is, weight_layers
from .srste import DECAY_MODES, ESTIMATORS, SR_STE_DECAY, NMConv2d, NMLayer, NMLinear, to_plain, to_sparse

NEVER_CALLED = "its forward is never called: unused, or its weight is read in another way, which no mask would reach"


def nm_layers(model: nn.Module) -> Iterator[tuple[str, NMLinear | NMConv2d]]:
    """Names and modules of the sparse-training layers."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, NMLayer))


def is_sparse(model: nn.Module) -> bool:
    """Whether `model` has sparse-training layers."""
    return any(isinstance(module, NMLayer) for module in model.modules())


def never_called(model: nn.Module) -> set[str]:
    """Names of the sparse-training layers whose forward has not run in any call of `model` since `sparsify`.

    The set is empty before the first call of the model that `sparsify` was given: nothing is known then.
    """
    return {name for name, module in nm_layers(model) if not module.called} if _called(model) else set()


def sparsify(
    model: nn.Module,
    pattern: str | NMPattern = "2:4",
    *,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] | None = None,
    overrides: Mapping[str, str | NMPattern] | None = None,
    decay: float | None = None,
    decay_mode: str = "gradient",
    estimator: str = "sr-ste",
    frozen: bool = False,
    bypassed: Mapping[str, str] | None = None,
) -> nn.Module:
    """Turn the linear and convolution layers of `model` into sparse-training layers, in place; returns the model.

    Args:
        pattern: N:M for every layer.
        include: globs on the names of the layers that may become sparse ("mid_block.*").
        exclude: globs on the names of the layers that stay dense; by default the papers' rule for the model's class, or the
            general rule (`masking.dense`).
        overrides: glob to pattern, for layers that get another pattern; the first glob that matches counts.
        decay: lambda of SR-STE, by default the paper's 2e-4; 0 is the plain straight-through estimator. S-STE has none.
        decay_mode: "gradient" adds the SR term to the gradient (the paper, so Adam normalises it); "decoupled" leaves it
            to `decay_pruned`, which the training loop calls after the optimiser's step; "adam" to AdamW's step, inside its
            division (AST, `training.ast`).
        estimator: "sr-ste" masks the weights; "s-ste" shrinks them by the group's threshold and scales them by a factor that
            is fixed now (S-STE, arXiv 2409.09099).
        frozen: keep the masks of the present weights (as ASP does), instead of deriving the masks anew in every step.
        bypassed: layer to reason, for layers that stay dense because a mask would not reach all uses of their weights;
            `models.students` finds these layers.

    Layers that stay dense carry the reason, see `sparsedm.report`.

    Raises:
        ValueError: bad pattern or mode, a glob that matches no layer, no layer that fits the pattern, or a model with adapters
            or fused projections.
    """
    refuse_adapters(model)
    refuse_fused(model)
    pattern = NMPattern.sparse(pattern)
    overrides = {glob: NMPattern.sparse(p) for glob, p in (overrides or {}).items()}
    if decay_mode not in DECAY_MODES:
        raise ValueError(f"decay_mode {decay_mode!r} is none of {', '.join(DECAY_MODES)}")
    decay = _checked_decay(decay, estimator, frozen)
    excluded = default_rule(model) if exclude is None else by_globs(exclude)
    layers = dict(weight_layers(model))
    bypassed = shared_weights(model) | dict(bypassed or {})
    check_globs([*include, *overrides, *(exclude or ())], layers)
    converted = 0
    for name, module in layers.items():
        chosen = next((p for glob, p in overrides.items() if fnmatchcase(name, glob)), pattern)
        reason = why_dense(name, module, chosen, include, excluded) or bypassed.get(name)
        if reason:
            if isinstance(module, NMLayer):
                to_plain(module)
            module.dense_reason = reason
            continue
        to_sparse(module, chosen, decay, decay_mode)
        module.__dict__.pop("dense_reason", None)
        if frozen:
            module.freeze_mask()
        if estimator == "s-ste":
            module.soften()
        converted += 1
    if not converted:
        reasons = "; ".join(f"{name}: {module.dense_reason}" for name, module in list(layers.items())[:3])
        raise ValueError(f"no layer of {type(model).__name__} takes {pattern} ({reasons or 'it has no linear or conv layer'})")
    save_as(model, fold)
    _watch(model)
    return model


def _checked_decay(decay: float | None, estimator: str, frozen: bool) -> float:
    """The decay of the layers. Raises ValueError for an unknown estimator, and for what it has not."""
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator {estimator!r} is none of {', '.join(ESTIMATORS)}")
    if estimator == "s-ste" and (decay or frozen):
        raise ValueError(f"S-STE has no {'decay' if decay else 'frozen masks'}; leave the option out")
    if decay is None:
        decay = 0.0 if estimator == "s-ste" else SR_STE_DECAY
    if not 0 <= decay < math.inf:
        raise ValueError(f"decay must not be negative, it is {decay}")
    return decay


def _watch(model: nn.Module) -> None:
    _unwatch(model)
    model.register_forward_pre_hook(_note_call)


def _unwatch(model: nn.Module) -> None:
    for key in [key for key, hook in model._forward_pre_hooks.items() if hook is _note_call]:
        del model._forward_pre_hooks[key]
    model.__dict__.pop("_called_sparse", None)


def _note_call(model: nn.Module, args: tuple) -> None:
    model._called_sparse = True


def _called(model: nn.Module) -> bool:
    return model.__dict__.get("_called_sparse", False)


def _leave(model: nn.Module, keep_mask: bool) -> nn.Module:
    unused = never_called(model)
    for name, module in list(nm_layers(model)):
        if keep_mask and name in unused:
            module.dense_reason = NEVER_CALLED
        elif keep_mask:
            with torch.no_grad():
                module.weight.copy_(module.sparse_weight())
        to_plain(module)
    save_as_is(model)
    for module in model.modules():
        _unwatch(module)
    return model


def densify(model: nn.Module) -> nn.Module:
    """Back to plain layers with the dense master weights, in place; the masks are dropped. Returns the model."""
    return _leave(model, keep_mask=False)


def fold(model: nn.Module) -> nn.Module:
    """Back to plain layers with the masks written into the weights as exact zeros, in place. Returns the model.

    The outputs do not change by a bit, in eager mode and as long as the parameters require gradients as before: torch (2.13)
    multiplies some batches in another order by weights that require none. A layer whose forward has run in no call of the model
    since `sparsify` stays as it has computed, dense, with that reason (`never_called`).

    Training on needs the dense master weights: fold a `copy.deepcopy` to keep them.

    Raises:
        ValueError: projections that were fused from the dense master weights, and have no masks.
    """
    if is_sparse(model):
        refuse_fused(model)
    return _leave(model, keep_mask=True)


def folded(model: nn.Module) -> nn.Module:
    """A folded copy; the model itself is not touched."""
    return fold(copy.deepcopy(model))


def set_pattern(model: nn.Module, pattern: str | NMPattern) -> None:
    """Give every sparse-training layer another pattern; weights and optimiser state stay, frozen masks are taken anew.

    Raises:
        ValueError: a pattern N:N, a layer's input axis is not a multiple of M, or a layer is trained with S-STE (nothing is
            changed then).
    """
    pattern = NMPattern.sparse(pattern)
    for name, module in nm_layers(model):
        if module.weight.shape[1] % pattern.m:
            raise ValueError(f"{name} has {module.weight.shape[1]} inputs, not a multiple of {pattern.m}")
        if module.soft_scale is not None and module.pattern != pattern:
            raise ValueError(f"{name} is trained with S-STE, whose factor belongs to one pattern; keep {module.pattern}")
    for _, module in nm_layers(model):
        module.pattern = pattern
        if module.frozen_mask is not None:
            module.freeze_mask()


def set_loss_scale(model: nn.Module, scale: float) -> None:
    """Tell the layers by what factor the loss goes backward (a part of a batch, float16's loss scaling).

    The decay is no part of the loss: without this factor the decay's share of the gradient would grow or vanish when gradients
    are scaled back.
    """
    for _, module in nm_layers(model):
        module.loss_scale = float(scale)


def decay_pruned(model: nn.Module, lr: float) -> None:
    """The decoupled SR term: w <- w - lr * decay * (1 - mask) * w for layers with decay_mode="decoupled"."""
    unused = never_called(model)
    with torch.no_grad():
        for name, module in nm_layers(model):
            if module.decay_mode == "decoupled" and module.decay and name not in unused:
                pruned = nm.masked(module.weight, ~module.mask())
                module.weight.sub_(pruned, alpha=lr * module.decay)


def patterns(model: nn.Module) -> dict[str, NMPattern]:
    """The N:M pattern of every layer that has one: set (sparse-training layers) or read off the weights (folded ones)."""
    by_name, unused = {}, never_called(model)
    for name, module in weight_layers(model):
        if name in unused or isinstance(module, TRANSPOSED):
            continue
        pattern = module.pattern if isinstance(module, NMLayer) else nm.detect(module.weight)
        if pattern is not None and pattern.n < pattern.m:
            by_name[name] = pattern
    return by_name


def masks(model: nn.Module) -> dict[str, torch.Tensor]:
    """The current mask of every sparse-training layer, by name."""
    return {name: module.mask() for name, module in nm_layers(model)}


def mask_change(before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]) -> float:
    """Share of the masked weights (0 to 1) whose mask differs between two results of `masks`."""
    total = sum(mask.numel() for mask in before.values())
    return sum(int((before[name] != after[name]).sum()) for name in before) / max(total, 1)
