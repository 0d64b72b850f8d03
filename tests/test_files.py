"""Files that are written whole or not at all, folders that are claimed, and what damage to them is called."""

import errno
import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from PIL import Image

import sparsedm
from sparsedm import plots
from sparsedm.models.uvit import UViTModel
from sparsedm.support import files
from sparsedm.training import runlog
from sparsedm.training.distill import TrainState

# --- a folder that is replaced ----------------------------------------------------------------------------------------


def die_replacing(folder: Path, renames: int) -> None:
    """Replace a folder with a new one, killed after so many renames."""
    replace = os.replace

    def dying(*paths):
        nonlocal renames
        if not renames:
            os.kill(os.getpid(), signal.SIGKILL)
        renames -= 1
        replace(*paths)

    os.replace = dying
    with files.replacing_folder(folder) as temporary:
        (temporary / "a").write_text("new")


@pytest.fixture(params=[0, 1], ids=["before the renames", "between the renames"])
def killed(request, tmp_path):
    """The folder of a process that was killed while it replaced it, and what should be in it."""
    folder = tmp_path / "some.model"
    folder.mkdir()
    (folder / "a").write_text("old")
    process = multiprocessing.get_context("fork").Process(target=die_replacing, args=(folder, request.param))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL and folder.exists() == (request.param == 0)
    return folder, ["old", "new"][request.param]


def test_a_folder_survives_a_kill_at_any_rename(killed):
    folder, expected = killed
    files.restore(folder)
    assert (folder / "a").read_text() == expected and not list(folder.parent.glob("*.old"))
    with files.replacing_folder(folder) as temporary:
        (temporary / "a").write_text("newer")
    assert (folder / "a").read_text() == "newer"


def test_the_next_run_restores_and_sweeps(killed):
    folder, expected = killed
    files.sweep(folder.parent)
    assert (folder / "a").read_text() == expected and [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_failed_save_after_a_kill_keeps_the_folder(killed):
    folder, expected = killed
    with pytest.raises(OSError, match="untouched"), files.replacing_folder(folder):
        raise OSError("nothing")
    assert (folder / "a").read_text() == expected


def test_a_reader_that_restores_does_not_disturb_a_writer(tmp_path, monkeypatch):
    folder, replace = tmp_path / "model", os.replace
    for text in ("old", "new"):
        with files.replacing_folder(folder) as temporary:
            (temporary / "a").write_text(text)
            if text == "new":  # somebody looks for the folder between the writer's renames

                def replaced(source, target):
                    replace(source, target)
                    monkeypatch.setattr(os, "replace", replace)
                    files.restore(folder)

                monkeypatch.setattr(os, "replace", replaced)
    assert (folder / "a").read_text() == "new" and [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("named", ["out/model", "out"])
def test_the_next_load_finds_the_model(tmp_path, monkeypatch, named):
    monkeypatch.chdir(tmp_path)
    model = UViTModel(sample_size=8, in_channels=1, embed_dim=16, depth=2, num_heads=2)
    sparsedm.save(model, "out/model")
    os.replace("out/model", "out/.model.7.old")
    assert torch.equal(sparsedm.load(named).pos_embed, model.pos_embed) and os.listdir("out") == ["model"]


# --- full disks -------------------------------------------------------------------------------------------------------


def full(temporary: Path) -> None:
    temporary.symlink_to("/dev/full")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_named_with_the_file_and_what_is_kept(tmp_path, monkeypatch):
    path = tmp_path / "state"
    path.write_text("old")
    message = r"could not write .*state \(No space left on device\); what was there is untouched"
    with pytest.raises(OSError, match=message), files.replacing(path) as temporary:
        full(temporary)
        temporary.write_text("new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["state"]
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=0))  # a RuntimeError does not tell the reason
    with pytest.raises(OSError, match=message) as error, files.replacing(path) as temporary:
        full(temporary)
        torch.save(torch.zeros(100_000), temporary)
    assert error.value.errno == errno.ENOSPC


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_log_on_a_full_disk_says_what_is_kept(tmp_path):
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    log = runlog.RunLog(tmp_path / "log.jsonl", every=1)
    log.masks = {}  # in the midst of a run
    with pytest.raises(OSError, match=r"could not write .*log\.jsonl \(No space left on device\).*last checkpoint .*kept"):
        log.add(TrainState(1, 2, 0.5, {}, 0.1, 0.1, torch.nn.Linear(1, 1), None))


def test_a_picture_is_whole_or_not_there(tmp_path, monkeypatch):
    image = Image.new("RGB", (4, 4), "red")
    for name in ("a.png", "deeper/b.JPG"):
        plots.save(image, tmp_path / name)
        assert Image.open(tmp_path / name).size == (4, 4)
    with pytest.raises(ValueError, match=r"c\.xyz does not end as a picture does, such as \.png"):
        plots.save(image, tmp_path / "c.xyz")

    def fails(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fails)
    before = (tmp_path / "a.png").read_bytes()
    for name in ("a.png", "d.png"):
        with pytest.raises(OSError, match=rf"{name} \(No space left on device\)"):
            plots.save(Image.new("RGB", (9, 9)), tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == ["a.png", "deeper"] and (tmp_path / "a.png").read_bytes() == before


# --- claims -----------------------------------------------------------------------------------------------------------


def test_a_claim_follows_no_link_and_waits_for_no_pipe(tmp_path):
    (tmp_path / "precious").write_text("all of it")
    (tmp_path / ".claim").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match=r"\.claim is a symbolic link.*remove it"), files.claimed(tmp_path):
        pass
    (tmp_path / ".claim").unlink()
    os.mkfifo(tmp_path / ".claim")
    with pytest.raises(OSError, match=r"\.claim is no plain file; remove it"), files.claimed(tmp_path):
        pass
    (tmp_path / ".claim").unlink()
    os.link(tmp_path / "precious", tmp_path / ".claim")
    with files.claimed(tmp_path):
        pass
    assert (tmp_path / "precious").read_text() == "all of it"


# --- damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b'{"a": 1', b"[1]", b"\xff\xfe"], ids=repr)
def test_damaged_json_is_named_with_the_remedy(tmp_path, content):
    path = tmp_path / "settings.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"settings\.json is damaged: .*; remove it"):
        files.read_json(path, "remove it")
    files.write_json(path, {"a": [1]})
    assert files.read_json(path, "") == {"a": [1]} and path.read_text().endswith("}\n")


LINES = [{"step": 50, "loss": 1.0}, {"step": 100, "loss": 0.5}]


@pytest.mark.parametrize("cut", ['{"step": 150, "lo', '{"step"', "[]", '{"loss": 1}', '{"step": null}', "\0\0\0"], ids=repr)
def test_a_cut_last_line_of_a_log_is_dropped_with_a_word(tmp_path, cut):
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES) + cut)
    with pytest.warns(UserWarning, match=r"last line of .*log\.jsonl was cut"):
        assert runlog.read(path) == LINES
    path.write_text(json.dumps(LINES[0]) + "\n" + cut + "\n" + json.dumps(LINES[1]) + "\n")
    with pytest.raises(ValueError, match=r"line 2 of .*log\.jsonl is damaged.*remove the line"):
        runlog.read(path)


def test_a_log_without_its_last_line_end_is_whole(tmp_path):
    path = tmp_path / "log.jsonl"
    assert runlog.read(path) == []
    path.write_text("\n".join(map(json.dumps, LINES)))
    assert runlog.read(path) == LINES
