"""Latents: encoded once, read back, decoded."""

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch.utils.data import TensorDataset

from sparsedm import data, latents


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
    _, conditions = data.load(f"latents:{tmp_path}")[1]
    assert conditions["encoder_hidden_states"].shape == (5, 6)


def test_folders_without_latents_are_refused_by_name(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no latents; sparsedm\.latents\.encode"):
        data.load(f"latents:{tmp_path}")
    save_file({"latents": torch.zeros(2, 4, 8, 8)}, tmp_path / "0.safetensors")
    with pytest.raises(ValueError, match=r"0\.safetensors lacks latents, or their labels"):
        data.load(f"latents:{tmp_path}")
    (tmp_path / "0.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"0\.safetensors is not a readable"):
        data.load(f"latents:{tmp_path}")
