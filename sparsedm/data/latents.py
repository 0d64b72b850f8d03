"""Pictures as an autoencoder's latents: encoded once into a folder, read from there in training, decoded for people."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Dataset

from ..support import seeds
from ..support.files import replacing

NULL = "null.safetensors"
SHARD = 4096  # pictures per file


class Latents(Dataset):
    """The latents in a folder of safetensors files, read from disk one by one, as (latent [C, h, w] in float32, label).

    Each file has "latents" [n, C, h, w], already scaled, and "labels" [n]. In a file with "encoder_hidden_states"
    [n, tokens, dim] a dict of these takes the place of the label. A further file null.safetensors holds the
    "encoder_hidden_states" [tokens, dim] of the empty text, for text dropped in training, and for guidance.

    Attributes:
        folder: the folder of the files.
        channels: C of the latents.
        size: h and w of the latents.
        null: the tensors in null.safetensors by name, {} without the file.

    Raises:
        FileNotFoundError: no such folder, or no safetensors file in it.
        ValueError: a file that cannot be read, lacks latents or labels, or whose latents have another shape (named).
    """

    classes = ()

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        paths = sorted(path for path in self.folder.glob("*.safetensors") if path.name != NULL)
        if not paths:
            raise FileNotFoundError(f"{self.folder} holds no latents; sparsedm.data.latents.encode writes them")
        shapes = {path: _shape(path) for path in paths}
        _, self.channels, _, self.size = first = shapes[paths[0]]
        if others := [path for path in paths if shapes[path][1:] != first[1:]]:
            raise ValueError(f"{others[0]} holds latents of another shape than {paths[0].name}; encode them anew")
        self._entries = [(path, i) for path in paths for i in range(shapes[path][0])]
        self.null = {}
        if (self.folder / NULL).exists():
            with _opened(self.folder / NULL) as file:
                self.null = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - safe_open is no dict

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int):
        path, i = self._entries[index]
        with _opened(path) as file:
            latent = file.get_slice("latents")[i : i + 1][0].float()
            if "encoder_hidden_states" in file.keys():  # noqa: SIM118 - safe_open is no dict
                return latent, {"encoder_hidden_states": file.get_slice("encoder_hidden_states")[i : i + 1][0].float()}
            return latent, int(file.get_slice("labels")[i : i + 1][0])


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    try:
        with safe_open(path, "pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error}); encode it anew") from error


def _shape(path: Path) -> list[int]:
    """[n, C, h, w] of the latents in a file. Raises ValueError, with the name of the file, if a tensor is missing."""
    with _opened(path) as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    latents, conditions = shapes.get("latents"), shapes.get("encoder_hidden_states") or shapes.get("labels")
    if latents is None or conditions is None:
        raise ValueError(f"{path} lacks latents, or their labels or encoder_hidden_states")
    if len(latents) != 4 or conditions[:1] != latents[:1]:
        raise ValueError(f"{path}: latents {latents} are not [n, C, h, w], or {conditions} is not theirs; encode them anew")
    return latents


def autoencoder(folder: str | Path) -> AutoencoderKL:
    """The autoencoder in a folder. Raises ValueError if there is no such folder, where diffusers would ask the hub."""
    if not Path(folder).is_dir():
        raise ValueError(f"{folder} is no folder of an autoencoder")
    return AutoencoderKL.from_pretrained(folder).eval()


@torch.no_grad()
def encode(vae: AutoencoderKL, dataset: Dataset, folder: str | Path, *, batch_size: int = 32, seed: int = 0) -> Iterator[int]:
    """Write the scaled latents of pictures in [-1, 1] and their labels to `folder`, in float16; yields how many are done.

    One latent of each picture is drawn, from (seed, number of the picture) alone. Files that are there already are kept: a run
    that was killed goes on.
    """
    folder, vae = Path(folder), vae.eval()
    for start in range(0, len(dataset), SHARD):
        stop, path = min(start + SHARD, len(dataset)), folder / f"{start:08d}.safetensors"
        if not path.exists():
            loader = DataLoader(torch.utils.data.Subset(dataset, range(start, stop)), batch_size)
            latents, labels = [], []
            for images, their_labels in loader:
                generator = torch.Generator().manual_seed(seeds.numbered(seed, start + sum(map(len, labels))))
                drawn = vae.encode(images.to(vae.device, vae.dtype)).latent_dist.sample(generator)
                latents.append((drawn * vae.config.scaling_factor).half().cpu())
                labels.append(their_labels)
            with replacing(path) as temporary:
                save_file({"latents": torch.cat(latents).contiguous(), "labels": torch.cat(labels)}, temporary)
        yield stop


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """The pictures [n, C, H, W] in [-1, 1] of scaled latents [n, c, h, w]."""
    latents = latents.to(vae.device, vae.dtype) / vae.config.scaling_factor
    return vae.decode(latents).sample.float().clamp(-1, 1)
