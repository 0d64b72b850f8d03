"""Whether an order can be carried out; what a browser or a script sends is checked here, whatever the page allows."""


def one_of(what: str, value, known) -> None:
    """Raises ValueError for a value that is not known, with those that are."""
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"the {what} {str(value)[:40]!r} is unknown: choose one of {', '.join(known)}")


def within(what: str, value, low: float, high: float, whole: bool = False) -> None:
    """Raises ValueError for a value that is no number, not a whole one if it should be, or out of range."""
    number = isinstance(value, (int, float)) and low <= value <= high
    if not number or (whole and value != int(value)):
        kind = "a whole number" if whole else "a number"
        raise ValueError(f"the {what} is {str(value)[:40]!r}: give {kind} from {low:g} to {high:,}")
