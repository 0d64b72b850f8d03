"""The state of every layer of a model, as a table for people."""

import html
from dataclasses import dataclass

import torch
from torch import nn

from ..masking import nm
from ..masking.dense import Rule, default_rule, why_dense
from ..masking.layers import NEVER_CALLED, never_called, patterns
from ..masking.plain import WEIGHTED
from ..masking.srste import NMConv2d, NMLinear
from ..packing.packed import is_packed
from . import macs as macs_module


@dataclass(frozen=True)
class LayerRow:
    """One layer.

    Attributes:
        name: the module's name.
        shape: of the weight.
        pattern: N:M; "" for a dense layer.
        state: "sparse-training", "folded", "packed" or "dense".
        mac_share: the layer's share (0 to 1) of the model's dense MACs; None if the MACs could not be counted.
        note: why the layer is dense or not packed, or how long it takes packed and dense.
    """

    name: str
    shape: tuple[int, ...]
    pattern: str
    state: str
    mac_share: float | None
    note: str


@dataclass(frozen=True)
class Report:
    """The layers of a model; prints as a table, in notebooks as HTML.

    Attributes:
        rows: all linear and convolution layers.
        dense_macs: MACs per image with all weights; None if they could not be counted.
        sparse_macs: MACs per image without the zeros, or None.
        executed_macs: MACs per image that the kernels in use execute, or None.
    """

    rows: tuple[LayerRow, ...]
    dense_macs: int | None
    sparse_macs: int | None
    executed_macs: int | None

    _HEAD = ("layer", "shape", "pattern", "state", "MACs", "note")

    def _cells(self) -> list[tuple[str, ...]]:
        return [
            (r.name, "x".join(map(str, r.shape)), r.pattern, r.state, "" if r.mac_share is None else f"{r.mac_share:.1%}", r.note)
            for r in self.rows
        ]

    def summary(self) -> str:
        """One line: how many layers are sparse, and the MACs with and without."""
        sparse = sum(row.state != "dense" for row in self.rows)
        text = f"{sparse} of {len(self.rows)} layers are N:M sparse"
        if self.dense_macs:
            saved = 1 - self.sparse_macs / self.dense_macs
            text += f"; {self.dense_macs / 1e6:,.1f} M MACs dense, {self.sparse_macs / 1e6:,.1f} M sparse ({saved:.1%} fewer)"
            text += f", {self.executed_macs / 1e6:,.1f} M executed"
        elif any(row.state == "sparse-training" for row in self.rows):
            text += "; without inputs={...} neither MACs are known nor whether the model calls every one of them"
        return text

    def __str__(self) -> str:
        table = [self._HEAD, *self._cells()]
        widths = [max(len(row[i]) for row in table) for i in range(len(self._HEAD))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
        return "\n".join([*lines, self.summary()])

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{cell}</th>" for cell in self._HEAD)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in self._cells())
        return f"<table><tr>{head}</tr>{body}</table><p>{self.summary()}</p>"


def report(model: nn.Module, inputs: dict[str, torch.Tensor] | None = None) -> Report:
    """The state of every linear and convolution layer of `model`.

    Folded layers are recognised by their weights, which are verified to be N:M.

    Args:
        inputs: keyword arguments of one call with batch size 1. Models whose config does not tell the input's shape need them
            for the MACs, and to see which layers a call leaves out.
    """
    counts = None
    try:
        counts = macs_module.count(model, inputs)
    except ValueError:
        if inputs is not None:
            raise
    shown = [(n, m) for n, m in model.named_modules() if isinstance(m, WEIGHTED) or is_packed(m)]
    known = patterns(model) | {name: module.pattern for name, module in shown if is_packed(module)}
    pattern = next(iter(known.values()), None)  # what the dense layers could have had
    excluded, unused = default_rule(model), never_called(model)
    notes = {name: NEVER_CALLED if name in unused else _note(excluded, name, module, pattern) for name, module in shown}
    rows = tuple(_row(name, module, known.get(name), counts, notes[name], name in unused) for name, module in shown)
    return Report(rows, counts and counts.dense, counts and counts.sparse, counts and counts.executed)


def _row(
    name: str, module: nn.Module, pattern: nm.NMPattern | None, counts: macs_module.Macs | None, note: str, unused: bool
) -> LayerRow:
    layer, state = counts and counts.by_name.get(name), "folded" if pattern else "dense"
    if is_packed(module):
        state = "packed"
    elif isinstance(module, (NMLinear, NMConv2d)) and not unused:
        state, note = "sparse-training", "" if layer or not counts else NEVER_CALLED
    share = counts and (layer.dense / counts.dense if layer else 0.0)
    return LayerRow(name, tuple(module.weight.shape), str(pattern or ""), state, share, note)


def _note(excluded: Rule, name: str, module: nn.Module, pattern: nm.NMPattern | None) -> str:
    """Why a layer is dense or not packed, or what its mask had to do without: as noted on the layer, or by the rules."""
    if is_packed(module):
        return str(module.times or "")
    noted = getattr(module, "dense_reason", "") or getattr(module, "mask_note", "")
    if noted or pattern is None:
        return noted
    return why_dense(name, module, pattern, ("*",), excluded) or ""
