"""Small things that everything else stands on."""

import pytest

from sparsedm.support import markdown


def test_a_table_keeps_its_columns_whatever_the_cells_hold():
    text = markdown.table(("method", "score"), [("|w g|", 1.5), ("", None)])
    assert text.splitlines() == ["| method | score |", "|---|---|", r"| \|w g\| | 1.5 |", "|  | None |"]
    with pytest.raises(ValueError, match="a row of 1 cells under a head of 2"):
        markdown.table(("a", "b"), [("x",)])
