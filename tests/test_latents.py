"""Latents: encoded once, read back, decoded."""

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch.utils.data import TensorDataset

from sparsedm import data
from sparsedm.data import latents
from sparsedm.models.uvit import UViTModel
from sparsedm.training import distill


@pytest.fixture
def vae():
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, scaling_factor=0.5, **blocks).eval()


@pytest.fixture
def pictures():
    images = torch.rand(10, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return TensorDataset(images, torch.arange(10))


def test_latents_are_written_in_shards_and_read_back(vae, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(latents, "SHARD", 4)
    assert list(latents.encode(vae, pictures, tmp_path, batch_size=3)) == [4, 8, 10]
    found = data.load(f"latents:{tmp_path}")
    assert len(found) == 10 and (found.channels, found.size) == (4, 8)
    assert [label for _, label in found] == list(range(10))
    with torch.no_grad():
        expected = vae.encode(pictures[5][0][None]).latent_dist
    latent = found[5][0]
    assert ((latent / 0.5 - expected.mean[0]).abs() < 5 * expected.std[0] + 1e-2).all()
    assert latents.decode(vae, latent[None]).shape == (1, 3, 16, 16)
    torch.testing.assert_close(latents.decode(vae, expected.mean * 0.5), vae.decode(expected.mean).sample.clamp(-1, 1).detach())


def test_a_killed_encoding_goes_on_with_the_same_latents(vae, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(latents, "SHARD", 4)
    list(latents.encode(vae, pictures, tmp_path / "whole"))
    states = latents.encode(vae, pictures, tmp_path / "broken")
    next(states)
    states.close()
    first = (tmp_path / "broken" / "00000000.safetensors").stat().st_mtime_ns
    list(latents.encode(vae, pictures, tmp_path / "broken"))
    assert (tmp_path / "broken" / "00000000.safetensors").stat().st_mtime_ns == first
    whole, broken = (data.load(f"latents:{tmp_path / name}") for name in ("whole", "broken"))
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(whole, broken, strict=True))


def test_text_comes_with_its_latents(tmp_path):
    save_file({"latents": torch.zeros(2, 4, 8, 8), "encoder_hidden_states": torch.ones(2, 5, 6)}, tmp_path / "0.safetensors")
    assert data.load(f"latents:{tmp_path}").null == {}
    save_file({"encoder_hidden_states": torch.zeros(5, 6)}, tmp_path / "null.safetensors")
    found = data.load(f"latents:{tmp_path}")
    assert len(found) == 2 and found.null["encoder_hidden_states"].shape == (5, 6)
    assert found[1][1]["encoder_hidden_states"].shape == (5, 6)


def test_training_drops_texts_as_often_as_asked(tmp_path):
    save_file({"latents": torch.zeros(8, 4, 8, 8), "encoder_hidden_states": torch.ones(8, 5, 6)}, tmp_path / "0.safetensors")
    save_file({"encoder_hidden_states": torch.zeros(5, 6)}, tmp_path / "null.safetensors")
    config = {"in_channels": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "context_dim": 6, "context_tokens": 5}
    model, seen = UViTModel(sample_size=8, **config), []
    model.register_forward_pre_hook(lambda module, args, given: seen.append(given["encoder_hidden_states"]), with_kwargs=True)
    for p_uncond, low, high in ((0.0, 0, 0), (0.5, 30, 98), (1.0, 128, 128)):
        seen.clear()
        list(distill.train(model, f"latents:{tmp_path}", steps=16, batch_size=8, p_uncond=p_uncond))
        empty = sum(int((text.flatten(1) == 0).all(1).sum()) for text in seen)
        assert low <= empty <= high and all(((text == 0) | (text == 1)).all() for text in seen)


def test_folders_without_latents_are_refused_by_name(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no latents; sparsedm\.data\.latents\.encode"):
        data.load(f"latents:{tmp_path}")
    save_file({"latents": torch.zeros(2, 4, 8, 8)}, tmp_path / "0.safetensors")
    with pytest.raises(ValueError, match=r"0\.safetensors lacks latents, or their labels"):
        data.load(f"latents:{tmp_path}")
    (tmp_path / "0.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"0\.safetensors is not a readable"):
        data.load(f"latents:{tmp_path}")
    (tmp_path / "0.safetensors").unlink()
    save_file({"latents": torch.zeros(2, 4, 8, 8), "labels": torch.zeros(2)}, tmp_path / "1.safetensors")
    wrong = {
        r"2\.safetensors holds latents or texts of another shape than 1": {
            "latents": torch.zeros(2, 3, 8, 8),
            "labels": torch.zeros(2),
        },
        r"2\.safetensors: latents \[4, 8\] are not \[n, C, h, w\]": {"latents": torch.zeros(4, 8), "labels": torch.zeros(4)},
        r"2\.safetensors: its labels \[2\] are not \[n\] from 0 on; remove it": {
            "latents": torch.zeros(2, 4, 8, 8),
            "labels": torch.tensor([1, -1]),
        },
        r"2\.safetensors: its labels \[2, 3\] are not": {"latents": torch.zeros(2, 4, 8, 8), "labels": torch.zeros(2, 3)},
        r"2\.safetensors: .* or \[3\] is not theirs": {"latents": torch.zeros(2, 4, 8, 8), "labels": torch.zeros(3)},
    }
    for message, content in wrong.items():
        save_file(content, tmp_path / "2.safetensors")
        with pytest.raises(ValueError, match=message):
            data.load(f"latents:{tmp_path}")
    (tmp_path / "2.safetensors").unlink()
    found = data.load(f"latents:{tmp_path}")
    remedies = {"null": "encode the empty text", "1": "remove it and encode it anew"}
    for name, remedy in remedies.items():  # damaged before the file is opened, and after
        (tmp_path / f"{name}.safetensors").write_bytes(b"damaged")
        with pytest.raises(ValueError, match=rf"{name}\.safetensors is not a readable .*{remedy}"):
            data.load(f"latents:{tmp_path}") if name == "null" else found[0]


def test_an_empty_text_unlike_the_texts_is_refused_by_name(tmp_path):
    save_file({"latents": torch.zeros(2, 4, 8, 8), "encoder_hidden_states": torch.ones(2, 5, 6)}, tmp_path / "0.safetensors")
    for wrong in ({"text": torch.zeros(5, 6)}, {"encoder_hidden_states": torch.zeros(5, 7)}, {}):
        save_file(wrong, tmp_path / "null.safetensors")
        with pytest.raises(ValueError, match=r"null\.safetensors holds .* \[5, 6\]; encode the empty text .*remove"):
            data.load(f"latents:{tmp_path}")


def test_texts_of_several_shapes_are_refused_by_name(tmp_path):
    for i, tokens in enumerate((5, 4)):
        text = torch.ones(2, tokens, 6)
        save_file({"latents": torch.zeros(2, 4, 8, 8), "encoder_hidden_states": text}, tmp_path / f"{i}.safetensors")
    with pytest.raises(ValueError, match=r"1\.safetensors holds latents or texts of another shape than 0"):
        data.load(f"latents:{tmp_path}")


def test_latents_that_do_not_fit_the_model_are_refused_before_training(tmp_path):
    config = {"in_channels": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 11}
    wrong = {
        rf"takes latents of 16x16, {tmp_path} holds 8x8; encode": (16, 9),
        rf"10 classes .*the data set 12 in {tmp_path}; take a model with more classes": (8, 11),
        rf"the data set 11 in {tmp_path}; .*p_uncond=0": (8, 10),
        r"0\.safetensors: its labels \[4\] are not \[n\] from 0 on": (8, -1),
    }
    for message, (size, label) in wrong.items():
        labels = torch.full((4,), label)
        save_file({"latents": torch.zeros(4, 4, 8, 8), "labels": labels}, tmp_path / "0.safetensors")
        with pytest.raises(ValueError, match=message):
            next(distill.train(UViTModel(sample_size=size, **config), f"latents:{tmp_path}", steps=1, batch_size=4))


def test_a_flipped_bit_in_encoded_latents_is_named_and_encoded_anew(vae, pictures, tmp_path):
    list(latents.encode(vae, pictures, tmp_path))
    path = tmp_path / "00000000.safetensors"
    whole = path.read_bytes()
    offset = 8 + int.from_bytes(whole[:8], "little") + 5 * 4 * 8 * 8 * 2
    path.write_bytes(whole[:offset] + bytes([whole[offset] ^ 1]) + whole[offset + 1 :])
    for read in (data.load(f"latents:{tmp_path}").__getitem__, lambda i: data.load(f"latents:{tmp_path}")[i]):
        with pytest.raises(ValueError, match=rf"{path}: \w+ is damaged .*remove it and encode it anew"):
            read(0)
    path.unlink()
    list(latents.encode(vae, pictures, tmp_path))
    assert path.read_bytes() == whole
