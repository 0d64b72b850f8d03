"""One order computes at a time, so that no measured step shares the machine; long orders let others in between their steps."""

import contextlib
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from typing import TypeVar

from .visitors import Visit

T = TypeVar("T")
_line: deque[object] = deque()  # the first one computes
_moved = threading.Condition()


@contextlib.contextmanager
def turn(visit: Visit | None = None) -> Iterator[None]:
    """Wait until all who asked before are done, then compute within the block.

    Raises:
        ConnectionAbortedError: the visitor has gone meanwhile.
    """
    visit, ticket = visit or Visit(), object()
    with _moved:
        _line.append(ticket)
    try:
        with _moved:
            while _line[0] is not ticket:
                _moved.wait(0.1)
                visit.check()
        yield
    finally:
        with _moved:
            _line.remove(ticket)
            _moved.notify_all()


def short(steps: Iterable[T | None]) -> Iterator[T]:
    """The outputs of the steps (None: nothing to show yet), all in one turn.

    Raises:
        ConnectionAbortedError: the visitor has gone.
    """
    visit = Visit()
    with turn(visit):
        for shown in steps:
            visit.check()
            if shown is not None:
                yield shown


def long(steps: Iterable[T | None]) -> Iterator[T]:
    """As `short`, with a turn for every step: waiting orders come before the next step."""
    visit, remaining = Visit(), iter(steps)
    while True:
        visit.check()
        with turn(visit):
            try:
                shown = next(remaining)
            except StopIteration:
                return
            if shown is not None:
                yield shown  # within the turn, for the page still has to be encoded
