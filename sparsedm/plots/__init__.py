"""All pictures and figures that notebooks, app and README show."""

from .base import INK, PAPER, PRUNED, PRUNED_INK, SPARSE_INK
from .charts import bars, curves, lines, live, matrix, ratios
from .comparison import Dots, dots, verdicts
from .masks import group_counts, groups
from .pictures import check_file, picture, rows, save, strips, word_card
from .pruning import channels, timesteps
from .quality import FAMILIES, speed, tradeoff, training
from .widgets import explorer, group_explorer

__all__ = [
    "Dots", "FAMILIES", "INK", "PAPER", "PRUNED", "PRUNED_INK", "SPARSE_INK",
    "bars", "channels", "check_file", "curves", "dots", "explorer", "group_counts", "group_explorer", "groups", "lines", "live",
    "matrix", "picture", "ratios", "rows", "save", "speed", "strips", "timesteps", "tradeoff", "training", "verdicts",
    "word_card",
]  # fmt: skip
