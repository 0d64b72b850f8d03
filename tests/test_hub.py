"""Pushing and pulling, with a folder in the hub's place."""

import re
import shutil

import pytest
import torch
import yaml

import sparsedm
from sparsedm.checkpoints import folders
from sparsedm.masking import layers
from sparsedm.measure import hub


@pytest.fixture
def site(monkeypatch, tmp_path):
    """A folder that is the hub."""

    class Api:
        def __init__(self, token=None):
            assert token == "secret"

        def create_repo(self, repo, private, exist_ok):
            (tmp_path / repo).mkdir(parents=True, exist_ok=exist_ok)

        def upload_folder(self, repo_id, folder_path, commit_message):
            shutil.copytree(folder_path, tmp_path / repo_id, dirs_exist_ok=True)

    def download(repo, revision, allow_patterns, token):
        assert {path.name for path in (tmp_path / repo).iterdir()} <= set(allow_patterns)
        return str(tmp_path / repo)

    monkeypatch.setattr(hub, "HfApi", Api)
    monkeypatch.setattr(hub, "snapshot_download", download)
    return tmp_path


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["glyphs-uvit-2x4", "glyphs-unet-diffpruned"])
def test_what_is_pushed_is_pulled(site, packed, name):
    model = folders.load(name)
    told = {"scores": {"FD-glyph (n = 10,000)": 1.612345}, "recipe": {"steps": 5000, "lr": 1e-3}, "note": "Made so."}
    url = hub.push(model, "me/some", packed=packed, latency=packed, **told, token="secret")
    assert url == "https://huggingface.co/me/some"
    back = sparsedm.load(hub.pull("me/some"))
    assert all(torch.equal(value, back.state_dict()[key]) for key, value in model.state_dict().items())
    text = (site / "me/some/README.md").read_text()
    assert yaml.safe_load(text.split("---")[1])["library_name"] == "diffusers"
    assert "| FD-glyph (n = 10,000) | 1.612 |" in text and "Made so." in text and 'hub.pull("me/some")' in text
    assert "- Made with steps 5000, lr 0.001." in text
    measured = re.search(r"- One step of 4 pictures: [\d.]+ ms dense(, [\d.]+ ms packed)? \(cpu, .*, \d+ threads\)\.", text)
    assert bool(measured) == packed and (not packed or bool(measured[1]) == ("2x4" in name))
    assert ("31 layers 2:4" if "2x4" in name else "dense, channels pruned") in text
    assert bool(layers.patterns(back)) == ("2x4" in name)
    assert bool(re.search("from_pretrained.*import sparsedm", text)) == (packed and "2x4" in name)
