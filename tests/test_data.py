"""Data sets repeat from their arguments, are what they say, and name what is wrong."""

import os
import pickle
import resource
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader

from sparsedm import data
from sparsedm.data import StepSampler, pictures, word_labels


def _stacked(dataset, workers=0):
    batches = list(DataLoader(dataset, batch_size=16, num_workers=workers))
    return torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches])


# --- glyphs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, channels", [("glyphs", 1), ("glyphs-rgb", 3)])
def test_glyphs_shape_range_and_balance(name, channels):
    images, labels = data.stack(data.load(name, n=108))
    assert images.shape == (108, channels, 16, 16) and images.dtype == torch.float32
    assert images.min() >= -1 and images.max() <= 1 and images.std() > 0.3
    assert labels.bincount(minlength=36).tolist() == [3] * 36
    assert data.load(name).classes == tuple("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ")


@pytest.mark.parametrize("name", ["glyphs", "glyphs-rgb"])
def test_glyphs_repeat_with_any_number_of_workers_and_in_any_order(name):
    images, labels = _stacked(data.load(name, n=48))
    with_workers = _stacked(data.load(name, n=48), workers=2)
    assert torch.equal(images, with_workers[0]) and torch.equal(labels, with_workers[1])
    backwards = data.load(name, n=100)
    assert all(torch.equal(backwards[i][0], images[i]) for i in reversed(range(48)))
    assert torch.equal(backwards[5][0], images[5])  # drawn once, then kept


def test_splits_seeds_and_items_differ():
    sets = [data.load("glyphs", n=72), data.load("glyphs", n=72, split="test"), data.load("glyphs", n=72, seed=1)]
    pictures = torch.cat([data.stack(dataset)[0] for dataset in sets])
    assert len({picture.numpy().tobytes() for picture in pictures}) == 3 * 72


def test_glyphs_are_white_ink_on_black_inside_the_picture():
    images, _ = data.stack(data.load("glyphs", n=360))
    border = torch.cat([images[..., 0, :], images[..., -1, :], images[..., 0], images[..., -1]], -1)
    assert (border < -0.9).float().mean() > 0.9
    ink = (images > 0).flatten(1).float().mean(1)
    assert ink.min() > 0.03 and ink.max() < 0.6
    assert images.amax((1, 2, 3)).min() > 0.5


def test_rgb_ink_and_paper_contrast():
    images, _ = data.stack(data.load("glyphs-rgb", n=72))
    luma = (images * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1).flatten(1)
    assert (luma.amax(1) - luma.amin(1)).min() > 0.4 and images.flatten(2).std(1).amax() > 0.1


@pytest.mark.parametrize("size", [8, 24])
def test_glyphs_come_in_other_sizes(size):
    assert data.load("glyphs", n=2, size=size)[1][0].shape == (1, size, size)


@pytest.mark.parametrize("options, message", [
    ({"n": -1}, "n=-1"), ({"size": 4}, "size=4"), ({"split": "validation"}, "'validation'"),
    ({"n": 0}, "n=0"),
])  # fmt: skip
def test_bad_glyph_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        data.load("glyphs", **options)


def test_glyphs_end():
    with pytest.raises(IndexError):
        data.load("glyphs", n=3)[3]
    assert len(list(data.load("glyphs", n=3))) == 3


# --- digits -----------------------------------------------------------------------------------------------------------


def test_digits_splits_are_disjoint_and_complete():
    bunch = load_digits()
    sets = {split: data.stack(data.load("digits", split=split)) for split in ("train", "test")}
    assert sum(len(labels) for _, labels in sets.values()) == len(bunch.target) == 1797
    assert 0.19 < len(sets["test"][1]) / 1797 < 0.21
    every = torch.cat([images for images, _ in sets.values()])
    assert every.shape == (1797, 1, 8, 8) and (every.min(), every.max()) == (-1, 1)
    key = lambda rows, targets: sorted((row.tobytes(), int(t)) for row, t in zip(rows, targets))  # noqa: E731
    found = key(((every[:, 0] + 1) * 8).numpy().round().astype(np.uint8), torch.cat([labels for _, labels in sets.values()]))
    assert found == key(bunch.images.astype(np.uint8), bunch.target)


# --- folders ----------------------------------------------------------------------------------------------------------


def _picture(path, colour=(255, 0, 0), size=(8, 8), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).convert(mode).save(path)


def test_folder_takes_its_classes_from_sub_folders(tmp_path):
    _picture(tmp_path / "red" / "a.png")
    _picture(tmp_path / "blue" / "deep" / "b.JPG", (0, 0, 255))
    _picture(tmp_path / "blue" / "c.png", (0, 0, 255), mode="RGBA")
    (tmp_path / "red" / "notes.txt").write_text("no picture")
    dataset = data.load(f"folder:{tmp_path}", size=8)
    assert len(dataset) == 3 and dataset.classes == ("blue", "red")
    assert sorted(label for _, label in dataset) == [0, 0, 1]
    for image, label in dataset:
        assert image.shape == (3, 8, 8)
        torch.testing.assert_close(image[:, 4, 4], torch.tensor([[-1.0, -1, 1], [1.0, -1, -1]])[label], rtol=0, atol=0.02)


def test_folder_without_sub_folders_is_one_class(tmp_path):
    _picture(tmp_path / "a.png", mode="L")
    dataset = data.load(f"folder:{tmp_path}")
    assert len(dataset.classes) == 1 and dataset[0][0].shape == (3, 32, 32) and dataset[0][1] == 0


@pytest.mark.parametrize("size", [(40, 20), (20, 40), (31, 20)])
def test_folder_pictures_are_resized_to_the_shorter_side_and_cropped_in_the_centre(tmp_path, size):
    array = np.zeros((size[1], size[0], 3), np.uint8)
    y, x = (size[1] - 20) // 2, (size[0] - 20) // 2
    array[y : y + 20, x : x + 20] = 255  # the central square is what remains
    Image.fromarray(array).save(tmp_path / "a.png")
    assert (data.load(f"folder:{tmp_path}", size=20)[0][0] == 1).all()
    half = data.load(f"folder:{tmp_path}", size=10)[0][0]
    assert half.shape == (3, 10, 10) and half.mean() > 0.9


def test_a_broken_picture_is_named_when_it_is_reached(tmp_path):
    _picture(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no picture")
    _picture(tmp_path / "c.png", size=(64, 64))
    (tmp_path / "c.png").write_bytes((tmp_path / "c.png").read_bytes()[:-30])
    dataset = data.load(f"folder:{tmp_path}")
    dataset[0]
    for index, name in ((1, "b.png"), (2, "c.png")):
        with pytest.raises(ValueError) as error:
            dataset[index]
        assert str(tmp_path / name) in str(error.value)


def _old_fit(image, size):
    """Resized whole, then cropped."""
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.array(resized.crop((left, top, left + size, top + size)), dtype=int)


@pytest.mark.parametrize("size", [(64, 64), (90, 50), (50, 91), (7, 40), (33, 32)])
def test_what_is_cropped_away_is_not_computed_and_the_rest_is_the_same(size):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    for target in (16, 32, 45):
        found = pictures.fit(image, target).permute(1, 2, 0).numpy().astype(int)
        difference = np.abs(found - _old_fit(image, target))
        assert difference.max() <= (2 if size[0] != size[1] else 0) and (difference > 0).mean() < 0.002  # of rounding


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc and RLIMIT_AS")
def test_a_long_picture_needs_little_memory(tmp_path):
    Image.new("L", (1, 3_000_000), 255).save(tmp_path / "a.png")
    dataset, limits = data.load(f"folder:{tmp_path}"), resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, limits[1]))  # resized whole, it would take 6 GB
    try:
        image = dataset[0][0]
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert image.shape == (3, 32, 32) and (image == 1).all()


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_grey_of_16_bits_keeps_its_shades(tmp_path, suffix):
    shades = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    Image.fromarray(shades).save(tmp_path / f"a{suffix}")
    found = data.to_uint8(data.load(f"folder:{tmp_path}", size=64)[0][0]).numpy().astype(float)
    assert np.abs(found - shades / 257).max() <= 0.51


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_grey_of_unknown_range_is_refused_by_name(tmp_path, dtype):
    Image.fromarray(np.zeros((8, 8), dtype)).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match=r"a\.tif.*32 bits.*save it with 8 or 16.*remove or replace"):
        data.load(f"folder:{tmp_path}")[0]


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_what_is_no_file_is_refused_by_name_and_not_waited_for(tmp_path, kind):
    path = tmp_path / "a.png"
    {"pipe": os.mkfifo, "device": lambda path: path.symlink_to("/dev/zero"), "folder": os.mkdir}[kind](path)
    with pytest.raises(ValueError, match=r"a\.png: it is no file; remove"):
        data.load(f"folder:{tmp_path}")[0]


def test_a_decompression_bomb_is_refused_by_name(tmp_path, monkeypatch):
    _picture(tmp_path / "a.png", size=(64, 64))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match=r"a\.png.*decompression bomb.*remove or replace"):
        data.load(f"folder:{tmp_path}")[0]


def test_an_empty_and_a_missing_folder_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no picture") as error:
        data.load(f"folder:{tmp_path}")
    assert str(tmp_path) in str(error.value)
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        data.load(f"folder:{tmp_path / 'nowhere'}")


# --- torchvision ------------------------------------------------------------------------------------------------------


def test_cifar10_is_read_from_disk(tmp_path, monkeypatch):
    """A copy of CIFAR-10 in its own format with two pictures a batch; only the checksums are waived."""
    from torchvision.datasets import cifar

    monkeypatch.setattr(cifar, "check_integrity", lambda path, md5=None: True)
    root, rng = tmp_path / "cifar-10-batches-py", np.random.default_rng(0)
    root.mkdir()
    pixels = {}
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        pixels[name] = rng.integers(0, 256, (2, 3072), dtype=np.uint8)
        (root / name).write_bytes(pickle.dumps({"data": pixels[name], "labels": [3, 7]}))
    (root / "batches.meta").write_bytes(pickle.dumps({"label_names": [str(i) for i in range(10)]}))
    train, test = (data.load("cifar10", split=split, root=tmp_path) for split in ("train", "test"))
    assert (len(train), len(test), len(train.classes)) == (10, 2, 10)
    image, label = train[3]
    assert label == 7 and image.shape == (3, 32, 32)
    assert torch.equal(data.to_uint8(image), torch.from_numpy(pixels["data_batch_2"][1].reshape(3, 32, 32)))
    assert torch.equal(data.to_uint8(test[0][0]), torch.from_numpy(pixels["test_batch"][0].reshape(3, 32, 32)))


@pytest.mark.parametrize("name, inner, size, box", [
    ("celeba", "CelebA", 64, (25, 57, 153, 185)),  # 128x128 centred at x 89, y 121 of the aligned 178x218
    ("lsun-church_outdoor", "LSUN", 256, (0, 18, 178, 200)),  # the whole width, from the middle of the height
])  # fmt: skip
def test_torchvisions_sets_are_cropped_as_the_papers_do(name, inner, size, box, tmp_path, monkeypatch):
    from torchvision import datasets

    picture = Image.new("RGB", (178, 218))
    picture.paste((255, 255, 255), box)
    asked = {}
    monkeypatch.setattr(datasets, inner, lambda root, **options: asked.update(options, root=root) or [(picture, 3)])
    image, label = data.load(name, root=tmp_path, split="test")[0]
    assert image.shape == (3, size, size) and (image == 1).all() and label == 3 and asked.pop("root") == str(tmp_path)
    assert asked == ({"classes": ["church_outdoor_val"]} if inner == "LSUN" else {"split": "test", "download": False})


@pytest.mark.parametrize("name, remedy", [("cifar10", "download=True"), ("celeba", "download=True"), ("lsun-bedroom", "by hand")])
def test_sets_that_are_not_on_disk_say_so(name, remedy, tmp_path):
    with pytest.raises(FileNotFoundError, match=remedy) as error:
        data.load(name, root=tmp_path)
    assert name in str(error.value) and str(tmp_path) in str(error.value)


def test_an_unknown_set_lists_the_known_ones_and_a_dataset_is_passed_through():
    with pytest.raises(ValueError, match="'mnist'.*glyphs.*cifar10.*folder:PATH"):
        data.load("mnist")
    dataset = data.load("digits")
    assert data.load(dataset) is dataset


# --- helpers ----------------------------------------------------------------------------------------------------------


def test_uint8_round_trip_is_exact_and_clamps():
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(data.to_uint8(data.to_float(every)), every)
    assert data.to_float(every)[[0, 255]].tolist() == [-1, 1]
    assert data.to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


def test_stack_takes_the_first_items():
    images, labels = data.stack(data.load("glyphs", n=10), 4)
    assert len(images) == 4 and labels.tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="11 items.*10"):
        data.stack(data.load("glyphs", n=10), 11)


@pytest.mark.parametrize("word, labels", [("0Z", [0, 35]), ("Abc9", [10, 11, 12, 9]), (" hi ", [17, 18])])
def test_word_labels(word, labels):
    assert word_labels(word).tolist() == labels


@pytest.mark.parametrize("word, named", [
    ("A-B!", ["'-'", "'!'"]), ("a b", ["' '"]), ("É", ["'É'"]), ("", ["empty"]), ("  ", ["empty"]),
])  # fmt: skip
def test_word_labels_name_what_cannot_be_drawn(word, named):
    with pytest.raises(ValueError, match="A-Z") as error:
        word_labels(word)
    assert all(name in str(error.value) for name in named)


# --- batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [0, 1, 5, 6, 17, 30])
def test_a_resumed_sampler_goes_on_as_the_uninterrupted_one(start):
    full = list(StepSampler(23, 4, seed=7, start=0, stop=30))
    resumed = StepSampler(23, 4, seed=7, start=start, stop=30)
    assert list(resumed) == full[start:] and len(resumed) == 30 - start


def test_an_epoch_visits_no_item_twice_and_epochs_and_seeds_differ():
    batches = list(StepSampler(23, 4, seed=0, start=0, stop=15))  # 5 batches an epoch
    epochs = [sum(batches[i : i + 5], []) for i in (0, 5, 10)]
    assert all(len(set(epoch)) == 20 and set(epoch) <= set(range(23)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert batches != list(StepSampler(23, 4, seed=1, start=0, stop=15))
    assert {i for batch in StepSampler(24, 4, seed=0, start=0, stop=6) for i in batch} == set(range(24))


def test_a_batch_larger_than_the_set_is_an_error():
    with pytest.raises(ValueError, match="batch size 5.*4 pictures"):
        StepSampler(4, 5, 0, 0, 1)


def test_the_kind_of_a_set_is_told_by_its_name():
    names = ("glyphs", "glyphs-rgb", "digits", "cifar10", "folder:glyphs", "latents:a:b")
    assert [data.kind(name) for name in names] == ["glyphs", "glyphs", "digits", "cifar10", "folder", "latents"]
