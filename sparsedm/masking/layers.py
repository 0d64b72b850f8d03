"""N:M sparse training layers and the life of a layer: sparsify, densify, fold.

`sparsify` swaps the class of `nn.Linear` and `nn.Conv2d` modules in place. Parameters keep their identity and their
state-dict key, so optimisers, EMA, accelerate and checkpoints go on working; the mask is derived from the dense master
weight in every forward and never stored.
"""

import copy
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase

import torch
import torch.nn.functional as F
from torch import nn

from . import nm
from .dense import Rule, by_globs, default_rule
from .nm import NMPattern

SR_STE_DECAY = 2e-4
DECAY_MODES = ("gradient", "decoupled")

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)  # their weights are [in, out, ...]
WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)  # layers that are listed and counted

NEVER_CALLED = "its forward is never called: unused, or its weight is read in another way, which no mask would reach"


class _SRSTE(torch.autograd.Function):
    """Masked weight forward; backward g + decay * (1 - mask) * w, straight through to kept and pruned entries alike."""

    @staticmethod
    def forward(ctx, weight: torch.Tensor, mask: torch.Tensor, decay: float) -> torch.Tensor:
        masked = nm.masked(weight, mask)
        ctx.decays = bool(decay)
        if decay:  # scaled here: torch.compile (2.13) loses a factor that is applied in backward by add's alpha
            ctx.save_for_backward((weight - masked).mul_(decay))
        return masked

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        return grad + ctx.saved_tensors[0] if ctx.decays else grad, None, None


class _NMLayer:
    """What NMLinear and NMConv2d share.

    Attributes:
        pattern: N:M of the weight.
        decay: lambda of SR-STE.
        decay_mode: one of `DECAY_MODES`.
        loss_scale: the factor by which the loss is multiplied before it goes backward (`set_loss_scale`).
        frozen_mask: the mask that no longer follows the weight, or None.
        called: whether the forward has run.
    """

    pattern: NMPattern
    decay: float
    decay_mode: str
    loss_scale: float = 1.0
    frozen_mask: torch.Tensor | None
    called: bool = False

    def mask(self) -> torch.Tensor:
        """Boolean mask of the current weight, or the frozen one."""
        return nm.mask(self.weight, self.pattern) if self.frozen_mask is None else self.frozen_mask

    def freeze_mask(self) -> None:
        """Keep the current weight's mask from now on."""
        self.register_buffer("frozen_mask", nm.mask(self.weight, self.pattern), persistent=False)

    def masked_weight(self) -> torch.Tensor:
        """The weight the layer computes with: exact zeros outside the mask, SR-STE gradient to the dense master.

        SparseDM 3.2 (arXiv 2404.10445), after SR-STE (arXiv 2102.04010): dL/dw = dL/dw_masked + decay * (1 - mask) * w.
        """
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            decay = self.decay * self.loss_scale if self.decay_mode == "gradient" else 0.0
            return _SRSTE.apply(self.weight, self.mask(), decay)
        with torch.inference_mode(False), torch.no_grad():
            masked = nm.masked(self.weight.detach(), self.mask()).requires_grad_(self.weight.requires_grad)
            return masked.view_as(masked)  # autocast keeps its casts of leaves, but not of views

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, pattern={self.pattern}, decay={self.decay:g}"


class NMLinear(_NMLayer, nn.Linear):
    """`nn.Linear` whose weight is masked N:M along the input features."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        self.called = True
        return F.linear(input, self.masked_weight(), self.bias)


class NMConv2d(_NMLayer, nn.Conv2d):
    """`nn.Conv2d` whose weight is masked N:M along the input channels, at each kernel position by itself."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        self.called = True
        return self._conv_forward(input, self.masked_weight(), self.bias)


_SPARSE_CLASS = {nn.Linear: NMLinear, nn.Conv2d: NMConv2d}
_DENSE_CLASS = {sparse: dense for dense, sparse in _SPARSE_CLASS.items()}


def nm_layers(model: nn.Module) -> Iterator[tuple[str, NMLinear | NMConv2d]]:
    """Names and modules of the sparse-training layers."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, _NMLayer))


def is_sparse(model: nn.Module) -> bool:
    """Whether `model` has sparse-training layers."""
    return any(isinstance(module, _NMLayer) for module in model.modules())


def never_called(model: nn.Module) -> set[str]:
    """Names of the sparse-training layers whose forward has not run in any call of `model` since `sparsify`.

    The set is empty before the first call of the model that `sparsify` was given: nothing is known then.
    """
    return {name for name, module in nm_layers(model) if not module.called} if _called(model) else set()


def weight_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules of all linear and convolution layers, sparse or not."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, WEIGHTED))


def refuse_adapters(model: nn.Module) -> None:
    """Raise ValueError if an adapter (LoRA) stands where a layer of the model's class should be."""
    for name, module in model.named_modules():
        if hasattr(module, "base_layer"):
            remedy = "merge it into the weights and unload it first (diffusers: fuse_lora, unload_lora_weights)"
            raise ValueError(f"{name} is wrapped by an adapter ({type(module).__name__}); {remedy}")


def refuse_fused(model: nn.Module) -> None:
    """Raise ValueError if fused projections, which are copies of weights, stand beside the layers of the model's class."""
    for name, module in model.named_modules():
        if getattr(module, "fused_projections", False):
            remedy = "load the model anew, and call fuse_qkv_projections at the end, on the folded model"
            raise ValueError(f"{name} has fused projections beside its own; {remedy}")


def sparsify(
    model: nn.Module,
    pattern: str | NMPattern = "2:4",
    *,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] | None = None,
    overrides: Mapping[str, str | NMPattern] | None = None,
    decay: float = SR_STE_DECAY,
    decay_mode: str = "gradient",
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
        decay: lambda of SR-STE, 2e-4 in the paper; 0 is the plain straight-through estimator.
        decay_mode: "gradient" adds the SR term to the gradient (the paper, so Adam normalises it); "decoupled" leaves it
            to `decay_pruned`, which the training loop calls after the optimiser's step.
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
    if not 0 <= decay < math.inf:
        raise ValueError(f"decay must not be negative, it is {decay}")
    excluded = default_rule(model) if exclude is None else by_globs(exclude)
    layers = dict(weight_layers(model))
    bypassed = _shared_weights(model) | dict(bypassed or {})
    _check_globs([*include, *overrides, *(exclude or ())], layers)
    converted = 0
    for name, module in layers.items():
        chosen = next((p for glob, p in overrides.items() if fnmatchcase(name, glob)), pattern)
        reason = why_dense(name, module, chosen, include, excluded) or bypassed.get(name)
        if reason:
            if isinstance(module, _NMLayer):
                _to_plain(module)
            module.dense_reason = reason
            continue
        module.__class__ = _SPARSE_CLASS.get(type(module), type(module))
        module.pattern, module.decay, module.decay_mode = chosen, float(decay), decay_mode
        module.register_buffer("frozen_mask", None, persistent=False)
        module.__dict__.pop("dense_reason", None)
        if frozen:
            module.freeze_mask()
        converted += 1
    if not converted:
        reasons = "; ".join(f"{name}: {module.dense_reason}" for name, module in list(layers.items())[:3])
        raise ValueError(f"no layer of {type(model).__name__} takes {pattern} ({reasons or 'it has no linear or conv layer'})")
    save_as(model, fold)
    _watch(model)
    return model


def _shared_weights(model: nn.Module) -> dict[str, str]:
    """Layers whose weight other modules use, too: the others would see the dense weight until `fold`, then the zeros."""
    users: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            users.setdefault(id(parameter), []).append(name)
    shared = ((name, users.get(id(module.weight), ())) for name, module in weight_layers(model))
    return {name: f"its weight is used by {' and '.join(names)}" for name, names in shared if len(names) > 1}


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


def _check_globs(globs: Sequence[str], layers: Mapping[str, nn.Module]) -> None:
    for glob in globs:
        if glob != "*" and not any(fnmatchcase(name, glob) for name in layers):
            raise ValueError(f"{glob!r} matches no layer; the layers are {', '.join(list(layers)[:8])} ...")


def why_dense(name: str, module: nn.Module, pattern: NMPattern, include: Sequence[str], excluded: Rule) -> str | None:
    """Why a layer cannot or must not be sparse, or None for a layer that will be."""
    if not any(fnmatchcase(name, glob) for glob in include):
        return "not included"
    if reason := excluded(name):
        return reason
    if type(module) not in _SPARSE_CLASS and not isinstance(module, _NMLayer):
        return f"class {type(module).__name__} is not plain Linear or Conv2d"
    if getattr(module, "groups", 1) != 1:
        return f"grouped convolution ({module.groups} groups)"
    axis = module.weight.shape[1]
    if axis % pattern.m:
        return f"{axis} inputs, not a multiple of {pattern.m}"
    return None


def _leave(model: nn.Module, keep_mask: bool) -> nn.Module:
    unused = never_called(model)
    for name, module in list(nm_layers(model)):
        if keep_mask and name in unused:
            module.dense_reason = NEVER_CALLED
        elif keep_mask:
            with torch.no_grad():
                module.weight.copy_(nm.masked(module.weight, module.mask()))
        _to_plain(module)
    save_as_is(model)
    for module in model.modules():
        _unwatch(module)
    return model


def save_as(model: nn.Module, plain: Callable[[nn.Module], nn.Module]) -> None:
    """From now on diffusers' `save_pretrained` writes `plain(copy)`, for the model and for its parts that have this method.

    The folder then holds the weights that the model computes with, in layers that any tool reads.
    """
    for module in model.modules():
        if hasattr(module, "save_pretrained"):
            module.save_pretrained = functools.partial(_save_plain, module, plain)


def save_as_is(model: nn.Module) -> None:
    """Undo `save_as`."""
    for module in model.modules():
        module.__dict__.pop("save_pretrained", None)


def _save_plain(model: nn.Module, plain: Callable[[nn.Module], nn.Module], save_directory, **kwargs) -> None:
    copied = plain(copy.deepcopy(model))
    save_as_is(copied)
    copied.save_pretrained(save_directory, **kwargs)


def _to_plain(module: _NMLayer) -> None:
    module.__class__ = _DENSE_CLASS[type(module)]
    del module.pattern, module.decay, module.decay_mode, module.frozen_mask
    for name in ("loss_scale", "called"):
        module.__dict__.pop(name, None)


def with_weights(plain: nn.Module, weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Module:
    """`plain`, a new linear or convolution layer, with these weights, their dtype and device, in eval mode."""
    plain.to(weight.device, weight.dtype)
    with torch.no_grad():
        plain.weight.copy_(weight)
        if bias is not None:
            plain.bias.copy_(bias)
    return plain.eval()


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
        ValueError: a pattern N:N, or a layer's input axis is not a multiple of M (nothing is changed then).
    """
    pattern = NMPattern.sparse(pattern)
    for name, module in nm_layers(model):
        if module.weight.shape[1] % pattern.m:
            raise ValueError(f"{name} has {module.weight.shape[1]} inputs, not a multiple of {pattern.m}")
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
        pattern = module.pattern if isinstance(module, _NMLayer) else nm.detect(module.weight)
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
