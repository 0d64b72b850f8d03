"""The demo: what it refuses, what it says, and one run through its public endpoint."""

import os
import re
import urllib.request

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import gradio_client
import pytest
import torch
from PIL import Image

import app
from sparsedm import data, macs, plots
from sparsedm.nm import NMPattern

ORDER = {
    "word": "A7", "base": "glyphs-unet", "variant": "sparsedm", "seed": 0, "steps": 3, "sampler": "ddim", "guidance": 0,
}  # fmt: skip


def order(**changes) -> app.Request:
    return app.check(**{**ORDER, **changes})


def lane(side: str = "dense", seconds=(0.01,) * 6, **counts) -> app.Lane:
    layer = macs.LayerMacs("layer", 1000, NMPattern(2, 4) if side == "sparse" else None, **counts)
    variant = app.Variant(f"UNet, {side}", torch.nn.Identity(), macs.Macs((layer,), attention=100), 1100, 1000, 500)
    return app.Lane(variant, torch.zeros(2, 1, 16, 16), tuple(seconds))


def test_a_good_order_is_normalised():
    request = order(word=" a7 ", steps=3.0, guidance=1)
    assert request.labels.tolist() == data.word_labels("A7").tolist()
    assert (request.steps, request.guidance) == (3, 1.0) and isinstance(request.steps, int)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"word": ""}, "empty.*letters"),
        ({"word": None}, "missing.*type"),
        ({"word": "A-B"}, "'-' cannot be drawn; use the letters"),
        ({"word": "A" * 13}, "13 letters.*at most 12"),
        ({"word": "ß" * 7}, "14 letters"),
        ({"base": "../secret"}, "backbone '../secret' is unknown.*glyphs-uvit, glyphs-unet"),
        ({"base": ["glyphs-unet"]}, "backbone"),
        ({"variant": "4:8"}, "sparse model.*sparsedm, diffpruned, oneshot"),
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
def test_a_bad_order_is_named_with_its_remedy(changes, message):
    with pytest.raises(ValueError, match=message):
        order(**changes)


@pytest.mark.parametrize("steps", [1, 3, 25])
def test_both_sides_take_every_step(steps):
    updates = list(app.race(order(steps=steps)))
    for side in range(2):
        assert len(updates[-1][side].seconds) == steps
        assert updates[-1][side].images.shape == (2, 1, 16, 16)
    assert len(updates) == {1: 1, 3: 3, 25: 9}[steps]
    assert all(a.seconds == b.seconds[: len(a.seconds)] for a, b in zip(updates[0], updates[-1]))


def test_the_same_order_gives_the_same_pictures_with_a_sampler_that_adds_noise():
    first, second = (list(app.race(order(sampler="ddpm")))[-1] for _ in range(2))
    assert all(torch.equal(a.images, b.images) for a, b in zip(first, second))


def test_one_shot_is_the_folded_teacher_and_the_cached_teacher_stays_dense():
    dense, sparse = app.load("glyphs-unet"), app.load("glyphs-unet", "oneshot")
    assert dense.macs.sparse == dense.macs.dense > 1.8 * sparse.macs.sparse
    assert dense.nonzero > 1.9 * sparse.nonzero
    assert app.load("glyphs-unet") is dense


@pytest.mark.parametrize("base", app.BASES)
def test_the_pruned_model_does_about_half_the_work(base):
    pruned = app.load(base, "diffpruned")
    assert pruned.macs.executed == pruned.macs.sparse and pruned.nonzero > 0.999 * pruned.parameters
    assert pruned.parameters < 0.6 * app.load(base).parameters
    assert 0.45 < pruned.macs.executed / pruned.whole < 0.55 and pruned.whole == app.load(base).macs.dense
    assert re.search(r"Diff-Pruning needs \*\*4\d % fewer MACs\*\*, and 4\d % are really skipped", app.work_words(pruned))


def test_the_text_says_what_the_kernel_really_does():
    zeros_multiplied = app.work_words(lane("sparse").variant)
    assert "45 % fewer MACs" in zeros_multiplied and "multiplied too" in zeros_multiplied
    skipped = app.work_words(lane("sparse", executed_share=0.5).variant)
    assert "45 % are really skipped" in skipped and "zeros too" not in skipped


@pytest.mark.parametrize(
    ("sparse_seconds", "words"),
    [
        ((0.009, 0.011) * 3, "as much time as a dense one.*noise"),
        ((0.006,) * 6, "40 % less time"),
        ((0.015,) * 6, "50 % more time"),
        ((0.001,) * 2, "Too few steps"),
    ],
)
def test_the_times_are_compared_pair_by_pair(sparse_seconds, words):
    dense = lane(seconds=(0.01,) * len(sparse_seconds))
    assert re.search(words, app.time_words(dense, lane("sparse", sparse_seconds)))


def test_figures_count_both_halves_of_a_guided_step():
    half_way = lane("sparse", seconds=(0.01,) * 3)
    table = app.figures(half_way, order(steps=6, guidance=1))
    assert "600 needed, 1.10 k executed" in table
    assert "7.20 k needed, 13.2 k executed" in table  # 2 pictures, 3 steps, 2 calls
    assert "10.0 ms" in table and "3 of 6 steps" in table
    assert "width:27.3%'></i><b style='width:22.7%" in table


@pytest.mark.parametrize(
    ("number", "text"), [(12_084_633_600, "12.1 G"), (80_564_224, "80.6 M"), (937_984, "938 k"), (7, "7.00")]
)
def test_si(number, text):
    assert app.si(number) == text


@pytest.mark.parametrize("n", range(1, app.MAX_LETTERS + 1))
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


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    os.environ["GRADIO_TEMP_DIR"] = str(tmp_path_factory.mktemp("gradio"))
    demo = app.build()
    _, url, _ = demo.launch(prevent_thread_lock=True, quiet=True, **app.LOOK)
    client = gradio_client.Client(url, verbose=False, download_files=str(tmp_path_factory.mktemp("client")))
    yield client
    client.close()
    demo.close()
    del os.environ["GRADIO_TEMP_DIR"]


def test_compare_end_to_end(client):
    dense, sparse, dense_table, sparse_table, pair, score, verdict = client.predict(*ORDER.values(), api_name="/compare")
    pictures = [Image.open(path) for path in (dense, sparse, *pair)]
    assert {(picture.format, picture.size) for picture in pictures} == {("PNG", (1200, 280))}
    assert pictures[0].tobytes() == pictures[2].tobytes() != pictures[1].tobytes() == pictures[3].tobytes()
    assert "UNet, dense" in dense_table and "UNet, 2:4 SparseDM" in sparse_table
    assert "3 of 3 steps" in dense_table and "SSIM" in score
    assert re.search(r"fewer MACs.*of 2\*\* characters right.*SSIM", verdict)


def test_the_endpoint_streams(client):
    updates = list(client.submit(*{**ORDER, "steps": 10}.values(), api_name="/compare"))
    assert len(updates) == 10
    assert "step 1 of 10" in updates[0][-1]


def test_the_endpoint_explains_what_it_refuses(client):
    for changes, message in (
        ({"word": "né"}, "'É' cannot be drawn"),
        ({"steps": 999}, "number of steps"),
        ({"sampler": "x"}, "ddim"),
    ):
        with pytest.raises(gradio_client.exceptions.AppError, match=message):
            client.predict(*{**ORDER, **changes}.values(), api_name="/compare")


def test_the_page_needs_no_network(client):
    pages = [urllib.request.urlopen(client.src + path).read().decode() for path in ("", "theme.css")]
    assert "--body-text-color" in pages[1] and not re.search(r"@import|url\(.?http", pages[1])
    assert not any(host in pages[0] for host in ("fonts.googleapis", "fonts.gstatic", "cdnjs"))
