"""The demo's rooms: what they refuse, what they compute, what they say."""

import dataclasses
import itertools
import random
import re
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import gradio as gr
import pytest
import torch
from PIL import Image

import sparsedm
from sparsedm import data, diffusion, plots
from sparsedm.checkpoints import folders
from sparsedm.data import faces, prompts
from sparsedm.demo import blind, chips, compare, explore, models, race, scatter, speedtest, subjects, tradeoff, tune, turns, words
from sparsedm.experiments import results
from sparsedm.experiments.recipes import RECIPES
from sparsedm.masking import layers, nm
from sparsedm.masking.nm import NMPattern
from sparsedm.measure import judges, macs, speed
from sparsedm.packing import packed

ORDER = dict(text="A7", left="glyphs-unet", right="glyphs-unet-2x4", seed=0, steps=3, sampler="ddim", guidance=0, kind="word")


@pytest.fixture(scope="module")
def own(tmp_path_factory, make_model):
    """A folder with somebody's small colour model without classes."""
    folder = tmp_path_factory.mktemp("models") / "mine"
    sparsedm.save(make_model("unet", in_channels=3, out_channels=3, num_class_embeds=None), folder)
    return folder


@pytest.fixture(scope="module")
def catalogue(own):
    return models.Catalogue([own])


@pytest.fixture(scope="module")
def order(catalogue):
    return lambda **changes: race.check(catalogue, **{**ORDER, **changes})


def lane(seconds=(0.01,) * 6, pattern="", **counts) -> race.Lane:
    layer = macs.LayerMacs("layer", 1000, NMPattern.parse(pattern) if pattern else None, **counts)
    title = f"UNet, {pattern or 'dense'}"
    variant = models.Variant(title, torch.nn.Identity(), macs.Macs((layer,), attention=100), 1000, 500, 4000, "Conv2d 1 dense")
    return race.Lane(variant, torch.zeros(2, 1, 16, 16), tuple(seconds))


def test_a_good_order_is_normalised(order):
    found = order(text=" a7 ", steps=3.0, guidance=1)
    assert found.asked.labels.tolist() == data.word_labels("A7").tolist()
    assert (found.steps, found.guidance) == (3, 1.0) and isinstance(found.steps, int)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": ""}, "empty.*letters"),
        ({"text": None}, "missing.*type"),
        ({"text": "A-B"}, "'-' cannot be drawn; use the letters"),
        ({"text": "A" * 13}, "13 letters.*at most 12"),
        ({"text": "ß" * 7}, "14 letters"),
        ({"left": "../secret"}, "left model '../secret' is unknown.*glyphs-uvit, "),
        ({"left": ["glyphs-unet"]}, "left model"),
        ({"right": "glyphs-uvit@5:9"}, "right model 'glyphs-uvit@5:9'"),
        ({"right": "mine"}, r"different things, 1x16x16 \(36 classes\) and 3x8x8 \(0 classes\)"),
        ({"left": "mine", "right": "mine"}, "mine does not draw letters: ask for classes, or for anything"),
        ({"left": "mine", "right": "mine", "kind": "classes"}, "mine has no classes: ask for anything"),
        ({"left": "mine", "right": "mine", "kind": "anything", "guidance": 1}, "no classes.*guidance at 0"),
        ({"kind": "picture"}, "kind of order 'picture'.*word, classes, anything"),
        ({"kind": "classes", "text": "3, 36"}, "'36' is no class: give 1 to 12 numbers from 0 to 35"),
        ({"kind": "classes", "text": "-1"}, "'-1' is no class"),
        ({"kind": "classes", "text": ""}, "there are 0 classes"),
        ({"sampler": "euler"}, "sampler 'euler'.*ddim, ddpm"),
        ({"steps": 0}, "steps is '0'.*whole number from 1 to 200"),
        ({"steps": 2.5}, "steps"),
        ({"steps": 10**6}, "steps"),
        ({"steps": "25"}, "steps"),
        ({"seed": -1}, "seed"),
        ({"seed": None}, "seed is 'None'"),
        ({"seed": 2**31}, "seed.*2,147,483,647"),
        ({"guidance": 2.1}, "guidance.*from 0 to 2"),
        ({"guidance": float("nan")}, "guidance"),
    ],
)
def test_a_bad_order_is_named_with_its_remedy(catalogue, changes, message):
    with pytest.raises(gr.Error, match=f"(?i){message}"):
        list(compare.compare(catalogue, **{**ORDER, **changes}))


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "gradio"))


@pytest.mark.parametrize("steps", [1, 3, 25])
def test_both_sides_take_every_step(order, steps):
    updates = list(race.race(order(steps=steps)))
    for side in range(2):
        assert len(updates[-1][side].seconds) == steps
        assert updates[-1][side].images.shape == (2, 1, 16, 16)
    assert len(updates) == steps
    assert all(a.seconds == b.seconds[: len(a.seconds)] for a, b in zip(updates[0], updates[-1]))


def test_the_same_order_gives_the_same_pictures_with_a_sampler_that_adds_noise(order):
    first, second = (list(race.race(order(sampler="ddpm")))[-1] for _ in range(2))
    assert all(torch.equal(a.images, b.images) for a, b in zip(first, second))


def test_classes_by_number_and_no_classes(catalogue, order):
    spelled, numbered = (list(race.race(order(**changes)))[-1] for changes in ({}, {"kind": "classes", "text": "10, 7"}))
    assert torch.equal(spelled[0].images, numbered[0].images)
    free = order(kind="anything", text="")
    assert free.asked.labels is None and free.asked.judge is None
    page = list(compare.compare(catalogue, **{**ORDER, "kind": "anything"}))[-1]
    assert "classifier" not in page[4] + page[-1] and "SSIM" in page[-1]


def test_a_folder_of_ones_own(catalogue):
    order = {**ORDER, "left": "mine", "right": "mine", "kind": "anything", "text": ""}
    *_, page = compare.compare(catalogue, **order)
    assert page[0] == "<h2>mine</h2>" and Image.open(page[2]).size == (1200, 280)
    assert "needs **as many MACs**" in page[-1] and "SSIM between the two is **1.00**" in page[-1]


@pytest.fixture(scope="module")
def gallery(portraits):
    """A catalogue with somebody's small model of faces."""
    return models.Catalogue([portraits])


FACES = {**ORDER, "left": "portraits", "right": "portraits", "text": "red hair, cap, no beard"}


def test_faces_are_drawn_from_words_and_read(gallery, monkeypatch):
    def read(judge, images):  # red hair in four of the six, no cap, no beard
        shown = torch.zeros(len(images), len(faces.ATTRIBUTES), dtype=torch.long)
        shown[:4, 2] = faces.ATTRIBUTES["hair colour"].index("red hair")
        return shown

    monkeypatch.setattr(judges.Judge, "read", read)
    page = list(compare.compare(gallery, **FACES))[-1]
    read = re.findall("class='read'>([a-z ]+) <b>(./6)", page[4])
    assert read == [("red hair", "4/6"), ("no beard", "6/6"), ("cap", "0/6")]
    assert "**10 of 18** asked attributes right on the left" in page[-1]
    given = race.check(gallery, **FACES).asked
    drawn = [faces.read_tokens(words) for words in given.conditioning["encoder_hidden_states"]]
    assert all(prompts.parse(FACES["text"]).items() <= face.items() for face in drawn)
    assert len({face["shirt"] for face in drawn}) > 1 and all(len(face) == len(faces.ATTRIBUTES) for face in drawn)
    assert faces.read_tokens(given.negative["encoder_hidden_states"][0]) == {} and given.n == race.FACES
    for changes in ({"text": ""}, {"kind": "anything"}):  # nothing is asked for, so nothing is read
        assert race.check(gallery, **{**FACES, **changes}).asked.judge is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": "SPARSE"}, "'sparse' is not among the words for faces"),
        ({"text": "mohawk, cap"}, "no face has 'mohawk' together with 'cap'"),
        ({"kind": "classes", "text": "3"}, "portraits has no classes: ask for anything"),
        ({"right": "glyphs-unet"}, "draw different things"),
    ],
)
def test_a_bad_order_of_faces_is_named_with_its_remedy(gallery, changes, message):
    with pytest.raises(gr.Error, match=f"(?i){message}"):
        list(compare.compare(gallery, **{**FACES, **changes}))


def test_two_folders_of_one_name_are_refused(own, tmp_path):
    with pytest.raises(ValueError, match="same name"):
        models.Catalogue([own, tmp_path / "mine"])


def test_one_shot_is_the_folded_teacher_and_the_cached_teacher_stays_dense(catalogue):
    dense, sparse = catalogue.load("glyphs-unet"), catalogue.load("glyphs-unet@2:4")
    assert dense.macs.sparse == dense.macs.dense > 1.8 * sparse.macs.sparse
    assert dense.nonzero > 1.9 * sparse.nonzero
    assert catalogue.load("glyphs-unet") is dense


@pytest.mark.parametrize("base", models.LETTER_BASES)
def test_the_pruned_model_does_about_half_the_work(catalogue, base):
    dense, pruned = catalogue.load(base), catalogue.load(f"{base}-diffpruned")
    assert pruned.macs.executed == pruned.macs.sparse and pruned.nonzero > 0.999 * pruned.parameters
    assert pruned.parameters < 0.6 * dense.parameters and pruned.bytes < 0.6 * dense.bytes
    assert re.search(r"Diff-Pruning needs \*\*4\d % fewer MACs\*\*.*executes 4\d % fewer here", compare.work_words(dense, pruned))


def test_kernels_counts_layers_by_class():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8), torch.nn.Conv2d(8, 8, 3))
    layers.fold(layers.sparsify(model, "2:4"))
    assert models.kernels(model) == "Linear 2 dense; Conv2d 1 dense"
    model[0] = packed.packed_layer(model[0], "2:4")
    assert models.kernels(model) == "Linear 1 packed, 1 dense; Conv2d 1 dense"


def test_the_text_says_what_the_kernel_really_does():
    dense = lane().variant
    assert "45 % fewer MACs" in compare.work_words(dense, lane(pattern="2:4").variant)
    assert "multiplied too" in compare.work_words(dense, lane(pattern="2:4").variant)
    skipped = compare.work_words(dense, lane(pattern="2:4", executed_share=0.5).variant)
    assert "executes 45 % fewer here" in skipped and "multiplied too" not in skipped
    assert "83 % more MACs" in compare.work_words(lane(pattern="2:4", executed_share=0.5).variant, dense)


@pytest.mark.parametrize(
    ("right_seconds", "words"),
    [
        ((0.009, 0.011) * 3, "as much time as one on the left.*noise"),
        ((0.006,) * 6, "40 % less time"),
        ((0.015,) * 6, "50 % more time"),
        ((0.001,) * 2, "Too few steps"),
    ],
)
def test_the_times_are_compared_pair_by_pair(right_seconds, words):
    left = lane(seconds=(0.01,) * len(right_seconds))
    assert re.search(words, compare.time_words(left, lane(right_seconds)))


def test_figures_count_both_halves_of_a_guided_step():
    half_way = lane((0.01,) * 3, "2:4")
    labels = data.word_labels("A7")
    asked = race.Asked(2, labels, judge=judges.GLYPHS, expected=labels)
    order = race.Order(lane().variant, half_way.variant, asked, 0, 6, "ddim", 1.0)
    table = compare.figures(half_way, order)
    assert "600 needed, 1.10 k executed" in table
    assert "7.20 k needed, 13.2 k executed" in table  # 2 pictures, 3 steps, 2 calls
    assert "10.0 ms" in table and "3 of 6 steps" in table and "4.00 kB" in table
    assert "width:27.3%'></i><b style='width:22.7%" in table


@pytest.mark.parametrize(
    ("number", "text"), [(12_084_633_600, "12.1 G"), (80_564_224, "80.6 M"), (937_984, "938 k"), (7, "7.00")]
)
def test_si(number, text):
    assert words.si(number) == text


@pytest.mark.parametrize("n", range(1, race.MAX_PICTURES + 1))
def test_word_cards_have_one_size(n):
    assert plots.word_card(torch.zeros(n, 1, 16, 16)).size == (1200, 280)


def test_a_word_card_keeps_every_pixel():
    letters, _ = data.stack(data.load("glyphs", n=36), 3)
    card = plots.word_card(letters, ink="black", paper="white")
    scale = min(1200 // 52, 280 // 18)
    left, top = (1200 - 52 * scale) // 2, (280 - 18 * scale) // 2
    pixels = torch.tensor(list(card.convert("L").getdata())).view(280, 1200)
    inside = pixels[top + scale + scale // 2 :: scale, left + scale + scale // 2 :: scale][:16, :16]
    assert torch.equal(255 - inside, data.to_uint8(letters[0, 0]).long())
    with pytest.raises(ValueError, match="do not fit"):
        plots.word_card(torch.zeros(200, 1, 16, 16), size=(100, 100))


def test_explore_tells_what_a_pattern_keeps(catalogue):
    groups, counts, text, rows = explore.explore(catalogue, "glyphs-unet", "mid_block.resnets.0.conv1", 2, 4)
    assert groups is not None and counts is not None
    masked = [row for row in rows if row[2] == "2:4"]
    assert len(masked) > 20 and rows[0][0] == "conv_in" and "excluded" in rows[0][-1]
    kept, free = (float(share) for share in re.findall(r"(\d+\.\d)%", text))
    assert 50 < kept < free < 100


def test_words_of_a_mask_by_hand():
    weight = torch.tensor([[3.0, 2.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0]])  # both choices keep all but the free one is the same
    assert "**100.0% of their sum of squares**" in explore.words(weight, NMPattern(2, 4))
    crowded = torch.tensor([[3.0, 3.0, 3.0, 3.0, 1.0, 1.0, 1.0, 1.0]])  # 2:4 keeps 20 of 40, the four largest 36
    assert re.search(r"\*\*50\.0% of.*would keep 90\.0%", explore.words(crowded, NMPattern(2, 4)))


@pytest.mark.parametrize(
    ("order", "message"),
    [
        (("x", "conv_in", 2, 4), "model 'x'"),
        (("glyphs-unet", "x", 2, 4), "layer 'x'"),
        (("glyphs-unet", "conv_in", 5, 4), "N is '5'"),
        (("glyphs-unet", "conv_in", 1, 65), "M is '65'"),
        (("glyphs-unet", "conv_in", 2, 4), "not a multiple of 4"),
    ],
)
def test_explore_refuses_by_name(catalogue, order, message):
    with pytest.raises(gr.Error, match=f"(?i){message}"):
        explore.explore(catalogue, *order)


@pytest.mark.parametrize(("base", "suite", "cost"), itertools.product(models.LETTER_BASES, tradeoff.SUITES, tradeoff.COSTS))
def test_every_point_of_the_trade_off_has_its_details(base, suite, cost):
    points = tradeoff.points(base, suite, cost)
    rows = {row.name: row for row in results.load(suite, base)}
    assert points and all(point.fd == rows[point.name].fd for point in points)
    assert {point.cost for point in points if point.family == "dense"} == {1.0}
    for point in points:
        picture, text = tradeoff.details(point.name)
        assert f"reproduce {point.name}`" in text and f"**{point.fd:.2f}**" in text
        assert Image.open(picture).width == 4 * (18 * 17 + 1)


def test_the_trade_off_refuses_what_it_does_not_know():
    for order in (("x", "short", "macs"), ("glyphs-uvit", "x", "macs"), ("glyphs-uvit", "short", "x")):
        with pytest.raises(gr.Error, match="'x' is unknown"):
            tradeoff.draw(*order)
    assert tradeoff.details("../x") == (None, "Choose a point.")


def test_the_scatter_places_points_by_cost_and_quality():
    points = [scatter.Point("a", "A & B", "dense", 1.0, 10.0), scatter.Point("b", "B", "N:M", 0.5, 1.0)]
    plot = scatter.svg(points, "cost", "a")
    found = re.findall(r"data-name='(\w)'.*?cx='([\d.]+)' cy='([\d.]+)'", plot)
    places = {name: (float(x), float(y)) for name, x, y in found}
    assert places["a"][0] > places["b"][0] and places["a"][1] < places["b"][1]
    assert "A &amp; B" in plot and list(places) == ["b", "a"]  # the chosen one lies on top
    assert "No results" in scatter.svg([], "cost")
    clipped = scatter.svg(points, "cost", ceiling=5)
    assert clipped.count("<circle") == clipped.count("<path") == 1 and ">A &amp; B: 10</text>" in clipped


def test_the_benchmark_streams_and_leaves_a_file(monkeypatch):
    monkeypatch.setattr(speedtest, "ROUNDS", 1)
    updates = list(speedtest.benchmark("glyphs-unet", [1, 1], "float32", False))
    assert [len(re.findall("of 1 measurements", update[0])) for update in updates] == [1, 1, 0]
    assert "glyphs-unet, batch 1" in updates[-1][2] and updates[-1][1] is not None
    assert updates[-1][3].endswith(".json") and updates[0][3] is None


@pytest.mark.parametrize(
    ("order", "message"),
    [
        (("x", [1], "float32", False), "model 'x'"),
        (("glyphs-unet", [], "float32", False), "at least one batch size of 1, 4, 16"),
        (("glyphs-unet", [10**9], "float32", False), "batch size"),
        (("glyphs-unet", [1], "float64", False), "dtype 'float64'"),
    ],
)
def test_the_benchmark_refuses_by_name(order, message):
    with pytest.raises(gr.Error, match=f"(?i){message}"):
        list(speedtest.benchmark(*order))


def test_fine_tuning_streams_and_packs(catalogue, monkeypatch):
    monkeypatch.setattr(tune, "BATCH", 4)
    updates, kept = [], {}
    for update in tune.tune(catalogue, "me", "glyphs-unet", "2:4", 2e-4, 0.1, 10, "A7"):
        updates.append(update)
        if update[-1]:
            with zipfile.ZipFile(update[-1]) as archive:
                kept = {name: archive.read(name) for name in archive.namelist()}
    assert "Step **0 of 10**" in updates[0][3] and "Step **10 of 10**" in updates[-1][3] and updates[-1][2] is not None
    assert {name.split("/")[-1] for name in kept if not name.endswith("/")} >= {
        "config.json",
        "diffusion_pytorch_model.safetensors",
    }
    assert not tune.running
    unchanged = models.copy_of(catalogue.load("glyphs-unet")).state_dict()
    assert all(torch.equal(value, unchanged[name]) for name, value in sparsedm.load("glyphs-unet").state_dict().items())


def test_fine_tuning_stops_when_asked_and_what_it_learned_loads(catalogue, monkeypatch, tmp_path):
    monkeypatch.setattr(tune, "BATCH", 4)
    run = tune.tune(catalogue, "me", "glyphs-unet", "1:4", 0, 0, 400, "A")
    next(run)
    tune.running["me"].set()
    next(run)
    *_, text, last = next(run)
    assert "Step **1 of 400**" in text
    with zipfile.ZipFile(last) as archive:
        archive.extractall(tmp_path)
    student = sparsedm.load(tmp_path / "glyphs-unet-1x4")
    assert not nm.verify(student.mid_block.resnets[0].conv1.weight, "1:4")
    run.close()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base": "mine"}, "model 'mine' is unknown"),
        ({"pattern": "3:7"}, "pattern '3:7'"),
        ({"decay": 1}, "decay"),
        ({"weight": -1}, "teacher's weight"),
        ({"steps": 10**6}, "number of steps"),
        ({"word": "é"}, "cannot be drawn"),
    ],
)
def test_fine_tuning_refuses_by_name(catalogue, changes, message):
    order = {"base": "glyphs-unet", "pattern": "2:4", "decay": 0, "weight": 0.1, "steps": 10, "word": "A"}
    with pytest.raises(gr.Error, match=f"(?i){message}"):
        list(tune.tune(catalogue, "me", *{**order, **changes}.values()))
    assert not tune.running


def test_a_long_order_lets_a_short_one_in_and_keeps_out_of_its_steps():
    """Both compute step by step in threads of their own; steps are never shared, and the short order's are not parted."""
    log, begun = [], threading.Event()

    def work(name: str, steps: int) -> Iterator[str]:
        for _ in range(steps):
            log.append((name, "begins"))
            begun.set()
            time.sleep(0.005)
            log.append((name, "ends"))
            yield name

    long = threading.Thread(target=lambda: list(turns.long(work("long", 60))))
    long.start()
    begun.wait()
    assert list(turns.short(work("short", 5))) == ["short"] * 5
    assert long.is_alive()
    long.join()
    names = [name for name, _ in log[::2]]
    assert log == [(name, when) for name in names for when in ("begins", "ends")]
    first = names.index("short")
    assert names[first : first + 5] == ["short"] * 5 and names.count("long") == 60 and first < 50


def test_a_turn_ends_with_its_order_however_that_ends():
    for leave in (turns.short, turns.long):
        run = leave(iter("ab"))
        next(run)
        run.close()
        with pytest.raises(ZeroDivisionError):
            list(leave(1 // number for number in (1, 0)))
    assert list(turns.short(["free"])) == ["free"]


def test_a_picture_s_file_is_whole_while_others_draw_the_same():
    card = Image.effect_noise((600, 300), 50)
    path, image = Path(words.saved(card)), gr.Image(format="png")
    whole, stopped, broken = path.read_bytes(), threading.Event(), []

    def load() -> None:
        while not stopped.is_set():
            broken.extend(size for size in (path.stat().st_size, len(path.read_bytes())) if size != len(whole))

    reader = threading.Thread(target=load)
    reader.start()
    for _ in range(100):
        assert image.postprocess(words.saved(card)).path == str(path)
    stopped.set()
    reader.join()
    assert not broken and [found.name for found in path.parent.iterdir()] == ["image.png"]


def test_every_picture_of_the_page_is_such_a_file(catalogue):
    *_, page = compare.compare(catalogue, **ORDER)
    files = [page[2], page[3], *page[6], page[7], tradeoff.details("glyphs-unet")[0]]
    assert all(isinstance(file, str) and Image.open(file).format == "PNG" for file in files)


def test_the_catalogue_s_entries_have_fields(catalogue):
    entries = catalogue.entries
    stored = {name for name, known in RECIPES.items() if known.bundle} & set(folders.bundled())
    assert stored == set(models.BUNDLED) and {RECIPES[name].role for name in stored} <= set(models.ROLES)
    assert (entries["glyphs-unet-2x4"].base, entries["glyphs-unet-2x4"].role) == ("glyphs-unet", "2x4")
    assert entries["glyphs-uvit@7:8"].pattern == "7:8" and entries["mine"].role == "own"
    assert [catalogue.rival(key) for key in ("glyphs-unet", "glyphs-unet-diffpruned", "mine")] == [
        "glyphs-unet-2x4",
        "glyphs-unet-diffpruned",
        "mine",
    ]
    assert [title for title, _ in catalogue.choices("2x4", data="glyphs")] == ["U-ViT, 2:4 SparseDM", "UNet, 2:4 SparseDM"]


def test_an_unknown_device_is_named():
    with pytest.raises(ValueError, match="device 'warp' is not there"):
        models.device_of("warp")
    assert models.device_of("cpu") == "cpu" and speed.machine()["threads"] >= 1


# --- faces ------------------------------------------------------------------------------------------------------------


def test_a_bundled_pair_of_faces_comes_first_and_letters_are_left(bundled_faces, monkeypatch):
    assert list(models.pairs().items()) == [("faces", bundled_faces), ("glyphs", ("glyphs-uvit", "glyphs-uvit-2x4"))]
    catalogue = models.Catalogue()
    assert catalogue.rival("faces-unet") == bundled_faces[1]
    assert [key for _, key in catalogue.choices("teacher", data="faces")] == ["faces-unet"]
    assert "faces-unet@2:4" in dict(catalogue.choices(data="faces")).values()
    assert not {"faces-unet", "faces-unet@2:4"} & set(dict(catalogue.choices(data="glyphs")).values())
    trained = dataclasses.replace(models.BUNDLED[bundled_faces[1]], role="2x4-from-calibrated")
    with monkeypatch.context() as patch:
        patch.setitem(models.BUNDLED, "trained", trained)
        assert models.student("faces-unet") == "trained"
    monkeypatch.delitem(models.BUNDLED, bundled_faces[1])  # a teacher alone is no pair
    assert list(models.pairs()) == ["glyphs"] and "faces-unet" not in blind.offered()
    assert models.Catalogue().rival("faces-unet") == "faces-unet"


def test_a_subject_brings_its_line_and_its_models(gallery, bundled_faces):
    catalogue = models.Catalogue(gallery.folders)
    offered = subjects.offered(catalogue, "portraits", "portraits")
    assert list(offered.items()) == [("faces", ("portraits",) * 2), ("glyphs", ("glyphs-uvit", "glyphs-uvit-2x4"))]
    assert list(subjects.offered(catalogue, "glyphs-unet", "glyphs-unet-2x4")) == ["faces", "glyphs"]
    line, left, right = subjects.switched(catalogue, offered, "glyphs")
    assert (line.value, left.value, right.value) == ("SPARSE", "glyphs-uvit", "glyphs-uvit-2x4")
    assert {"portraits", "glyphs-unet"} <= {key for _, key in left.choices} and "faces-unet" not in dict(left.choices).values()
    line, *_ = subjects.switched(catalogue, offered, "faces")
    assert prompts.parse(line.value)
    with pytest.raises(ValueError, match="subject 'cats' is unknown: choose one of faces, glyphs"):
        subjects.switched(catalogue, offered, "cats")


def test_the_examples_can_be_drawn(bundled_faces):
    entries = models.Catalogue().entries
    for data_set, subject in subjects.SUBJECTS.items():
        for text, *keys in subject.examples:
            assert {entries[key].data for key in keys} <= {data_set}
            assert prompts.parse(text) if data_set == "faces" else data.word_labels(text) is not None


def pressed(text: str) -> list[str]:
    return re.findall("aria-pressed='true' aria-label='([a-z ]+)'", chips.show(text))


def test_chips_show_what_the_line_says():
    assert pressed("Long red hair, a beanie") == ["long hair", "red hair", "beanie"] and pressed("") == []
    words_ = re.findall("data-word='([a-z ]+)'", chips.show(""))
    assert words_ == [word for values in faces.ATTRIBUTES.values() for word in values]
    assert chips.HINT in chips.show("cap")


@pytest.mark.parametrize(
    ("text", "message"), [("sunglases", "near it: sunglasses"), ("cap, mohawk", "together"), ("<b>", "&lt;b&gt;")]
)
def test_the_hint_names_what_is_wrong_with_the_line(text, message):
    shown = chips.show(text)
    assert re.search(f"class='hint'>.*{message}", shown) and chips.HINT not in shown and pressed(text) == []


def test_a_chip_of_a_line_that_is_wrong_is_refused_with_the_nearest_words():
    event = gr.SelectData(None, {"index": 0, "value": "cap"})
    assert chips.picked("smile", event) == "smile, cap"
    with pytest.raises(gr.Error, match="'smyle'.*smile"):
        chips.picked("smyle", event)


def test_a_blind_pair_of_faces_is_dealt(bundled_faces):
    shown, left, right = blind.deal(models.Catalogue(), bundled_faces[0], random.Random(0))
    assert shown.base == "faces-unet" and left.shape == right.shape == (1, 3, 32, 32)


# --- blind test -------------------------------------------------------------------------------------------------------


def test_a_blind_pair_is_the_teachers_and_the_students_picture_in_random_order(catalogue):
    chance, sides = random.Random(0), set()
    for _ in range(6):
        drawn = chance.getstate()
        shown, left, right = blind.deal(catalogue, "glyphs-uvit", chance)
        again = random.Random()
        again.setstate(drawn)
        label, seed = again.randrange(36), again.randrange(race.MAX_SEED)
        expected = [
            sparsedm.generate(
                catalogue.load(key).model, diffusion.start_noise(catalogue.load(key).model, 1, seed),
                class_labels=torch.tensor([label]), steps=blind.STEPS,
            )
            for key in ("glyphs-uvit-2x4", "glyphs-uvit")
        ]  # fmt: skip
        sparse, dense = (left, right) if shown.sparse == "left" else (right, left)
        assert torch.equal(sparse, expected[0]) and torch.equal(dense, expected[1])
        sides.add(shown.sparse)
    assert sides == {"left", "right"}


def test_blind_answers_are_counted_and_judged_by_their_interval():
    shown = blind.Round("glyphs-uvit", "left")
    assert blind.judged("left", shown).right == 1 and blind.judged("right", shown).right == 0
    assert blind.judged("right", shown).answers == 1
    with pytest.raises(ValueError, match="answer 'both'"):
        blind.judged("both", shown)
    text = {pair: blind.words(blind.Round("", "", *pair)) for pair in ((0, 0), (3, 4), (6, 12), (19, 20))}
    assert "No answer" in text[0, 0] and "4 more answers" in text[3, 4]
    assert "6 of 12 right (50%)" in text[6, 12] and "25% to 75%" in text[6, 12] and "do not tell" in text[6, 12]
    assert "You can tell" in text[19, 20]


def test_blind_answers_without_a_pair_are_refused(catalogue):
    with pytest.raises(gr.Error, match="no pair yet"):
        next(blind._answer(catalogue, "left", None))
