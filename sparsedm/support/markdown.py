"""Tables in Markdown."""

from collections.abc import Iterable, Sequence


def table(head: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """A table with a line for the head and one for each row.

    Raises:
        ValueError: a row has more or fewer cells than the head.
    """
    lines = [line(head), "|---" * len(head) + "|"]
    for row in rows:
        if len(row) != len(head):
            raise ValueError(f"a row of {len(row)} cells under a head of {len(head)}: {row}")
        lines.append(line(row))
    return "\n".join(lines)


def line(cells: Sequence[object]) -> str:
    """One line of a table; bars inside a cell are escaped."""
    escaped = (str(cell).replace("|", "\\|") for cell in cells)
    return f"| {' | '.join(escaped)} |"
