"""Types and ranges of a dataclass's fields, checked when an instance is made: by the annotations that the class has anyway."""

import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

SEEDS = 2**32 - 1  # the largest seed: what is drawn from (seed, step) stays within torch's 64 bits


@dataclass(frozen=True)
class Range:
    """The range of a number, in `Annotated`: from `low` to `high`, both included."""

    low: float
    high: float = math.inf


Count = Annotated[int, Range(1)]
NonNegative = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, 1)]
Seed = Annotated[int, Range(0, SEEDS)]


def check(settings: Any) -> None:
    """Raise ValueError, with the allowed values, for the first field of a dataclass whose value does not fit its annotation.

    Annotations may be bool, int, float (finite), str, Literal, tuple, and Annotated numbers with a `Range`.
    """
    for name, kind in get_type_hints(type(settings), include_extras=True).items():
        value = getattr(settings, name)
        if _fits(value, kind):
            continue
        if get_origin(kind) is Literal:
            raise ValueError(f"unknown {name} {value!r}; known: {', '.join(value or repr(value) for value in get_args(kind))}")
        raise ValueError(f"{name} must be {_words(kind)}, not {value!r}")


def _fits(value: Any, kind: Any) -> bool:
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _fits(value, args[0]) and args[1].low <= value <= args[1].high
    if origin is Literal:
        return value in args
    if origin is tuple:
        kinds = (args[0],) * len(value) if args[-1] is ... and isinstance(value, (tuple, list)) else args
        return isinstance(value, (tuple, list)) and len(value) == len(kinds) and all(map(_fits, value, kinds))
    if kind in (int, float):
        number = isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
        return number and -math.inf < value < math.inf
    return isinstance(value, kind)


def _words(kind: Any) -> str:
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        low, high = args[1].low, args[1].high
        return f"{_words(args[0])} " + (f"from {low} to {high}" if high < math.inf else f"of at least {low}")
    if origin is tuple:
        return f"a list of {_words(args[0])}" if args[-1] is ... else f"({', '.join(map(_words, args))})"
    return {bool: "true or false", int: "a whole number", float: "a finite number", str: "text"}[kind]
