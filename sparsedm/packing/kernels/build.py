"""Compile the C++ kernels with the system's compiler on first use, and keep the result in the user's cache folder."""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import threading
import warnings
from pathlib import Path

from ...support.files import replacing

SOURCE = Path(__file__).with_name("nm_kernels.cpp")
# torch has loaded its OpenMP runtime under the same name, so -fopenmp links to that one and torch.set_num_threads holds.
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-fno-math-errno", "-shared", "-fPIC")
DISABLE = "SPARSEDM_NO_KERNELS"
EXTRA_FLAGS = "SPARSEDM_KERNEL_FLAGS"  # more compiler flags, as for a sanitizer
_lock = threading.Lock()


def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None if there are none (then a warning has said why, once)."""
    with _lock:  # two threads must not compile at once
        return _library()


@functools.cache
def _library() -> ctypes.CDLL | None:
    if os.environ.get(DISABLE):
        return None
    found = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
    compiler = shlex.split(found or "")  # CXX may have arguments: "ccache g++"
    try:
        if not compiler:
            raise OSError("no C++ compiler found (g++ or clang++)")
        return _declared(ctypes.CDLL(str(_compiled(compiler))))
    except (OSError, subprocess.CalledProcessError) as error:
        detail = (error.stderr or "").strip().splitlines()[:1] if isinstance(error, subprocess.CalledProcessError) else [error]
        warnings.warn(f"sparse CPU kernels are off, sparse layers run dense: {detail[0] if detail else error}", stacklevel=3)
        return None


def _declared(kernels: ctypes.CDLL) -> ctypes.CDLL:
    kernels.sparsedm_nm4_linear.argtypes = [ctypes.c_void_p] * 5 + [ctypes.c_int64] * 5
    kernels.sparsedm_nm4_conv2d.argtypes = [ctypes.c_void_p] * 5 + [ctypes.c_int64] * 11
    return kernels


def cache_folder() -> Path:
    """Where compiled kernels are kept: $XDG_CACHE_HOME/sparsedm, or ~/.cache/sparsedm."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparsedm"


def _compiled(compiler: list[str]) -> Path:
    """The shared library for this source, compiler and CPU."""
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=True).stdout
    flags = [*FLAGS, *shlex.split(os.environ.get(EXTRA_FLAGS, ""))]
    key = "\0".join([SOURCE.read_text(), version, *flags, _cpu()])
    path = cache_folder() / f"nm-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if not path.exists():
        with replacing(path) as temporary:
            command = [*compiler, *flags, str(SOURCE), "-o", str(temporary)]
            subprocess.run(command, capture_output=True, text=True, check=True)
    return path


def _cpu() -> str:
    """What -march=native may depend on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    chosen = [line for line in lines if line.startswith(("model name", "flags", "Features"))][:2]
    return "\n".join([platform.machine(), platform.processor(), *chosen])
