"""Structured pruning: groups of channels that hang together, and a record of the kept channels that any process can replay.

A group is a set of layer axes that must lose the same channels: a convolution's outputs, the norm behind it, the inputs of
all layers that read these outputs. In UNets torch-pruning's dependency graph finds the groups; other families name the pairs of
layers that share channels (models/denoisers.py): in U-ViT the hidden units of each MLP and the heads of each attention. The
record, {layer: {"out": "0-3,6", "in": ...}}, is plain JSON in the model's config: the channels that stay, as runs.
"""

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from diffusers.models.activations import GEGLU, SwiGLU
from diffusers.models.attention_processor import Attention as DiffusersAttention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.upsampling import Upsample2D
from torch import nn

from ..models import denoisers, dryrun
from ..models.denoisers import Pair

Record = dict[str, dict[str, str]]


@dataclass(frozen=True)
class Member:
    """One axis of a layer that belongs to a group.

    Attributes:
        layer: name of the layer.
        axis: "out" or "in".
        index: entries of the axis [n].
        root: channels of the group [n]; entry `index[i]` of the axis belongs to channel `root[i]`.
    """

    layer: str
    axis: str
    index: torch.Tensor
    root: torch.Tensor


@dataclass(frozen=True)
class Group:
    """Axes that lose the same channels.

    Attributes:
        channels: how many channels the group has, 0 to `channels` - 1.
        members: the axes.
        parts: equal runs of channels (the groups of a GroupNorm, the heads of an attention), which must stay equal in size.
        width: entries of an axis that make one channel: 1, or all entries of a head.
    """

    channels: int
    members: tuple[Member, ...] = field(repr=False)
    parts: int = 1
    width: int = 1

    @property
    def name(self) -> str:
        """The first layer whose outputs these are."""
        return next((m.layer for m in self.members if m.axis == "out"), self.members[0].layer)


def groups(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> list[Group]:
    """The groups of `model` whose channels can be removed without changing the shape of its output.

    Raises:
        ValueError: a family without pairs whose output does not come from `conv_out`, or torch-pruning cannot trace it.
    """
    pairs = denoisers.of(model).pairs
    if pairs is None and not isinstance(getattr(model, "conv_out", None), nn.Conv2d):
        known = "U-ViT, and UNets of diffusers, whose output comes from a convolution `conv_out`"
        raise ValueError(f"Diff-Pruning knows {known}; {type(model).__name__} is neither")
    if pairs is None:
        return _traced_groups(model, inputs)
    return [_paired(model, block, pair) for block, pair in _pairs(model, pairs)]


def _pairs(model: nn.Module, pairs: Sequence[Pair]) -> Iterator[tuple[str, Pair]]:
    """Every pair with the name of each block that has the pair's layers."""
    layers = dict(model.named_modules())
    return (
        (name, pair) for name in layers for pair in pairs if {f"{name}.{pair.writer}", f"{name}.{pair.reader}"} <= set(layers)
    )


def _paired(model: nn.Module, block: str, pair: Pair) -> Group:
    writer, reader = f"{block}.{pair.writer}", f"{block}.{pair.reader}"
    width = model.get_submodule(reader).in_features
    channels = model.get_submodule(f"{block}.{pair.heads}").num_heads if pair.heads else width
    channel = torch.arange(width) // (width // channels)
    rows = model.get_submodule(writer).out_features  # queries, keys and values: three times the width
    out = Member(writer, "out", torch.arange(rows), channel.repeat(rows // width))
    return Group(channels, (out, Member(reader, "in", torch.arange(width), channel)), width=width // channels)


def _traced_groups(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> list[Group]:
    import torch_pruning as tp

    model = copy.deepcopy(model)  # tracing sets the model to eval mode, and leaves hooks behind when it fails
    names = {module: name for name, module in model.named_modules()}
    try:
        with torch.enable_grad():  # tracing follows the autograd graph
            graph = tp.DependencyGraph().build_dependency(model, example_inputs=dict(inputs), verbose=False)
        traced = list(graph.get_all_groups(ignored_layers=[model.conv_out], root_module_types=[nn.Conv2d, nn.Linear]))
    except Exception as error:  # of any kind: tracing runs the model and walks its autograd graph
        raise ValueError(f"torch-pruning cannot trace {type(model).__name__}: {error}") from error
    parts, gates = _parts(model), _gates(model)
    return [_from_traced(group, names, parts, gates, graph) for group in traced]


def _parts(model: nn.Module) -> dict[str, int]:
    """Layers whose outputs come in equal parts: GroupNorms, and the queries, keys and values of several heads."""
    parts = {name: module.num_groups for name, module in model.named_modules() if isinstance(module, nn.GroupNorm)}
    for name, module in model.named_modules():
        if isinstance(module, DiffusersAttention):
            parts |= {f"{name}.{layer}": module.heads for layer in ("to_q", "to_k", "to_v")}
    return parts


def _gates(model: nn.Module) -> dict[str, int]:
    """Layers whose outputs are values and then as many gates, with the number of values: entry i goes with its gate."""
    gated = ((name, module.proj) for name, module in model.named_modules() if isinstance(module, (GEGLU, SwiGLU)))
    return {f"{name}.proj": layer.out_features // 2 for name, layer in gated}


_LAYERS = (nn.Conv2d, nn.Linear, nn.GroupNorm, nn.LayerNorm, nn.Embedding)


def _from_traced(traced, names: Mapping[nn.Module, str], parts: Mapping[str, int], gates: Mapping[str, int], graph) -> Group:
    members, most = [], 1
    for item in traced.items:
        module = item.dep.target.module
        if not isinstance(module, _LAYERS):
            continue
        reads = isinstance(module, (nn.Conv2d, nn.Linear)) and graph.is_in_channel_pruning_fn(item.dep.handler)
        axis, name = "in" if reads else "out", names[module]
        members.append(Member(name, axis, torch.tensor(item.idxs), torch.tensor(item.root_idxs)))
        most = max(most, 1 if reads else parts.get(name, 1))
    if values := next((gates[m.layer] for m in members if m.axis == "out" and m.layer in gates), 0):
        members = [replace(member, root=member.root % values) for member in members]
    return Group(max(int(m.root.max()) for m in members) + 1, tuple(members), most)


def keep(group: Group, scores: torch.Tensor, ratio: float, round_to: int = 1) -> torch.Tensor:
    """The channels (sorted) that stay when the channels of the lowest `scores` [channels] are removed.

    Of C channels C - int(C * (1 - ratio)) go, as many from each part, rounded down (Diff-Pruning's code); the number that stays
    is then rounded up until the axes are multiples of `round_to`.

    Raises:
        ValueError: nothing would stay, or a score is not finite.
    """
    if not torch.isfinite(scores).all():
        raise ValueError(f"the importance of {group.name} is not finite")
    if group.channels % group.parts:
        raise ValueError(f"{group.name} has {group.channels} channels in {group.parts} parts; they do not divide")
    size = group.channels // group.parts
    stay = size - (group.channels - int(group.channels * (1 - ratio) + 1e-9)) // group.parts
    while stay < size and stay * group.parts * group.width % round_to:
        stay += 1
    if stay < 1:
        raise ValueError(f"ratio {ratio} leaves {group.name} without channels; it has {group.channels} in {group.parts} part(s)")
    best = scores.view(group.parts, size).topk(stay, dim=1).indices
    return (best + size * torch.arange(group.parts)[:, None]).flatten().sort().values


def record(model: nn.Module, kept: Sequence[tuple[Group, torch.Tensor]]) -> Record:
    """The record of the entries that stay of every layer axis when each group keeps the given channels."""
    stays: dict[tuple[str, str], torch.Tensor] = {}
    for group, channels in kept:
        alive = torch.zeros(group.channels, dtype=torch.bool)
        alive[channels] = True
        for member in group.members:
            size = _size(model.get_submodule(member.layer), member.axis)
            mask = stays.setdefault((member.layer, member.axis), torch.ones(size, dtype=torch.bool))
            mask[member.index] &= alive[member.root]
    entries: Record = {}
    for (layer, axis), mask in stays.items():
        if not mask.all():
            entries.setdefault(layer, {})[axis] = _runs(mask.nonzero().flatten().tolist())
    return entries


def _runs(channels: list[int]) -> str:
    """[0, 1, 2, 5] as "0-2,5"."""
    starts = [c for i, c in enumerate(channels) if not i or channels[i - 1] != c - 1]
    ends = [c for i, c in enumerate(channels) if i == len(channels) - 1 or channels[i + 1] != c + 1]
    return ",".join(f"{a}-{b}" if b > a else f"{a}" for a, b in zip(starts, ends, strict=True))


def channels(runs: str, size: int) -> list[int]:
    """ "0-2,5" as [0, 1, 2, 5]. Raises ValueError for other text than runs of growing numbers below `size`."""
    numbers, last = [], -1
    for run, text in zip(_ranges(runs), runs.split(","), strict=True):
        if not last < run.start < run.stop <= size:
            raise ValueError(f"{text!r} does not grow or is not below {size}")
        numbers += run
        last = run.stop - 1
    return numbers


def _ranges(runs: str) -> list[range]:
    if not isinstance(runs, str) or not re.fullmatch(r"\d{1,9}(-\d{1,9})?(,\d{1,9}(-\d{1,9})?)*", runs, re.ASCII):
        raise ValueError(f"{str(runs)[:60]!r} is not runs of channels like '0-2,5'")
    ends = (run.partition("-") for run in runs.split(","))
    return [range(int(first), int(last or first) + 1) for first, _, last in ends]


def extent(record: Record) -> int:
    """How many channels a record keeps, over all axes, counted without listing the channels. Raises ValueError for no record."""
    if not isinstance(record, dict):
        raise ValueError(f"the pruning record is no object of layers and what stays of them, but {str(record)[:60]}")
    kept = 0
    for name, axes in record.items():
        try:
            kept += sum(len(run) for runs in dict(axes).values() for run in _ranges(runs))
        except (TypeError, ValueError) as error:
            raise ValueError(f"the pruning record does not fit {name}: {error}") from error
    return kept


def _size(layer: nn.Module, axis: str) -> int:
    if isinstance(layer, nn.Embedding):
        return layer.weight.shape[1]
    return layer.weight.shape[0 if axis == "out" else 1]


def apply(model: nn.Module, record: Record, inputs: Mapping[str, torch.Tensor] | None = None) -> nn.Module:
    """Cut `model` down to the channels in `record`, in place, and note the record in its config, if there is one; returns it.

    Args:
        inputs: keyword arguments of one call, for models whose config does not tell their shapes.

    Raises:
        ValueError: the record names a layer or a channel that the model does not have, or the cut layers do not fit each other;
            the model is untouched then.
    """
    extent(record)
    layers = dict(model.named_modules())
    kept = {name: _parsed(layers.get(name), name, axes) for name, axes in record.items()}
    pairs = [(block, pair) for block, pair in _pairs(model, denoisers.of(model).pairs or ()) if pair.heads]
    heads = {f"{block}.{pair.heads}": _heads(model, block, pair, kept) for block, pair in pairs}
    try:
        dryrun.positions(_shrunk(dryrun.meta_copy(model), kept, heads), inputs)
    except Exception as error:  # of any kind: the model's forward may raise anything for widths that it does not expect
        raise ValueError(f"{type(model).__name__} does not run with what is left of it: {error.__cause__ or error}") from error
    _shrunk(model, kept, heads)
    if hasattr(model, "register_to_config"):
        model.register_to_config(pruning=record)
    return model


def _shrunk(model: nn.Module, kept: Mapping[str, dict[str, list[int]]], heads: Mapping[str, int]) -> nn.Module:
    layers = dict(model.named_modules())
    for name, count in heads.items():
        layers[name].num_heads = count
    for name, axes in kept.items():
        _cut(layers[name], *(torch.tensor(axes[axis]) if axis in axes else None for axis in ("out", "in")))
    for module in model.modules():
        if isinstance(module, DiffusersAttention):  # for processors that scale by themselves
            module.inner_dim = module.to_q.out_features
            module.scale = (module.inner_dim // module.heads) ** -0.5
        if isinstance(module, (Upsample2D, Downsample2D)) and getattr(module, "conv", None) is not None:
            module.channels, module.out_channels = module.conv.in_channels, module.conv.out_channels
    return model


def _parsed(layer: nn.Module | None, name: str, axes: object) -> dict[str, list[int]]:
    """The channels that stay of a layer's axes."""
    if not isinstance(layer, _LAYERS) or layer.weight is None:
        raise ValueError(f"the pruning record names {name}, which is no layer of the model")
    known = ("out", "in") if isinstance(layer, (nn.Conv2d, nn.Linear)) else ("out",)
    if not isinstance(axes, dict) or not set(axes) <= set(known):
        raise ValueError(f"the pruning record does not fit {name}: it has {' and '.join(known)}, not {str(axes)[:60]}")
    try:
        return {axis: channels(runs, _size(layer, axis)) for axis, runs in axes.items()}
    except ValueError as error:
        raise ValueError(f"the pruning record does not fit {name}: {error}") from error


def _heads(model: nn.Module, block: str, pair: Pair, stays: Mapping[str, dict[str, list[int]]]) -> int:
    """How many heads of an attention stay; queries, keys, values and the projection must lose the same whole ones."""
    writer, reader, attention = (f"{block}.{part}" for part in (pair.writer, pair.reader, pair.heads))
    heads, width = model.get_submodule(attention).num_heads, model.get_submodule(reader).in_features
    if not {writer, reader} & set(stays):
        return heads
    size = width // heads
    columns = stays.get(reader, {}).get("in", [])
    kept = [entry // size for entry in columns[::size]]
    whole = [head * size + i for head in kept for i in range(size)]
    parts = model.get_submodule(writer).out_features // width
    rows = [part * width + entry for part in range(parts) for entry in whole]
    if not kept or columns != whole or stays.get(writer, {}).get("out") != rows:
        raise ValueError(f"the pruning record does not fit {attention}: its heads are not whole")
    return len(kept)


def _cut(layer: nn.Module, out: torch.Tensor | None, into: torch.Tensor | None) -> None:
    axes = {nn.Embedding: {1: out}}.get(type(layer), {0: out, 1: into})
    for axis, kept in axes.items():
        if kept is not None and layer.weight is not None:
            layer.weight = _selected(layer.weight, axis, kept)
    if out is not None and getattr(layer, "bias", None) is not None:
        layer.bias = _selected(layer.bias, 0, out)
    for names, kept in ((_WIDTHS_OUT, out), (_WIDTHS_IN, into)):
        for name in names:
            if kept is not None and hasattr(layer, name):
                setattr(layer, name, (len(kept),) if name == "normalized_shape" else len(kept))


_WIDTHS_OUT = ("out_channels", "out_features", "num_channels", "normalized_shape", "embedding_dim")
_WIDTHS_IN = ("in_channels", "in_features")


def _selected(weight: nn.Parameter, axis: int, kept: torch.Tensor) -> nn.Parameter:
    chosen = weight.detach().index_select(axis, kept.to(weight.device)).contiguous()
    return nn.Parameter(chosen, weight.requires_grad)
