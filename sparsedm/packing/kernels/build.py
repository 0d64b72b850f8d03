"""Compile the C++ kernels with the system's compiler on first use, and keep the result in the user's cache folder.

A library is loaded only if it is whole, and if nobody but its user could have written it.

`python -m sparsedm.packing.kernels.build FOLDER` compiles libraries for machines without a compiler, whose environment names the
folder in SPARSEDM_KERNELS.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import warnings
from pathlib import Path

from ...support.files import replacing

SOURCES = tuple(Path(__file__).with_name(name) for name in ("nm_kernels.cpp", "nm_slices.cpp"))
_HEADER = Path(__file__).with_name("common.h")
# torch has loaded its OpenMP runtime under the same name, so -fopenmp links to that one and torch.set_num_threads holds.
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-fno-math-errno", "-shared", "-fPIC")
DISABLE = "SPARSEDM_NO_KERNELS"
PREBUILT = "SPARSEDM_KERNELS"  # the folder of `prebuild`
LEVELS = {  # of x86-64, best first, and what tells them apart in /proc/cpuinfo
    "x86-64-v4": {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx2", "fma", "bmi2"},
    "x86-64-v3": {"avx2", "fma", "bmi2", "f16c", "movbe"},
}
EXTRA_FLAGS = "SPARSEDM_KERNEL_FLAGS"  # more compiler flags, as for a sanitizer
_OTHERS = stat.S_IWGRP | stat.S_IWOTH
_CHECKSUM = hashlib.sha256().digest_size
_lock = threading.Lock()
_loaded: tuple[ctypes.CDLL | None, str] | None = None  # what `_load` gave: packed layers ask at every call, without the lock


def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None if there are none (then a warning has said why, once)."""
    return (_loaded or _load_once())[0]


def why_off() -> str:
    """Why there are no compiled kernels, or ""."""
    return (_loaded or _load_once())[1]


def _load_once() -> tuple[ctypes.CDLL | None, str]:
    global _loaded
    with _lock:  # two threads must not compile at once
        _loaded = _loaded or _load()
    return _loaded


def _load() -> tuple[ctypes.CDLL | None, str]:
    if os.environ.get(DISABLE):
        return None, f"{DISABLE} is set"
    try:
        return _declared(ctypes.CDLL(str(_prebuilt() or _compiled(_compiler())))), ""
    except (OSError, subprocess.CalledProcessError) as error:
        detail = (error.stderr or "").strip().splitlines()[:1] if isinstance(error, subprocess.CalledProcessError) else [error]
        reason = str(detail[0] if detail else error)
        warnings.warn(f"sparse CPU kernels are off, sparse layers run dense: {reason}", stacklevel=4)
        return None, reason


def _compiler() -> list[str]:
    command = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
    if not command:
        raise OSError("no C++ compiler found (g++ or clang++)")
    return shlex.split(command)  # CXX may have arguments: "ccache g++"


def prebuild(folder: Path) -> None:
    """Compile a library for each of `LEVELS` into a folder, for machines whose environment names it in SPARSEDM_KERNELS."""
    folder.mkdir(0o755, parents=True, exist_ok=True)
    flags = [flag for flag in FLAGS if not flag.startswith("-march")]
    for level in LEVELS:
        _build([*_compiler(), *flags, f"-march={level}"], folder / f"nm-{level}.so")


def _prebuilt() -> Path | None:
    """The best library of `prebuild` for this CPU, or None."""
    folder = os.environ.get(PREBUILT)
    libraries = (Path(folder, f"nm-{level}.so") for level, needed in LEVELS.items() if folder and needed <= _features())
    return next(filter(_whole, libraries), None)


def _features() -> set[str]:
    """What the CPU can, as Linux names it."""
    return set(next((line for line in _cpu().splitlines() if line.startswith("flags")), "").split())


def _declared(kernels: ctypes.CDLL) -> ctypes.CDLL:
    kernels.sparsedm_nm4_linear.argtypes = [ctypes.c_void_p] * 5 + [ctypes.c_int64] * 6
    kernels.sparsedm_nm4_conv2d.argtypes = [ctypes.c_void_p] * 5 + [ctypes.c_int64] * 12
    kernels.sparsedm_slice.argtypes, kernels.sparsedm_slice.restype = [ctypes.c_int64] * 4, ctypes.c_int64
    kernels.sparsedm_sliced_linear.argtypes = [ctypes.c_void_p] * 5 + [ctypes.c_int64] * 4
    kernels.sparsedm_sliced_conv2d.argtypes = [ctypes.c_void_p] * 5 + [ctypes.c_int64] * 8
    return kernels


def cache_folder() -> Path:
    """Where compiled kernels are kept: $XDG_CACHE_HOME/sparsedm, or ~/.cache/sparsedm. Raises OSError without a home folder."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparsedm"
    except RuntimeError as error:
        raise OSError("there is no home folder to keep them in; set HOME or XDG_CACHE_HOME") from error


def _compiled(compiler: list[str]) -> Path:
    """The shared library for this source, compiler and CPU; compiled if there is none that can be trusted."""
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=True).stdout
    flags = [*FLAGS, *shlex.split(os.environ.get(EXTRA_FLAGS, ""))]
    key = "\0".join([*(source.read_text() for source in (*SOURCES, _HEADER)), version, *flags, _cpu()])
    path = cache_folder() / f"nm-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if not (_closed(path.parent) and _whole(path)):
        _build([*compiler, *flags], path)
    return path


def _build(command: list[str], path: Path) -> None:
    """Compile a library, and write it with its checksum."""
    with replacing(path) as temporary:
        _compile(command, temporary)
        library = temporary.read_bytes()
        temporary.write_bytes(library + _checksum(library))  # loaders do not mind what follows a library
        temporary.chmod(0o755)


def _compile(command: list[str], library: Path) -> None:
    """Compile the sources side by side and link them. Raises CalledProcessError with the first failed compiler's words."""
    with tempfile.TemporaryDirectory() as folder:
        objects = [str(Path(folder, f"{source.stem}.o")) for source in SOURCES]
        commands = [[*command, "-c", str(source), "-o", made] for source, made in zip(SOURCES, objects)]
        running = [subprocess.Popen(each, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for each in commands]
        said = [process.communicate()[1] for process in running]
        for process, words in zip(running, said):
            if process.returncode:
                raise subprocess.CalledProcessError(process.returncode, process.args, stderr=words)
        subprocess.run([*command, *objects, "-o", str(library)], capture_output=True, text=True, check=True)


def _closed(folder: Path) -> bool:
    """Whether only its user could write to the cache folder, so that the libraries in it are his own; from now on it is so.

    Raises:
        OSError: it belongs to somebody else, or cannot be closed.
    """
    folder.mkdir(0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.getuid():
        raise OSError(f"{folder} belongs to another user; remove it, or set XDG_CACHE_HOME to another folder")
    if status.st_mode & _OTHERS:
        folder.chmod(stat.S_IMODE(status.st_mode) & ~_OTHERS)
    return not status.st_mode & _OTHERS


def _whole(library: Path) -> bool:
    """Whether a library is there, only its user could write to it, and it ends with the checksum of the rest."""
    try:
        status, content = library.stat(), library.read_bytes()
    except OSError:
        return False
    own = status.st_uid == os.getuid() and not status.st_mode & _OTHERS
    return own and content[-_CHECKSUM:] == _checksum(content[:-_CHECKSUM])


def _checksum(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


def _cpu() -> str:
    """What -march=native may depend on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    chosen = [line for line in lines if line.startswith(("model name", "flags", "Features"))][:2]
    return "\n".join([platform.machine(), platform.processor(), *chosen])


if __name__ == "__main__":
    prebuild(Path(sys.argv[1]))
