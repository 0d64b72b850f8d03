"""Writing files so that a kill or a full disk leaves the previous version whole: write beside, then rename."""

import contextlib
import errno
import fcntl
import glob
import json
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError

_WRITE_ERRORS = (OSError, SafetensorError, RuntimeError)  # safetensors and torch.save have their own for a full disk
_OLD = ".old"  # ends the name of a folder that is being replaced
_FULL = 1 << 20  # free bytes below which a disk is called full


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
        with writing(path):
            yield temporary
            _flush(temporary)
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(path: str | Path) -> None:
    """Raise OSError unless a file could be written at `path`: to be called before the work whose outcome the file will hold."""
    path = Path(path).absolute()
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; name a file")
    nearest = next(folder for folder in path.parents if folder.exists())  # `replacing` makes the folders below
    if not nearest.is_dir():
        raise NotADirectoryError(f"{nearest} is no folder; name another place for {path.name}")
    if not os.access(path if path.exists() else nearest, os.W_OK):
        raise PermissionError(f"{path} may not be written; choose another place")


@contextlib.contextmanager
def replacing_folder(path: str | Path) -> Iterator[Path]:
    """As `replacing`, for a whole folder: an existing folder stays until the new one is complete.

    A process that is killed between the two renames at the end leaves neither folder at `path`; `restore` repairs this.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    restore(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    old = temporary.with_suffix(_OLD)
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        with writing(path):
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    _flush(file)
            if path.exists():
                os.replace(path, old)
            try:
                os.replace(temporary, path)
            except FileNotFoundError:
                if not path.exists():  # else another process has called `restore`
                    raise
    finally:
        if old.exists() and not path.exists():
            os.replace(old, path)
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def restore(path: str | Path) -> None:
    """Put back the folder `path` if a process was killed while it replaced it: the new folder, which is complete by then.

    Readers of `path` call this function first; nothing happens if the folder is there.
    """
    path = Path(path)
    for old in () if path.exists() else path.parent.glob(f".{glob.escape(path.name)}.*{_OLD}"):
        new = old.with_suffix(".tmp")
        with contextlib.suppress(OSError):  # another process was faster
            os.replace(new if new.is_dir() else old, path)
            shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def writing(path: str | Path, kept: str = "what was there is untouched") -> Iterator[None]:
    """Within this context an error of writing becomes an OSError that names `path`, the reason and what is `kept`."""
    try:
        yield
    except _WRITE_ERRORS as error:
        path, reason = Path(path), getattr(error, "strerror", None) or str(error)
        code = getattr(error, "errno", None) or errno.EIO
        if not isinstance(error, OSError) and _is_full(path.parent):
            code, reason = errno.ENOSPC, os.strerror(errno.ENOSPC)
        raise OSError(code, f"could not write {path} ({reason}); {kept}") from error


def _is_full(folder: Path) -> bool:
    with contextlib.suppress(OSError):
        return shutil.disk_usage(folder).free < _FULL
    return False


def write_json(path: str | Path, content: Any) -> None:
    """Write JSON for people to read, whole or not at all. Raises OSError as `replacing`."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")


def read_json(path: str | Path, remedy: str) -> dict:
    """The object in a JSON file. Raises ValueError, which names the file and the remedy, if the file holds no object."""
    try:
        content = parse_json(Path(path).read_bytes())
        if not isinstance(content, dict):
            raise ValueError("it holds no JSON object")
    except ValueError as error:
        raise ValueError(f"{path} is damaged: no valid JSON ({error}); {remedy}") from error
    return content


def parse_json(text: str | bytes) -> object:
    """The content of a JSON text. Raises ValueError for other text, and for JSON that is nested too deep."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def _flush(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


@contextlib.contextmanager
def claimed(folder: str | Path) -> Iterator[None]:
    """Keep other processes out of a folder, which is made if need be; a claim ends with its process, however that ends.

    The same process may claim the folder again: in a notebook, a run that was interrupted may still be in memory. A run that
    is refused before it wrote anything leaves no folder behind.

    Raises:
        BlockingIOError: another process has claimed the folder.
        OSError: the folder's `.claim` is no plain file.
    """
    folder = Path(folder)
    claim, made_here = folder / ".claim", not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    with _opened(claim) as file:
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


def _opened(claim: Path) -> IO:
    """The file to lock, made if need be; a link to another file is not followed, and nothing is truncated."""
    try:
        descriptor = os.open(claim, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise OSError(errno.ELOOP, f"{claim} is a symbolic link, which is not followed; remove it") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, f"{claim} is no plain file; remove it")
    return os.fdopen(descriptor, "r+")


def sweep(folder: str | Path) -> None:
    """Remove what killed processes left half written in a folder, which the caller has claimed."""
    for old in Path(folder).glob(f".*{_OLD}"):
        restore(old.with_name(old.name[1:].rsplit(".", 2)[0]))
        shutil.rmtree(old, ignore_errors=True)
    for temporary in Path(folder).glob(".*.tmp"):
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink()
