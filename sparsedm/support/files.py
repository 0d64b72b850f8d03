"""Writing files so that a kill or a full disk leaves the previous version whole: write beside, then rename."""

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

_WRITE_ERRORS = (OSError, SafetensorError, RuntimeError)  # safetensors and torch.save have their own for a full disk


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` to write a file to; on success it takes `path`'s place in one step.

    Raises:
        OSError: writing failed (no space, no permission); the message says that the previous file is untouched.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        _flush(temporary)
        os.replace(temporary, path)
    except _WRITE_ERRORS as error:
        raise _failed(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_folder(path: str | Path) -> Iterator[Path]:
    """As `replacing`, for a whole folder: an existing folder stays until the new one is complete."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                _flush(file)
        if path.exists():
            os.replace(path, old)
        os.replace(temporary, path)
    except _WRITE_ERRORS as error:
        raise _failed(path, error) from error
    finally:
        if old.exists() and not path.exists():
            os.replace(old, path)
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def parse_json(text: str | bytes) -> object:
    """What JSON says. Raises ValueError if it is none, also for text that is nested too deep."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def _failed(path: Path, error: Exception) -> OSError:
    reason = getattr(error, "strerror", None) or error
    return OSError(getattr(error, "errno", None) or errno.EIO, f"could not write {path} ({reason}); what was there is untouched")


def _flush(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


@contextlib.contextmanager
def claimed(folder: str | Path) -> Iterator[None]:
    """Keep other processes out of a folder, which is made if need be; a claim ends with its process, however it ends.

    The same process may claim it again: in a notebook, a run that was interrupted may still be in memory. A run that is
    refused before it wrote anything leaves no folder behind.

    Raises:
        BlockingIOError: another process has it.
    """
    folder = Path(folder)
    claim, made_here = folder / ".claim", not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    with open(claim, "w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:  # systems differ
            raise BlockingIOError(
                errno.EAGAIN, f"{folder} is in use by another run; wait for it, or choose another folder"
            ) from error
        try:
            yield
        except BaseException:
            if made_here and list(folder.iterdir()) == [claim]:
                claim.unlink()
                folder.rmdir()
            raise


def sweep(folder: str | Path) -> None:
    """Remove what killed processes left half written in a folder; for those who have claimed it."""
    for left in Path(folder).glob(".*.tmp"):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink()
