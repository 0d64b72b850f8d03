"""Several processes that share a job, as `accelerate launch` and torchrun start them; a process alone has it all to itself.

They must see the same files, and pass through the functions below together.
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

_PATIENCE = timedelta(days=2)  # the others wait while the main process scores; one that died is the launcher's business


def state() -> PartialState:
    """Which of how many processes this is, and its device.

    PartialState by itself takes no notice of ACCELERATE_USE_CPU, nor of torchrun where there is no accelerator.
    """
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    return PartialState(cpu=cpu, timeout=_PATIENCE)


def accelerator(mixed_precision: str) -> Accelerator:
    """An Accelerator on these processes, with a precision of its own: accelerate by itself keeps that of the first one."""
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
    """`files.claimed`, by the main process for all."""
    return files.claimed(folder) if is_main() else contextlib.nullcontext()


def share(items: Sequence) -> Sequence:
    """Every so-many-th of the items: those that are this process's to do."""
    return items[state().process_index :: state().num_processes]


def collect(made: dict) -> dict:
    """What all processes made, sorted by key, in the main process; {} in the others."""
    if state().num_processes == 1:
        return made
    everywhere = [{}] * state().num_processes if is_main() else None
    torch.distributed.gather_object(made, everywhere)
    return dict(sorted(item for each in everywhere or () for item in each.items()))


def wait() -> None:
    """Until all processes are here."""
    state().wait_for_everyone()


def from_main(value: Any) -> Any:
    """The main process's value, in all."""
    return broadcast_object_list([value])[0]


def anywhere(here: bool) -> bool:
    """Whether it is so in any process."""
    if state().num_processes == 1:
        return here
    return bool(reduce(torch.tensor(float(here), device=state().device), "sum") > 0)
