"""N:M weights without their zeros: packed tensors, and the packed checkpoint file made of them.

A weight [out, in, ...] becomes `values`, the kept weights of every output with the input axis fastest, and `positions`, where
in its group each of them stood, ceil(log2 M) bits apiece. At 2:4 in float16 that is 9/16 of the dense bytes. The file is
safetensors: no pickle, a checksum per tensor, checked when it is read. The layers stand in the metadata as ComfyUI has them.
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

FORMAT, VERSION = "sparsedm-packed", 2
LAYERS, LAYERS_1 = "_quantization_metadata", "layers"  # in the metadata of a file, and of a file of version 1
LAYER_FORMAT = "sparsedm-nm"
QUANTIZER = "sparsedm"  # as diffusers calls the reader of packed folders (checkpoints/quantizer.py)
QUANTIZATION = {"quant_method": QUANTIZER}  # in the config.json of a packed folder
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
    expected, size = packed_sizes(shape, pattern)
    groups, bits, count = expected[1] // pattern.n, position_bits(pattern), math.prod(expected)
    if tuple(values.shape) != expected or positions.numel() != size or positions.dtype != torch.uint8:
        raise ValueError(
            f"values {list(values.shape)} and {positions.numel()} bytes of positions do not make {list(shape)} at {pattern}"
        )
    index = _numbers(positions.cpu().ravel(), bits)[:count].view(shape[0], groups, pattern.n)  # [out, groups, N]
    if (index >= pattern.m).any() or (index[..., 1:] <= index[..., :-1]).any():
        raise ValueError(f"positions are not increasing numbers below {pattern.m} in every group")
    dense = values.new_zeros(shape[0], groups, pattern.m)  # [out, groups, M]
    dense.scatter_(-1, index.to(values.device, torch.int64), values.view(index.shape))
    dense = dense.reshape(shape[0], *shape[2:], shape[1])  # [out, ..., in]
    dense = dense.movedim(-1, 1)  # [out, in, ...]
    return dense.clone(memory_format=torch.contiguous_format)  # the strides of a fresh tensor: kernels are chosen by them


def _numbers(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """The numbers of `bits` bits, little-endian, in the bytes `packed` [n]; perhaps a few more that fill the last byte."""
    if 8 % bits == 0:  # several times as fast
        return (packed.view(-1, 1) >> torch.arange(0, 8, bits, dtype=torch.uint8)).bitwise_and_(2**bits - 1).flatten()
    planes = np.unpackbits(packed.numpy(), bitorder="little")  # [n * 8]
    planes = planes[: len(planes) // bits * bits].reshape(-1, bits)  # [numbers, bits]
    return torch.from_numpy((planes.astype(np.int64) << np.arange(bits)).sum(1))


def packed_sizes(shape: tuple[int, ...], pattern: NMPattern) -> tuple[tuple[int, int], int]:
    """The shape of the values and the number of bytes of positions of a weight of `shape` [out, in, ...].

    Raises:
        ValueError: the input axis does not divide into groups.
    """
    if len(shape) < 2 or shape[1] % pattern.m:
        raise ValueError(f"shape {list(shape)} does not divide into groups of {pattern.m} along axis 1")
    values = shape[0], math.prod(shape[1:]) // pattern.m * pattern.n
    return values, -(-math.prod(values) * position_bits(pattern) // 8)


def _rows(weight: torch.Tensor) -> torch.Tensor:
    """[out, in, ...] as [out, rest * in], the input axis fastest, so that groups lie side by side."""
    return weight.movedim(1, -1).flatten(1)


def worth_packing(state: Mapping[str, torch.Tensor]) -> dict[str, NMPattern]:
    """The patterns of the N:M sparse weights in a state dict that packing makes smaller (31:32 is not among them)."""
    weights = {name: x for name, x in state.items() if name.endswith(".weight") and x.is_floating_point()}
    patterns = {name: pattern for name, weight in weights.items() if (pattern := nm.detect(weight))}
    bits = {name: 8 * weights[name].element_size() for name in patterns}
    return {k: p for k, p in patterns.items() if p.density * (bits[k] + position_bits(p)) < bits[k]}


def packed_state(
    state: Mapping[str, torch.Tensor], patterns: Mapping[str, NMPattern]
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors of a packed file, on the CPU, and its metadata: the weights named in `patterns` packed, all else as in `state`.

    Every packed tensor is unpacked and compared.

    Raises:
        ValueError: a tensor is not sparse as its pattern says, by name.
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
        layer = name.removesuffix(".weight")  # as in the state dict of a packed model (packed.py)
        tensors[layer + VALUES], tensors[layer + POSITIONS] = values, positions
        layers[layer] = {"format": LAYER_FORMAT, "pattern": str(patterns[name]), "shape": list(tensor.shape)}
    listed = json.dumps({"format_version": "1.0", "layers": layers}, separators=(",", ":"))
    return tensors, {"format": FORMAT, "version": str(VERSION), LAYERS: listed}


def write(path: str | Path, state: Mapping[str, torch.Tensor], patterns: Mapping[str, NMPattern]) -> None:
    """Write a packed checkpoint, `packed_state`.

    Raises:
        ValueError: as `packed_state`.
        OSError: the file cannot be written; a previous file stays.
    """
    tensors, metadata = packed_state(state, patterns)
    with replacing(path) as temporary:
        tensorfiles.save(temporary, tensors, metadata)


def read(path: str | Path) -> dict[str, torch.Tensor]:
    """The plain state dict of a packed checkpoint, every tensor checked.

    Raises:
        ValueError: not such a file, truncated, of a newer version, or damaged; the tensor is named.
    """
    tensors, metadata = tensorfiles.read(path)
    if not is_packed(metadata):
        raise ValueError(f"{path} is not a packed checkpoint (its format is {metadata.get('format')!r}, not {FORMAT!r})")
    return unpacked_state(path, tensors, metadata)


def is_packed(metadata: Mapping[str, str]) -> bool:
    """Whether a file with this metadata is a packed checkpoint, or a part of one."""
    return metadata.get("format") == FORMAT


def unpacked_state(path: str | Path, tensors: dict[str, torch.Tensor], metadata: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """The plain state dict of the tensors and the metadata of the packed checkpoint at `path`. Raises ValueError as `read`."""
    layers, state, rest = packed_layers(path, metadata), {}, dict(tensors)
    for name, layer in layers.items():
        try:
            values, positions = rest.pop(name + VALUES), rest.pop(name + POSITIONS)
            state[f"{name}.weight"] = unpack(values, positions, layer["pattern"], layer["shape"])
        except Exception as error:  # of any kind: the metadata may say anything
            raise ValueError(f"{path}: {name}.weight cannot be unpacked: {error!r}") from error
    return state | rest


def packed_layers(path: str | Path, metadata: Mapping[str, str]) -> dict[str, dict]:
    """`pattern` and `shape` of the packed weights, by layer, as the metadata of a packed checkpoint says.

    Raises:
        ValueError: a newer version, or metadata that cannot be read.
    """
    version = metadata.get("version", "")
    if not version.isdecimal() or int(version) > VERSION:
        raise ValueError(f"{path} has format version {version!r}, this package reads up to {VERSION}; upgrade it")
    try:
        listed = parse_json(metadata[LAYERS])["layers"] if int(version) > 1 else parse_json(metadata[LAYERS_1])
        layers = {name.removesuffix(".weight"): layer for name, layer in listed.items()}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is not a readable packed checkpoint ({error!r}); fetch or save it again") from error
    if tensorfiles.CHECKSUMS not in metadata:
        raise ValueError(f"{path}: its metadata has no checksums; fetch or save it again")
    return layers
