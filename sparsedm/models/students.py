"""Sparse students: `sparsify` by the rules for layer names, and by a dry run that shows how one call uses the weights."""

from collections.abc import Mapping

import torch
from torch import nn

from ..masking import layers
from ..masking.nm import NMPattern
from . import dryrun


def sparsify(
    model: nn.Module, pattern: str | NMPattern = "2:4", *, inputs: Mapping[str, torch.Tensor] | None = None, **rules
) -> nn.Module:
    """Turn the linear and convolution layers of `model` into sparse-training layers, in place; returns the model.

    A dry run finds the layers whose weight is used outside of their forward, too. In training a mask would not reach such a
    use, but the zeros that `fold` writes would: these layers stay dense, and `sparsedm.report` says why.

    Args:
        pattern: N:M for every layer.
        inputs: keyword arguments of one call, for models whose config does not tell their shapes. Without `inputs` such a model
            gets no dry run; then `fold` leaves layers dense whose forward no call of the model has run.
        **rules: include, exclude, overrides, decay, decay_mode, estimator and frozen of `masking.layers.sparsify`.

    Raises:
        ValueError: as `masking.layers.sparsify`, and `inputs` that the model does not take raise what the model raises.
    """
    try:
        bypassed = dryrun.bypassed(model, inputs)
    except ValueError:
        if inputs is not None:
            raise
        bypassed = {}
    return layers.sparsify(model, pattern, bypassed=bypassed, **rules)
