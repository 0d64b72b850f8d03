"""What all model cards say in the same words: weights, MACs and scores."""

from collections.abc import Mapping

from ..support import markdown


def weights(parameters: int, nonzero: int) -> str:
    """How many parameters a model has, in words."""
    return f"{parameters:,} parameters, {nonzero:,} of them not zero"


def macs(dense: int, sparse: int) -> str:
    """What a call of the model costs, in words."""
    return f"MACs per picture and step: {dense:,} dense, {sparse:,} with zeros skipped."


def scores(values: Mapping[str, object]) -> str:
    """Scores by name as a Markdown table, numbers with four digits."""
    return markdown.table(("score", "value"), [(name, _cell(value)) for name, value in values.items()])


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
