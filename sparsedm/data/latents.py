"""Pictures as an autoencoder's latents: encoded once into a folder, read from there in training, decoded for people."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors import SafetensorError, safe_open
from torch.utils.data import DataLoader, Dataset

from ..support import seeds, tensorfiles
from ..support.files import replacing

NULL = "null.safetensors"
SHARD = 4096  # pictures per file
TEXT = "encoder_hidden_states"
_ANEW = "remove it and encode it anew"  # `encode` keeps the files that are there
_ANEW_NULL = "encode the empty text as the other texts, or remove the file"


class Latents(Dataset):
    """The latents in a folder of safetensors files, read from disk one by one, as (latent [C, h, w] in float32, label).

    Each file has "latents" [n, C, h, w], already scaled, and "labels" [n]. In a file with "encoder_hidden_states"
    [n, tokens, dim] a dict of these takes the place of the label. A further file null.safetensors holds the
    "encoder_hidden_states" [tokens, dim] of the empty text, for text dropped in training, and for guidance.

    Attributes:
        folder: the folder of the files.
        files: the files of the latents, in order, and null.safetensors, if it is there.
        channels: C of the latents.
        size: h and w of the latents.
        null: the tensors in null.safetensors by name, {} without the file.
        classes: the labels from 0 to the highest; () with texts.

    Raises:
        FileNotFoundError: no such folder, or no safetensors file in it.
        ValueError: a file that cannot be read, lacks latents or labels, has labels below 0, or whose latents or texts have
            another shape than those beside (named). Checksums are compared when a file is first read from.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        paths = sorted(path for path in self.folder.glob("*.safetensors") if path.name != NULL)
        if not paths:
            raise FileNotFoundError(f"{self.folder} holds no latents; sparsedm.data.latents.encode writes them")
        shapes = {path: _shape(path) for path in paths}
        (_, self.channels, _, self.size), text = first = shapes[paths[0]]
        for path, (latents, own) in shapes.items():
            if (latents[1:], own) != (first[0][1:], text):
                raise ValueError(f"{path} holds latents or texts of another shape than {paths[0].name}; {_ANEW}")
        self._entries = [(path, i) for path in paths for i in range(shapes[path][0][0])]
        self._checked = set()
        self.files = [*paths, *self.folder.glob(NULL)]
        self.classes = () if text else range(1 + max(map(_highest_label, paths)))
        self.null = _null(self.folder / NULL, text) if (self.folder / NULL).exists() else {}

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int):
        path, i = self._entries[index]
        if path not in self._checked:
            tensorfiles.read(path, _ANEW)
            self._checked.add(path)
        with _opened(path) as file:
            latent = file.get_slice("latents")[i : i + 1][0].float()
            if TEXT in file.keys():  # noqa: SIM118 - safe_open is no dict
                return latent, {TEXT: file.get_slice(TEXT)[i : i + 1][0].float()}
            return latent, int(file.get_slice("labels")[i : i + 1][0])


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    try:
        with safe_open(path, "pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error}); {_ANEW}") from error


def _shape(path: Path) -> tuple[list[int], list[int]]:
    """[n, C, h, w] of the latents in a file and [tokens, dim] of their texts, [] without texts.

    Raises ValueError, with the name of the file, if a tensor is missing.
    """
    with _opened(path) as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    latents, conditions = shapes.get("latents"), shapes.get(TEXT) or shapes.get("labels")
    if latents is None or conditions is None:
        raise ValueError(f"{path} lacks latents, or their labels or encoder_hidden_states")
    if len(latents) != 4 or conditions[:1] != latents[:1]:
        raise ValueError(f"{path}: latents {latents} are not [n, C, h, w], or {conditions} is not theirs; {_ANEW}")
    return latents, conditions[1:] if TEXT in shapes else []


def _highest_label(path: Path) -> int:
    """-1 without labels. Raises ValueError, with the name of the file, for labels that are not [n] or below 0."""
    with _opened(path) as file:
        labels = file.get_tensor("labels")
    if labels.dim() != 1 or (labels < 0).any():
        raise ValueError(f"{path}: its labels {list(labels.shape)} are not [n] from 0 on; {_ANEW}")
    return int(labels.max()) if len(labels) else -1


def _null(path: Path, text: list[int]) -> dict[str, torch.Tensor]:
    """The tensors of the empty text. Raises ValueError if their names or shapes are not those of the texts [tokens, dim]."""
    tensors, _ = tensorfiles.read(path, _ANEW_NULL)
    found = {name: list(tensor.shape) for name, tensor in tensors.items()}
    if text and found != {TEXT: text}:
        raise ValueError(f"{path} holds {found}, and the texts beside are {TEXT} {text}; {_ANEW_NULL}")
    return {name: tensor.clone() for name, tensor in tensors.items()}


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
                tensorfiles.save(temporary, {"latents": torch.cat(latents).contiguous(), "labels": torch.cat(labels)})
        yield stop


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """The pictures [n, C, H, W] in [-1, 1] of scaled latents [n, c, h, w]."""
    latents = latents.to(vae.device, vae.dtype) / vae.config.scaling_factor
    return vae.decode(latents).sample.float().clamp(-1, 1)
