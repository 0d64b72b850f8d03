"""The demo as a script meets it: its command line and its endpoints."""

import re
import socket
import sys
import threading
import time
import urllib.request
import uuid
from concurrent.futures import ThreadPoolExecutor

import gradio_client
import httpx
import pytest
from PIL import Image

import app
import sparsedm
from sparsedm.demo import models, page, serving, tune, visitors

ORDER = dict(text="A7", left="glyphs-unet", right="glyphs-unet-2x4", seed=0, steps=3, sampler="ddim", guidance=0, kind="word")
TRAINING = ("glyphs-unet", "2:4", 0, 0.1, 400, "A")


@pytest.fixture(scope="module")
def client(url, tmp_path_factory):
    client = gradio_client.Client(url, verbose=False, download_files=str(tmp_path_factory.mktemp("client")))
    yield client
    client.close()


def test_the_command_line_offers_folders_and_chooses_sides(tmp_path, make_model):
    make_model("unet", num_class_embeds=None).save_pretrained(tmp_path / "mine")
    assert not app.choose([])[0].folders
    assert app.choose(["glyphs-unet"])[1:] == ("glyphs-unet", "glyphs-unet-2x4")
    assert app.choose([str(tmp_path / "mine")])[1:] == ("mine", "mine")
    assert app.choose(["glyphs-unet-diffpruned", "glyphs-uvit"])[1:] == ("glyphs-unet-diffpruned", "glyphs-uvit")


def test_the_app_opens_on_faces_if_a_pair_is_bundled_else_on_letters(bundled_faces, monkeypatch):
    assert app.choose([])[1:] == bundled_faces
    for name in bundled_faces:
        monkeypatch.delitem(models.BUNDLED, name)
    assert app.choose([])[1:] == ("glyphs-uvit", "glyphs-uvit-2x4")


def test_a_folder_without_a_model_ends_the_program_with_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["app.py", "--model", str(tmp_path)])
    with pytest.raises(SystemExit, match=f"^error: .*{re.escape(str(tmp_path))}") as ended:
        app.main()
    assert "\n" not in str(ended.value)


@pytest.mark.parametrize(
    ("port", "message"), [("70000", "no port 70000.*1 to 65535"), ("0", "no port 0"), (None, "in use.*--port")]
)
def test_a_port_that_cannot_be_had_ends_the_program_with_one_line(monkeypatch, port, message):
    monkeypatch.setattr(page, "build", lambda *_: pytest.fail("checked too late"))
    with socket.create_server(("127.0.0.1", 0)) as busy:
        monkeypatch.setattr(sys, "argv", ["app.py", "--port", port or str(busy.getsockname()[1])])
        with pytest.raises(SystemExit, match=f"(?i)error: .*{message}") as ended:
            app.main()
    assert "\n" not in str(ended.value)


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


@pytest.mark.alone
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


@pytest.fixture(scope="module")
def join(url):
    """`join(endpoint, values)`: order as a page that does not listen yet; returns its session and the answer."""
    found = httpx.get(f"{url}config", timeout=60).json()["dependencies"]
    indices = {dependency["api_name"]: dependency["id"] for dependency in found}

    def send(name: str, values) -> tuple[str, httpx.Response]:
        session = uuid.uuid4().hex
        order = {"data": list(values), "fn_index": indices[name], "session_hash": session}
        return session, httpx.post(f"{url}gradio_api/queue/join", json=order, timeout=60)

    return send


@pytest.fixture
def taken(monkeypatch):
    """The training steps that were taken so far, each of a fifth of a second at least."""
    finetune, steps = tune.distill.finetune, []

    def slowly(*args, **options):
        for state in finetune(*args, **options):
            time.sleep(0.2)
            steps.append(state.step)
            yield state

    monkeypatch.setattr(tune.distill, "finetune", slowly)
    monkeypatch.setattr(tune, "BATCH", 4)
    return steps


def until(true, seconds: float = 30) -> bool:
    """Whether it becomes true in this time."""
    end = time.monotonic() + seconds
    while not (found := true()) and time.monotonic() < end:
        time.sleep(0.02)
    return bool(found)


def test_no_work_is_done_outside_the_queue(url):
    orders = {"compare": ORDER.values(), "generate": ("A",), "finetune": TRAINING, "explore": ("glyphs-unet", "conv_in", 1, 1)}
    for name, values in orders.items():
        for route in ("run", "api"):
            answer = httpx.post(f"{url}gradio_api/{route}/{name}", json={"data": list(values)}, timeout=60)
            assert answer.status_code == 404 and "queue" in answer.text


def test_training_stops_within_a_step_when_the_page_is_closed(url, join, taken):
    session, _ = join("finetune", TRAINING)
    with httpx.stream("GET", f"{url}gradio_api/queue/data", params={"session_hash": session}, timeout=60) as stream:
        next(line for line in stream.iter_lines() if "process_generating" in line)
        assert until(lambda: taken)
    before = len(taken)
    assert until(lambda: not tune.running)
    assert len(taken) - before <= 2 and before + 2 < tune.EVERY


def test_training_stops_when_nobody_ever_listens(join, taken, monkeypatch):
    monkeypatch.setattr(visitors, "PATIENCE", 1.0)
    join("finetune", TRAINING)
    assert until(lambda: tune.running)
    assert until(lambda: not tune.running)
    assert len(taken) < 2 * tune.EVERY


def test_one_visitor_s_orders_are_bounded_and_those_without_a_listener_do_not_block(join, client, taken, monkeypatch):
    monkeypatch.setattr(visitors, "PATIENCE", 60.0)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: join("finetune", TRAINING)[1], range(serving.limit("SPARSEDM_VISITOR_ORDERS") + 13)))
    refused = [answer for answer in answers if answer.status_code == 429]
    assert 13 <= len(refused) < len(answers) and {answer.status_code for answer in answers} == {200, 429}
    assert all(re.search(r"orders waiting: .*again", answer.json()["detail"]) for answer in refused)
    monkeypatch.setattr(visitors, "PATIENCE", 1.0)
    assert until(lambda: join("tradeoff", ("glyphs-unet", "headline", "time", None))[1].status_code == 200)
    assert client.predict("A7", "glyphs-unet", steps=2, api_name="/generate")[1]["steps"] == 2


def test_a_comparison_comes_between_the_steps_of_a_training_and_a_cancelled_training_ends(url, client, taken):
    guest = gradio_client.Client(url, verbose=False)
    job = guest.submit(*TRAINING, api_name="/finetune")
    assert until(job.outputs)
    client.predict(*ORDER.values(), api_name="/compare")
    assert not job.done() and len(taken) < 200
    job.cancel()
    before = len(taken)
    assert until(lambda: not tune.running)
    assert len(taken) - before <= 2
    guest.close()


def test_memory_does_not_grow_with_the_sessions(served):
    sessions = served[0].app.state_holder  # each takes 0.2 MB
    for number in range(page.SESSIONS + 5):
        assert sessions[f"session {number}"]
    assert len(sessions.session_data) <= page.SESSIONS


def test_the_health_page_tells_the_version(url):
    answer = httpx.get(f"{url}health", timeout=60)
    assert answer.status_code == 200 and answer.json() == {"status": "ok", "version": sparsedm.__version__}


def test_limits_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("SPARSEDM_QUEUE", "3")
    assert page.build()._queue.max_size == 3
    for value in ("0", "many", "-1", "²"):
        monkeypatch.setenv("SPARSEDM_VISITOR_ORDERS", value)
        monkeypatch.setattr(sys, "argv", ["app.py"])
        with pytest.raises(SystemExit, match="^error: SPARSEDM_VISITOR_ORDERS .*12") as ended:
            app.main()
        assert "\n" not in str(ended.value)


def test_the_page_needs_no_network(url):
    pages = [urllib.request.urlopen(url + path).read().decode() for path in ("", "theme.css")]
    assert "--body-text-color" in pages[1] and not re.search(r"@import|url\(.?http", pages[1])
    assert not any(host in pages[0] for host in ("fonts.googleapis", "fonts.gstatic", "cdnjs"))
