"""Checks of the values that a browser or a script sends: the page's own limits do not bind a script."""


def one_of(what: str, value, known) -> None:
    """Raises ValueError, with the known values, for a value that is not known."""
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"the {what} {str(value)[:40]!r} is unknown: choose one of {', '.join(known)}")


def within(what: str, value, low: float, high: float, whole: bool = False) -> None:
    """Raises ValueError for a value that is no number from `low` to `high`, or no whole number if `whole`."""
    number = isinstance(value, (int, float)) and low <= value <= high
    if not number or (whole and value != int(value)):
        kind = "a whole number" if whole else "a number"
        raise ValueError(f"the {what} is {str(value)[:40]!r}: give {kind} from {low:g} to {high:,}")
