"""safetensors files: equal tensors make equal bytes, each tensor has a checksum, and damage is named.

The checksums are JSON in the file's metadata, {tensor: CRC-32 of dtype, shape and bytes}.
"""

import contextlib
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from .files import parse_json

CHECKSUMS = "checksums"
REMEDY = "fetch or save it again"


def save(path: str | Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors, on the CPU and contiguous, with their checksums and further `metadata`.

    Raises:
        OSError, SafetensorError: the file cannot be written; half of it may be left.
    """
    metadata = {"format": "pt", **(metadata or {}), CHECKSUMS: checksums(tensors)}
    with open(path, "wb") as file:
        mode = os.fstat(file.fileno()).st_mode  # as the umask says; safetensors makes files that nobody else may read
    save_file(dict(tensors), path, metadata=metadata)
    os.chmod(path, mode & 0o777)
    _sort_header(path)


def _sort_header(path: str | Path) -> None:
    """Put the metadata in order: safetensors writes them in another order each time."""
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        file.seek(8)
        file.write(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size))


def read(path: str | Path, remedy: str = REMEDY, part: bool = False) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors of a file, checked if there are checksums, and its metadata.

    A `part` of a checkpoint may have the checksums of all parts.

    The tensors are mapped from the file: a caller that keeps tensors copies them, or a later change of the file changes them.

    Raises:
        ValueError: not a safetensors file, truncated, or damaged; the file is named, the tensor, and the `remedy`.
        FileNotFoundError: there is no such file.
    """
    with _opened(path, remedy) as file:
        metadata, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if CHECKSUMS in metadata:
        check(path, tensors, metadata[CHECKSUMS], remedy, part)
    return tensors, metadata


def read_metadata(path: str | Path) -> dict[str, str]:
    """The metadata of a file alone. Raises as `read`."""
    with _opened(path, REMEDY) as file:
        return file.metadata() or {}


@contextlib.contextmanager
def _opened(path: str | Path, remedy: str) -> Iterator[safe_open]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        with safe_open(path, "pt") as file:
            yield file
    except Exception as error:  # safetensors' own, and torch's for a dtype that it does not know
        raise ValueError(f"{path} is not a readable safetensors file ({error}); {remedy}") from error


def checksums(tensors: Mapping[str, torch.Tensor]) -> str:
    """The checksums of tensors on the CPU, for a file's metadata."""
    return json.dumps({name: _checksum(tensor) for name, tensor in tensors.items()})


def check(path: str | Path, tensors: Mapping[str, torch.Tensor], expected: str, remedy: str = REMEDY, part: bool = False) -> None:
    """Raise ValueError, with its name, for a tensor with another checksum, and unless all or, in a `part`, some are there."""
    try:
        known = parse_json(expected)
    except ValueError as error:
        raise ValueError(f"{path}: the checksums in its metadata cannot be read; {remedy}") from error
    if not isinstance(known, dict) or set(tensors) - set(known) or (not part and set(known) - set(tensors)):
        raise ValueError(f"{path}: the tensors are not those that its metadata lists; {remedy}")
    for name, tensor in tensors.items():
        if _checksum(tensor) != known[name]:
            raise ValueError(f"{path}: {name} is damaged (its checksum differs); {remedy}")


def _checksum(tensor: torch.Tensor) -> str:
    head = f"{tensor.dtype}{list(tensor.shape)}".encode()
    return f"{zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy(), zlib.crc32(head)):08x}"
