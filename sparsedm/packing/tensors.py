"""N:M weights without their zeros: packed tensors, and the packed checkpoint file made of them.

A weight [out, in, ...] becomes `values`, the kept weights of every output with the input axis fastest, and `positions`, where
in its group each of them stood, ceil(log2 M) bits apiece. At 2:4 in float16 that is 9/16 of the dense bytes. The file is
safetensors: no pickle, a checksum per tensor, checked when it is read.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from ..masking import nm
from ..masking.nm import NMPattern
from ..support import tensorfiles
from ..support.files import parse_json, replacing

FORMAT, VERSION = "sparsedm-packed", 1
VALUES, POSITIONS = ".values", ".positions"


def position_bits(pattern: NMPattern) -> int:
    """Bits of one position: ceil(log2 M)."""
    return max(1, (pattern.m - 1).bit_length())


def pack(weight: torch.Tensor, pattern: NMPattern | str) -> tuple[torch.Tensor, torch.Tensor]:
    """`weight` [out, in, ...] as values [out, rest * in * N / M] and positions (uint8, bits little-endian, in the same order).

    A group with fewer than N nonzeros is filled up with its first zeros. Negative zeros come back positive.

    Raises:
        ValueError: the weight is not `pattern` sparse; nothing is cut off to make it so.
    """
    pattern = NMPattern.parse(pattern)
    violations = nm.verify(weight, pattern)
    if violations:
        raise ValueError(
            f"the weight {list(weight.shape)} is not {pattern}: {violations} groups hold more nonzeros; fold it first"
        )
    groups = _rows(weight.detach()).reshape(len(weight), -1, pattern.m)  # [out, groups, M]
    kept = _rows(nm.mask(weight, pattern)).reshape(groups.shape)  # [out, groups, M]
    positions = kept.nonzero()[:, -1].reshape(len(weight), -1, pattern.n)  # [out, groups, N]
    values = groups.gather(-1, positions).flatten(1) + 0.0  # [out, groups * N]; -0.0 + 0.0 is +0.0
    bits = position_bits(pattern)
    planes = (positions.reshape(-1, 1).cpu().numpy() >> np.arange(bits)) & 1  # [out * groups * N, bits]
    return values, torch.from_numpy(np.packbits(planes.astype(np.uint8).ravel(), bitorder="little"))


def unpack(values: torch.Tensor, positions: torch.Tensor, pattern: NMPattern | str, shape: tuple[int, ...]) -> torch.Tensor:
    """The dense weight of `shape` [out, in, ...] that `pack` was given, bit for bit (but for negative zeros).

    Raises:
        ValueError: shapes that do not fit each other, or positions that are not increasing within their group.
    """
    pattern, shape = NMPattern.parse(pattern), tuple(shape)
    if len(shape) < 2 or shape[1] % pattern.m:
        raise ValueError(f"shape {list(shape)} does not divide into groups of {pattern.m} along axis 1")
    groups = math.prod(shape[1:]) // pattern.m
    bits, count = position_bits(pattern), shape[0] * groups * pattern.n
    fits = tuple(values.shape) == (shape[0], groups * pattern.n) and positions.numel() == -(-count * bits // 8)
    if not fits or positions.dtype != torch.uint8:
        raise ValueError(
            f"values {list(values.shape)} and {positions.numel()} bytes of positions do not make {list(shape)} at {pattern}"
        )
    planes = np.unpackbits(positions.cpu().numpy().ravel(), count=count * bits, bitorder="little")  # [out * groups * N * bits]
    index = (planes.reshape(-1, bits).astype(np.int64) << np.arange(bits)).sum(1)  # [out * groups * N]
    index = torch.from_numpy(index).view(shape[0], groups, pattern.n)  # [out, groups, N]
    if (index >= pattern.m).any() or (index.diff(dim=-1) <= 0).any():
        raise ValueError(f"positions are not increasing numbers below {pattern.m} in every group")
    dense = values.new_zeros(shape[0], groups, pattern.m)  # [out, groups, M]
    dense.scatter_(-1, index.to(values.device), values.view(index.shape))
    dense = dense.reshape(shape[0], *shape[2:], shape[1])  # [out, ..., in]
    return dense.movedim(-1, 1).contiguous()  # [out, in, ...]


def _rows(weight: torch.Tensor) -> torch.Tensor:
    """[out, in, ...] as [out, rest * in], the input axis fastest, so that groups lie side by side."""
    return weight.movedim(1, -1).flatten(1)


def write(path: str | Path, state: Mapping[str, torch.Tensor], patterns: Mapping[str, NMPattern]) -> None:
    """Write a packed checkpoint: the tensors of `state` named in `patterns` packed, the others as they are.

    Every packed tensor is unpacked and compared before anything is written.

    Raises:
        ValueError: a tensor is not sparse as its pattern says, by name.
        OSError: the file cannot be written; a previous file stays.
    """
    tensors, layers = {}, {}
    for name, tensor in state.items():
        tensor = tensor.detach().cpu().contiguous()
        if name not in patterns:
            tensors[name] = tensor
            continue
        try:
            values, positions = pack(tensor, patterns[name])
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        if not torch.equal(unpack(values, positions, patterns[name], tensor.shape), tensor):
            raise ValueError(f"{name} does not survive packing (NaN?)")
        tensors[_layer(name) + VALUES], tensors[_layer(name) + POSITIONS] = values, positions
        layers[name] = {"pattern": str(patterns[name]), "axis": 1, "shape": list(tensor.shape), "dtype": str(tensor.dtype)}
    metadata = {"format": FORMAT, "version": str(VERSION), "layers": json.dumps(layers)}
    with replacing(path) as temporary:
        tensorfiles.save(temporary, tensors, metadata)


def read(path: str | Path) -> dict[str, torch.Tensor]:
    """The plain state dict of a packed checkpoint, every tensor checked.

    Raises:
        ValueError: not such a file, truncated, of a newer version, or damaged; the tensor is named.
    """
    tensors, metadata = tensorfiles.read(path)
    _check_version(path, metadata)
    try:
        layers = parse_json(metadata["layers"])
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path} is not a readable packed checkpoint ({error!r}); fetch or save it again") from error
    if not isinstance(layers, dict) or tensorfiles.CHECKSUMS not in metadata:
        raise ValueError(f"{path}: its metadata lists no layers, or no checksums; fetch or save it again")
    return _unpack_all(path, tensors, layers)


def _unpack_all(path: str | Path, tensors: dict[str, torch.Tensor], layers: dict) -> dict[str, torch.Tensor]:
    state = {}
    for name, layer in layers.items():
        try:
            values, positions = tensors.pop(_layer(name) + VALUES), tensors.pop(_layer(name) + POSITIONS)
            if layer["axis"] != 1 or str(values.dtype) != layer["dtype"]:
                raise ValueError(f"axis {layer['axis']} and dtype {values.dtype} are not what the metadata says")
            state[name] = unpack(values, positions, layer["pattern"], layer["shape"])
        except Exception as error:  # of any kind: the metadata may say anything
            raise ValueError(f"{path}: {name} cannot be unpacked: {error!r}") from error
    return state | tensors


def _layer(name: str) -> str:
    """A weight's layer: the tensors are named as in the state dict of a packed model (packing/packed.py)."""
    return name.removesuffix(".weight")


def _check_version(path: str | Path, metadata: Mapping[str, str]) -> None:
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} is not a packed checkpoint (its format is {metadata.get('format')!r}, not {FORMAT!r})")
    version = metadata.get("version", "")
    if not version.isdecimal() or int(version) > VERSION:
        raise ValueError(f"{path} has format version {version!r}, this package reads up to {VERSION}; upgrade it")
