"""Fingerprints of models and tensors, so that nobody takes one model's scores for another's."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import nn

from ..masking import layers


def of_model(model: nn.Module) -> str:
    """16 hex digits that depend on the class, the config, and every weight that the model computes with.

    Weights of sparse-training layers count as masked: `fold` does not change the fingerprint. Saving and loading in the same
    dtype do not, either.
    """
    weights = dict(model.state_dict())
    weights |= {f"{name}.weight": layer.sparse_weight() for name, layer in layers.nm_layers(model)}
    config = {name: value for name, value in getattr(model, "config", {}).items() if not name.startswith("_")}
    return of_tensors(weights, type(model).__name__, json.dumps(config, sort_keys=True, default=str))


def of_tensors(tensors: Mapping[str, torch.Tensor], *words: str) -> str:
    """16 hex digits that depend on the words, and on the tensors' names, dtypes, shapes and bytes, in any order."""
    digest = hashlib.sha256(repr(words).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def of_files(paths: Iterable[Path]) -> str:
    """16 hex digits that depend on the content of the files, in this order."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]
