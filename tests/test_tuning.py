"""Times are measured once, remembered in a file, and kept apart by what they depend on."""

import json

import pytest
import torch

from sparsedm.packing import kernels, tuning
from sparsedm.support import latency

pytestmark = pytest.mark.skipif(not kernels.available(), reason="no C++ compiler")


@pytest.fixture
def file(tmp_path, monkeypatch):
    path = tmp_path / "times.json"
    monkeypatch.setattr(tuning, "path", lambda: path)
    monkeypatch.setattr(tuning, "known", {})
    monkeypatch.setattr(tuning, "under_load", lambda: False)
    return path


def variants(calls: list):
    """Two calls of which the packed one does a tenth of the work; `calls` counts how often they were asked for."""
    calls.append(1)
    small, large = torch.randn(100, 100), torch.randn(400, 400)
    return {"dense": lambda: large @ large, "packed": lambda: small @ small}


@pytest.mark.alone
def test_measured_once_and_remembered_by_the_next_process(file, monkeypatch):
    calls = []
    found = tuning.times(("layer", 1), lambda: variants(calls))
    assert found.gain > 1 and found.dense > found.packed > 0
    assert tuning.times(("layer", 1), lambda: variants(calls)) == found
    monkeypatch.setattr(tuning, "known", {})  # as in a new process
    assert tuning.times(("layer", 1), lambda: variants(calls)) == found and len(calls) == 1


def test_times_taken_under_load_are_measured_anew_by_the_next_process(file, monkeypatch):
    calls = []
    monkeypatch.setattr(tuning, "under_load", lambda: True)
    tuning.times(("layer", 1), lambda: variants(calls))
    monkeypatch.setattr(tuning, "under_load", lambda: False)
    tuning.times(("layer", 2), lambda: variants(calls))
    tuning.times(("layer", 1), lambda: variants(calls))
    assert len(calls) == 2 and len(json.loads(file.read_text())) == 1
    monkeypatch.setattr(tuning, "known", {})
    tuning.times(("layer", 1), lambda: variants(calls))
    assert len(calls) == 3


@pytest.mark.parametrize(("packed", "rounds"), [([2.0] * 9, 9), ([2.0, 0.5] * 5, 36)])
def test_rounds_that_disagree_are_followed_by_more(file, monkeypatch, packed, rounds):
    asked = []

    def interleaved(variants, rounds):
        asked.append(rounds)
        return {"dense": latency.Timing((1.0,) * len(packed)), "packed": latency.Timing(tuple(packed))}

    monkeypatch.setattr(latency, "interleaved", interleaved)
    tuning.times(("layer", 1), lambda: {})
    assert asked[-1] == rounds


def test_other_keys_and_threads_are_measured_anew(file):
    calls, threads = [], torch.get_num_threads()
    tuning.times(("layer", 1), lambda: variants(calls))
    tuning.times(("layer", 2), lambda: variants(calls))
    try:
        torch.set_num_threads(threads + 1)
        tuning.times(("layer", 1), lambda: variants(calls))
    finally:
        torch.set_num_threads(threads)
    assert len(calls) == 3 and len(json.loads(file.read_text())) == 3


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"a": 1}', '{"a": {"dense": 1}}', '{"a": {"dense": 1, "packed": 1, "gain": null}}']
)
def test_a_damaged_file_is_measured_over(file, content):
    file.write_text(content)
    calls = []
    tuning.times(("layer", 1), lambda: variants(calls))
    assert len(calls) == 1 and len(json.loads(file.read_text())) == 1


def test_a_folder_that_cannot_be_written_is_no_error(file, monkeypatch):
    monkeypatch.setattr(tuning, "path", lambda: file / "below" / "a-file.json")
    file.write_text("{}")
    assert tuning.times(("layer", 1), lambda: variants([])).gain > 0
