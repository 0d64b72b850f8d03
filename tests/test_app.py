"""The demo as a script meets it: its command line and its endpoints."""

import re
import subprocess
import sys
import threading
import time
import urllib.request

import gradio_client
import pytest
from PIL import Image

import app

ORDER = {
    "text": "A7", "left": "glyphs-unet", "right": "glyphs-unet-2x4", "seed": 0, "steps": 3, "sampler": "ddim", "guidance": 0,
    "kind": "word",
}  # fmt: skip


@pytest.fixture(scope="module")
def client(url, tmp_path_factory):
    client = gradio_client.Client(url, verbose=False, download_files=str(tmp_path_factory.mktemp("client")))
    yield client
    client.close()


def test_the_command_line_offers_folders_and_chooses_sides(tmp_path, make_model):
    make_model("unet", num_class_embeds=None).save_pretrained(tmp_path / "mine")
    catalogue, left, right = app.choose([])
    assert (left, right) == ("glyphs-uvit", "glyphs-uvit-2x4") and not catalogue.folders
    assert app.choose(["glyphs-unet"])[1:] == ("glyphs-unet", "glyphs-unet-2x4")
    assert app.choose([str(tmp_path / "mine")])[1:] == ("mine", "mine")
    assert app.choose(["glyphs-unet-diffpruned", "glyphs-uvit"])[1:] == ("glyphs-unet-diffpruned", "glyphs-uvit")


def test_a_folder_without_a_model_ends_the_program_with_one_line(tmp_path):
    command = [sys.executable, "app.py", "--model", str(tmp_path)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert found.returncode == 1
    assert found.stderr.startswith("error: ") and str(tmp_path) in found.stderr and found.stderr.count("\n") == 1


def test_compare_end_to_end(client):
    *titles, left, right, left_table, right_table, pair, apart, score, verdict = client.predict(
        *ORDER.values(), api_name="/compare"
    )
    pictures = [Image.open(path) for path in (left, right, *pair, apart)]
    assert {(picture.format, picture.size) for picture in pictures} == {("PNG", (1200, 280))}
    assert pictures[0].tobytes() == pictures[2].tobytes() != pictures[1].tobytes() == pictures[3].tobytes()
    assert "UNet, dense" in titles[0] and "UNet, 2:4 SparseDM" in titles[1]
    assert "3 of 3 steps" in left_table and "Conv2d" in right_table and "SSIM" in score
    assert re.search(r"fewer MACs.*of 2\*\* characters right.*SSIM", verdict)


def test_the_endpoint_streams(client):
    updates = list(client.submit(*{**ORDER, "steps": 10}.values(), api_name="/compare"))
    assert len(updates) == 10
    assert "step 1 of 10" in updates[0][-1]


def test_the_endpoint_explains_what_it_refuses(client):
    for changes, message in (
        ({"text": "né"}, "'É' cannot be drawn"),
        ({"steps": 999}, "number of steps"),
        ({"sampler": "x"}, "ddim"),
    ):
        with pytest.raises(gradio_client.exceptions.AppError, match=message):
            client.predict(*{**ORDER, **changes}.values(), api_name="/compare")


def test_generate_gives_a_picture_and_its_cost(client):
    picture, facts = client.predict("A7", "glyphs-unet-2x4", steps=5, api_name="/generate")
    assert Image.open(picture["path"] if isinstance(picture, dict) else picture).size == (1200, 280)
    assert (facts["pictures"], facts["steps"], len(facts["read"])) == (2, 5, 2)
    assert facts["macs_per_picture_and_step"] <= facts["macs_executed"] and facts["ms_per_step"] > 0


def test_the_other_endpoints_answer(client):
    counts = client.predict("glyphs-unet", "mid_block.resnets.0.conv1", 1, 8, api_name="/explore")
    assert "1:8 keeps 12% of the weights" in counts[2]
    plot, _, picture, text = client.predict("glyphs-unet", "headline", "time", None, api_name="/tradeoff")
    assert "<svg" in plot and Image.open(picture) and "reproduce glyphs-unet-2x4" in text


def test_every_endpoint_is_described(client):
    described = {
        name: found.get("description") for name, found in client.view_api(return_format="dict")["named_endpoints"].items()
    }
    assert set(described) == {"/compare", "/generate", "/explore", "/tradeoff", "/benchmark", "/finetune"}
    assert all(text and len(text) > 30 for text in described.values())


def test_one_who_leaves_frees_the_place(url, client):
    """A client that goes away in the middle of a long order does not keep the next one waiting."""
    guest = gradio_client.Client(url, verbose=False)
    job = guest.submit(*{**ORDER, "text": "ABCDEFGHIJKL", "steps": 200}.values(), api_name="/compare")
    while not job.outputs():
        time.sleep(0.05)
    job.cancel()
    guest.close()
    start = time.monotonic()
    client.predict(*ORDER.values(), api_name="/compare")
    alone = time.monotonic() - start
    assert alone < 10


def test_many_clients_get_what_each_ordered(url):
    """Eight at once: everyone's own word, no error, whatever the order in the queue."""
    words, read = [f"{letter}{digit}" for letter, digit in zip("ABCDEFGH", "12345678")], {}

    def visit(word: str) -> None:
        guest = gradio_client.Client(url, verbose=False)
        read[word] = guest.predict(word, "glyphs-unet", steps=15, api_name="/generate")[1]["read"]
        guest.close()

    guests = [threading.Thread(target=visit, args=(word,)) for word in words]
    for guest in guests:
        guest.start()
    for guest in guests:
        guest.join(timeout=120)
    assert set(read) == set(words)
    assert sum(a == b for word in words for a, b in zip(word, read[word])) >= 14  # of 16: the classifier may err, mixing may not


def test_the_page_needs_no_network(url):
    pages = [urllib.request.urlopen(url + path).read().decode() for path in ("", "theme.css")]
    assert "--body-text-color" in pages[1] and not re.search(r"@import|url\(.?http", pages[1])
    assert not any(host in pages[0] for host in ("fonts.googleapis", "fonts.gstatic", "cdnjs"))
