"""Several processes that share a job, as `accelerate launch` and torchrun start them; a single process has the job to itself.

The processes must see the same files, and call the functions below together.
"""

import contextlib
import warnings
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list, parse_flag_from_env, reduce

from . import files

_PATIENCE = timedelta(days=2)  # the others wait while the main process scores; the launcher notices a process that died


def state() -> PartialState:
    """The number of this process, how many processes there are, and the device of this one.

    PartialState by itself takes no notice of ACCELERATE_USE_CPU, nor of torchrun where there is no accelerator.
    """
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    return PartialState(cpu=cpu, timeout=_PATIENCE)


def accelerator(mixed_precision: str) -> Accelerator:
    """An Accelerator on these processes, with a precision of its own: accelerate would keep that of the first Accelerator."""
    state()
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != mixed_precision:
        AcceleratorState._reset_state()
    made = Accelerator(mixed_precision=mixed_precision)
    if mixed_precision == "fp16" and made.device.type == "cpu":
        warnings.warn("fp16 needs an accelerator: on the CPU this trains in float32 (bf16 works there)", stacklevel=2)
    return made


def is_main() -> bool:
    """Whether this is the process that writes and prints for all."""
    return state().is_main_process


def claimed(folder: str | Path) -> contextlib.AbstractContextManager[None]:
    """`files.claimed`, by the main process for all processes."""
    return files.claimed(folder) if is_main() else contextlib.nullcontext()


def share(items: Sequence) -> Sequence:
    """The items that this process works on: of n processes, every n-th item."""
    return items[state().process_index :: state().num_processes]


def collect(made: dict) -> dict:
    """The dicts that all processes made, as one sorted by key, in the main process; {} in the other processes."""
    if state().num_processes == 1:
        return made
    gathered = [{}] * state().num_processes if is_main() else None
    torch.distributed.gather_object(made, gathered)
    return dict(sorted(item for part in gathered or () for item in part.items()))


def wait() -> None:
    """Wait until all processes have called this function."""
    state().wait_for_everyone()


def from_main(value: Any) -> Any:
    """The main process's value, in all processes."""
    return broadcast_object_list([value])[0]


def anywhere(here: bool) -> bool:
    """Whether `here` is true in any process."""
    if state().num_processes == 1:
        return here
    return bool(reduce(torch.tensor(float(here), device=state().device), "sum") > 0)


def device(name: str) -> torch.device:
    """The device of this name. Raises ValueError for a device that is not there."""
    try:
        found = torch.device(name)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} is not there: {str(error).splitlines()[0]}") from error
    return found
