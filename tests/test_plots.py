"""The notebooks' figures show what they are given."""

import base64
import io
import sys

import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from sparsedm import plots
from sparsedm.masking import nm
from sparsedm.pruning import diffpruning


def crosses(axes) -> set[tuple[int, int]]:
    """(row, column) of the entries that are marked as pruned."""
    return {(int(line.get_ydata()[0]), int(line.get_xdata()[0])) for line in axes.lines if line.get_marker() == "x"}


def colours(bars) -> list[str]:
    return [to_hex(bar.get_facecolor()) for bar in bars]


@pytest.mark.parametrize("pattern", ["2:4", "1:8", "4:4"])
def test_groups_of_a_linear_weight_mark_the_pruned_entries(pattern):
    weight = torch.randn(20, 32)
    axes = plots.groups(weight, pattern, rows=3, columns=16).axes[0]
    pruned = (~nm.mask(weight, pattern))[:3, :16].nonzero().tolist()
    assert crosses(axes) == set(map(tuple, pruned))
    assert axes.images[0].get_array().tolist() == weight[:3, :16].tolist()
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("input feature", "output feature")


def test_groups_of_a_convolution_run_along_the_channels_of_each_kernel_position():
    weight = torch.randn(5, 8, 2, 3)
    axes = plots.groups(weight, "2:4").axes[0]
    mask = nm.mask(weight, "2:4")[0]
    assert crosses(axes) == {(y * 3 + x, c) for c in range(8) for y in range(2) for x in range(3) if not mask[c, y, x]}
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0, 0", "0, 1", "0, 2", "1, 0", "1, 1", "1, 2"]


def test_frames_mark_the_entries_whose_mask_has_changed():
    before = torch.tensor([[4.0, 3, 2, 1, 1, 2, 3, 4]])
    after = torch.tensor([[4.0, 1, 2, 1, 1, 2, 3, 4]])
    axes = plots.groups(after, "2:4", before=before).axes[0]
    assert sorted(round(frame.get_x() + frame.get_width() / 2) for frame in axes.patches) == [1, 2]
    assert not plots.groups(after, "2:4", before=after).axes[0].patches and "frames" in axes.get_title()


def test_groups_wider_than_asked_are_shown_whole():
    axes = plots.groups(torch.randn(8, 64), "16:32", columns=8).axes[0]
    assert axes.images[0].get_array().shape == (8, 32)


def test_sliders_redraw_and_never_ask_for_more_than_there_is():
    explorer = plots.group_explorer(torch.randn(8, 16), "3:4")
    m, n, picture, refused = explorer.children
    assert m.options == (2, 4, 8, 16)
    before = picture.value
    m.value = 2
    assert (n.value, n.max) == (2, 2) and picture.value != before
    m.value, n.value = 16, 5
    assert (n.value, n.max) == (5, 16)


def test_another_group_size_keeps_the_ratio():
    m, n, *_ = plots.group_explorer(torch.randn(8, 16), "2:4").children
    for size, kept in ((8, 4), (16, 8), (2, 1), (4, 2)):
        m.value = size
        assert (n.value, n.max) == (kept, size)


def test_the_sliders_bring_a_still_picture_for_pages_that_do_not_run_them():
    explorer = plots.group_explorer(torch.randn(8, 16))
    bundle = explorer._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert Image.open(io.BytesIO(base64.b64decode(bundle["image/png"]))).width > 100


def test_without_ipywidgets_there_is_a_figure(monkeypatch):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    assert isinstance(plots.group_explorer(torch.randn(8, 16)), Figure)


def test_controls_ask_for_the_figure_again_and_tell_what_it_refuses():
    asked = []

    def draw(word="AB", width=2):
        asked.append((word, width))
        if not word:
            raise ValueError("say something")
        return Image.new("L", (10 * width, 10))

    explorer = plots.explorer(draw, word="", width=(1, 4))
    word, width, picture, refused = explorer.children
    assert (word.value, width.value, width.max, word.description) == ("AB", 2, 4, "word")
    width.value = 3
    assert asked == [("AB", 2), ("AB", 3)] and Image.open(io.BytesIO(picture.value)).width == 30
    word.value = ""
    assert refused.value == "say something" and Image.open(io.BytesIO(picture.value)).width == 30
    word.value = "C"
    assert refused.value == "" and asked[-1] == ("C", 3)


def test_thresholds_cut_off_where_the_importance_stops(make_model):
    model = make_model("unet")
    images, labels = torch.zeros(1, 1, 8, 8), torch.zeros(1, dtype=torch.long)
    model.register_to_config(noise_schedule={"num_train_timesteps": 20, "prediction_type": "v_prediction", "beta_end": 0.9})
    losses = [state.loss for state in diffpruning.importance(model, images, labels, threshold=0)]
    stopped = [state.timestep for state in diffpruning.importance(model, images, labels, threshold=0.5)][-1]
    assert 0 < stopped < 19
    legend = plots.timesteps(losses, (0.5,)).axes[0].get_legend()
    assert legend.get_texts()[0].get_text() == f"T = 0.5: t < {stopped}"


def test_a_threshold_that_is_never_reached_keeps_all_timesteps():
    legend = plots.timesteps([3.0, 2.0, 1.0], (0.1,)).axes[0].get_legend()
    assert legend.get_texts()[0].get_text() == "T = 0.1: t < 3"


def test_channels_are_sorted_and_the_pruned_ones_pale():
    figure = plots.channels({"a": torch.tensor([1.0, 4.0, 2.0, 3.0]), "b": torch.tensor([1.0, 2.0])}, {"a": {1, 2}, "b": {0, 1}})
    bars = figure.axes[0].patches
    assert [bar.get_height() for bar in bars] == [4, 3, 2, 1]
    assert colours(bars) == [plots.PRUNED_INK, plots.PRUNED, plots.PRUNED_INK, plots.PRUNED]
    assert colours(figure.axes[1].patches) == [plots.PRUNED_INK] * 2


def test_a_matrix_shows_its_shares():
    axes = plots.matrix([[1, 0.5], [0.25, 1]], ["one", "two"], label="in common").axes[0]
    assert {(text.get_position(), text.get_text()) for text in axes.texts} == {
        ((0, 0), "100.0%"), ((1, 0), "50.0%"), ((0, 1), "25.0%"), ((1, 1), "100.0%"),
    }  # fmt: skip
    assert [label.get_text() for label in axes.get_xticklabels()] == ["one", "two"]


def test_lines_take_words_for_places():
    axes = plots.lines({"kept": (["1:2", "2:4"], [0.8, 0.9])}, xlabel="pattern", ylabel="share").axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1:2", "2:4"]


def test_lines_have_a_place_for_zero_on_a_logarithmic_axis():
    figure = plots.lines({"a": ([0, 0.01, 1], [3, 2, 1])}, xlabel="x", ylabel="y", xscale="symlog", marks={"here": 0.1})
    axes = figure.axes[0]
    assert axes.get_xticks().tolist() == [0, 0.01, 0.1, 1]
    places = axes.transData.transform([(x, 0) for x in (0, 0.01, 0.1, 1)])[:, 0]
    assert places[0] > axes.get_window_extent().x0 and all(places[i] < places[i + 1] for i in range(3))
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a", "here"]


def test_group_counts_are_those_of_the_largest_weights():
    weight = torch.tensor([[8.0, 7, 6, 5, 1, 1, 1, 1], [4, 1, 1, 1, 9, 10, 11, 1]])  # the largest half: 5 to 11, and 4
    bars = plots.group_counts(weight, "2:4").axes[0].patches
    assert [bar.get_height() for bar in bars] == [0.25, 0.25, 0, 0.25, 0.25]
    assert colours(bars)[2] == plots.SPARSE_INK and set(colours(bars)) == {plots.SPARSE_INK, plots.PRUNED}
    with pytest.raises(ValueError, match="not a multiple of 3"):
        plots.group_counts(weight, "2:3")


def test_a_live_run_shows_terms_and_flips():
    loss, flips = plots.live({"noise term": [3.0, 2.0, 1.0], "teacher's term": [1.0, 0.5, 0.1]}, [2, 3], [0.1, 0.05]).axes
    assert [list(line.get_ydata()) for line in loss.lines] == [[3, 2, 1], [1, 0.5, 0.1]]
    assert (list(flips.lines[0].get_xdata()), list(flips.lines[0].get_ydata())) == ([2, 3], [0.1, 0.05])


def test_strips_name_every_image():
    images = {"one": Image.new("RGB", (20, 4), "red"), "two": Image.new("RGB", (20, 4), "blue")}
    axes = plots.strips(images).axes
    assert [ax.get_ylabel() for ax in axes] == ["one", "two"]
    assert axes[1].images[0].get_array()[0, 0].tolist() == [0, 0, 255]


def widths(axes) -> list[list[float]]:
    """Lengths of the bars of each series, row by row."""
    return [[bar.get_width() for bar in series] for series in axes.containers]


def test_bars_lie_side_by_side_with_their_numbers_and_leave_out_what_is_missing():
    figure = plots.bars({"one": {"a": 2.0, "b": 1.0}, "two": {"a": 0.5, "b": None}}, xlabel="x", mark=1)
    axes = figure.axes[0]
    assert widths(axes) == [[2, 0.5], [1, 0]]
    assert [text.get_text() for text in axes.texts] == ["2.00", "0.50", "1.00", ""]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["one", "two"]
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the first row is the upper one
    places = [bar.get_y() for series in axes.containers for bar in series]
    assert len(set(places)) == 4 and axes.lines[0].get_xdata()[0] == 1


def test_stacked_bars_go_on_where_the_last_ended_and_small_ones_have_no_number():
    axes = plots.bars({"one": {"a": 0.6, "b": 0.01, "c": 0.39}}, xlabel="share", stacked=True, label="{:.0%}").axes[0]
    assert [series[0].get_x() for series in axes.containers] == pytest.approx([0, 0.6, 0.61])
    assert [text.get_text() for text in axes.texts] == ["60%", "", "39%"]


def test_speed_shows_both_rivals_and_the_pruned_model_where_there_is_one():
    row = {"what": "layer", "dtype": "float32", "threads": 2, "speedup": 1.5, "speedup_over_onednn": None}
    pruned = {**row, "what": "step", "speedup_over_onednn": 1.2, "fastest_pruned": "pruned", "speedup_pruned": 1.7}
    axes = plots.speed({"rows": [row, pruned]}).axes[0]
    assert widths(axes) == [[1.5, 1.5], [0, 1.2], [0, 1.7]]
    assert axes.get_yticklabels()[0].get_text() == "layer (float32, 2 threads)"


def test_ratios_share_a_scale_whose_middle_is_one():
    figure = plots.ratios({"a": [[1, 2]], "b": [[0.9, 1.5]]}, ["row"], [1, 2], ylabel="y", xlabel="x")
    first, second = (axes.images[0] for axes in figure.axes)
    assert first.get_clim() == second.get_clim() == (0, 2)
    assert [text.get_text() for axes in figure.axes for text in axes.texts] == ["1.00", "2.00", "0.90", "1.50"]
    assert [axes.get_title() for axes in figure.axes] == ["a", "b"] and figure.axes[0].get_ylabel() == "y"


def test_levels_are_named_horizontal_lines():
    axes = plots.lines({"a": ([1, 2], [1, 3])}, xlabel="x", ylabel="y", levels={"dense": 1.5}).axes[0]
    assert list(axes.lines[1].get_ydata()) == [1.5, 1.5]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a", "dense"]


def test_what_is_off_the_scale_stands_at_its_edge_with_its_number():
    points = [("a", "dense", 1.0, 2.0), ("b", "N:M", 0.5, 3.0), ("c", "N:M", 0.5, 99.0)]
    axes = plots.tradeoff(points, xlabel="cost", ceiling=20).axes[0]
    assert [text.get_text() for text in axes.texts] == ["a", "b", "c: 99"]
    assert max(y for drawn in axes.collections for _, y in drawn.get_offsets()) == 20
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["dense", "N:M"]


def test_names_of_points_that_crowd_cover_neither_each_other_nor_a_point():
    crowd = [(f"method {i}", "N:M", 0.5, 3.0 + 0.05 * i) for i in range(8)] + [
        (f"other {i}", "dense", 0.55, 3.1) for i in range(3)
    ]
    axes = plots.tradeoff([*crowd, ("far", "pruned", 1.0, 30.0)], xlabel="cost").axes[0]
    axes.figure.draw_without_rendering()
    boxes = [Text.get_window_extent(text) for text in axes.texts]  # of the text alone, without its line
    dots = [axes.transData.transform(place) for drawn in axes.collections for place in drawn.get_offsets()]
    assert len(boxes) == len(dots) == 12
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert not any(box.contains(*dot) for box in boxes for dot in dots)
    assert all(axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1 for box in boxes)


def test_verdicts_are_words_on_shades():
    table = {"it is small": {"A": "yes", "B": "no"}, "it is fast": {"A": "perhaps", "B": "yes"}}
    axes = plots.verdicts(table, ("yes", "perhaps", "no")).axes[0]
    cells = {(text.get_position(), text.get_text()) for text in axes.texts}
    assert cells == {((0.5, 0), "yes"), ((1.5, 0), "no"), ((0.5, 1), "perhaps"), ((1.5, 1), "yes")}
    assert [label.get_text() for label in axes.get_yticklabels()] == list(table)
    shades = colours(axes.patches)
    assert shades[0] == shades[3] and len(set(shades)) == 3 and not set(shades) & set(plots.FAMILIES.values())


def test_each_seed_is_a_dot_with_an_interval_and_a_triangle_is_off_the_scale():
    rows = [plots.Dots("a", "N:M", (2.0, 3.0), (1.5, 4.0), "half"), plots.Dots("b", "pruned", (90.0,), (80.0, 99.0), "half")]
    axes = plots.dots(rows, ceiling=10).axes[0]
    found = {line.get_marker(): line for line in axes.lines}
    assert list(found["o"].get_xdata()) == [2.0, 3.0] and to_hex(found["o"].get_color()) == plots.SPARSE_INK
    assert list(found["None"].get_xdata()) == [1.5, 4.0]
    assert (list(found[">"].get_xdata()), list(found[">"].get_ydata())) == ([10], [1])
    assert {text.get_text() for text in axes.texts} == {"90", "half"}


def test_menus_may_show_titles_instead_of_values():
    explorer = plots.explorer(lambda key="b": Image.new("L", (len(key) * 10, 5)), key=[("first", "aa"), ("second", "b")])
    menu, picture, _ = explorer.children
    assert (menu.value, menu.label) == ("b", "second")
    menu.label = "first"
    assert Image.open(io.BytesIO(picture.value)).width == 20
