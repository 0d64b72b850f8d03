"""The classifiers' own experiments: each is trained on its data set, and its accuracy is measured on the test split."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import ModelMixin
from torch.utils.data import Dataset

from .. import data
from ..checkpoints import folders
from ..data import faces
from ..measure import sizes
from ..measure.evaluation import Progress
from ..models.classifier import FaceClassifier, GlyphClassifier
from ..support import processes
from ..support.files import write_json
from .recipes import CLASSIFIERS
from .results import RESULTS, RESULTS_FILE

TEST_PICTURES = 10_000


@dataclass(frozen=True)
class _Reader:
    """How a classifier is made and what it learns.

    Attributes:
        make: gives the untrained model.
        data: the name of the data set.
        label: what picture i of the data set shows, as the model's `loss` takes it.
        steps: of the training.
        reads: what it reads, in words.
    """

    make: Callable[[], ModelMixin]
    data: str
    label: Callable[[Dataset, int], torch.Tensor]
    steps: int
    reads: str


_VALUES = tuple(map(len, faces.ATTRIBUTES.values()))
_READERS = {
    "glyph-classifier": _Reader(GlyphClassifier, "glyphs", lambda d, i: torch.tensor(d[i][1]), 3000, "16x16 glyphs"),
    "face-classifier": _Reader(
        lambda: FaceClassifier(options=_VALUES), "faces", lambda d, i: faces.row(d.face(i)), 2000, "the attributes of faces"
    ),
}
assert tuple(_READERS) == CLASSIFIERS


def reproduce(name: str, folder: Path, bundle: bool) -> Iterator[Progress]:
    """Train a classifier and measure its accuracy on the test split.

    A generator that returns the result; {} in other processes than the main one.
    """
    if not processes.is_main():
        return {}
    reader = _READERS[name]
    torch.manual_seed(0)
    model = reader.make()
    for step, loss in enumerate(fit(model, data.load(reader.data), reader.label, steps=reader.steps), 1):
        if step % 50 == 0:
            yield Progress("train", step, reader.steps, f"loss {loss:.4f}")
    folders.save(model, folder / "model", torch.float16)
    accuracy = _accuracy(folders.load(folder / "model"), reader)
    result = {
        "name": name, "command": f"python -m sparsedm reproduce {name}", "n": TEST_PICTURES, **accuracy,
        "parameters": sizes.parameters(model), "train": {"steps": reader.steps, "batch_size": 128},
    }  # fmt: skip
    write_json(folder / RESULTS_FILE, result)
    if bundle:
        write_json(RESULTS / f"{name}.json", result)
        folders.save(folders.load(folder / "model"), folders.ASSETS / name, torch.float16, card=_card(result, reader))
    yield Progress("done", 1, 1, f"accuracy {result['accuracy']:.4f}")
    return result


def _accuracy(model: ModelMixin, reader: _Reader) -> dict:
    """The share read right on the test split: "accuracy" and, with several attributes, their own "accuracies"."""
    dataset = data.load(reader.data, split="test", n=TEST_PICTURES)
    images, labels = zip(*((dataset[i][0], reader.label(dataset, i)) for i in range(TEST_PICTURES)))
    labels = torch.stack(labels)
    with torch.no_grad():
        right = torch.cat([model.read(x) for x in torch.stack(images).split(1000)]) == labels
    result = {"accuracy": right[labels >= 0].float().mean().item()}
    if labels.dim() == 2:
        each = zip(right.unbind(1), (labels >= 0).unbind(1))
        result["accuracies"] = dict(zip(faces.ATTRIBUTES, (hits[shown].float().mean().item() for hits, shown in each)))
    return result


def _card(result: dict, reader: _Reader) -> str:
    text = f"# {result['name']}\n\nReads {reader.reads}; {result['accuracy']:.2%} right on {result['n']:,} test pictures.\n\n"
    return f"{text}Made by `{result['command']}`. Licence: MIT, as the package.\n"


def fit(
    model: ModelMixin,
    dataset: Dataset,
    label: Callable[[Dataset, int], torch.Tensor],
    *,
    steps: int,
    batch_size: int = 128,
    lr: float = 3e-3,
    seed: int = 0,
) -> Iterator[float]:
    """Train `model` on labelled pictures, yielding the loss of every step; the model is in eval mode at the end."""
    optimizer = torch.optim.AdamW(model.parameters(), lr)
    decay = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps)
    model.train()
    for indices in data.StepSampler(len(dataset), batch_size, seed, 0, steps):
        images = torch.stack([dataset[i][0] for i in indices])
        loss = model.loss(images, torch.stack([label(dataset, i) for i in indices]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
        yield loss.item()
    model.eval()
