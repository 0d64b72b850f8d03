"""The glyph classifier's own experiment: trained, and its accuracy measured on the test split."""

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from .. import data
from ..checkpoints import folders
from ..measure import sizes
from ..measure.evaluation import Progress
from ..models.classifier import GlyphClassifier
from ..support import processes
from ..support.files import write_json
from .recipes import CLASSIFIER
from .results import RESULTS, RESULTS_FILE


def reproduce(folder: Path, bundle: bool) -> Iterator[Progress]:
    """Train the glyph classifier and measure its accuracy on the test split.

    A generator that returns the result; {} in other processes than the main one.
    """
    if not processes.is_main():
        return {}
    torch.manual_seed(0)
    model, steps = GlyphClassifier(), 3000
    for step, loss in enumerate(fit(model, data.load("glyphs"), steps=steps), 1):
        if step % 50 == 0:
            yield Progress("train", step, steps, f"loss {loss:.4f}")
    folders.save(model, folder / "model", torch.float16)
    model = folders.load(folder / "model")
    images, labels = data.stack(data.load("glyphs", split="test", n=10_000))
    with torch.no_grad():
        accuracy = (torch.cat([model(x).argmax(1) for x in images.split(1000)]) == labels).float().mean().item()
    result = {
        "name": CLASSIFIER, "command": f"python -m sparsedm reproduce {CLASSIFIER}", "accuracy": accuracy, "n": len(images),
        "parameters": sizes.parameters(model), "train": {"steps": steps, "batch_size": 128},
    }  # fmt: skip
    write_json(folder / RESULTS_FILE, result)
    if bundle:
        write_json(RESULTS / f"{CLASSIFIER}.json", result)
        text = f"# {CLASSIFIER}\n\nReads 16x16 glyphs; {accuracy:.2%} right on {len(images):,} test glyphs.\n\n"
        text += f"Made by `{result['command']}`. Licence: MIT, as the package.\n"
        folders.save(model, folders.ASSETS / CLASSIFIER, torch.float16, card=text)
    yield Progress("done", 1, 1, f"accuracy {accuracy:.4f}")
    return result


def fit(
    model: GlyphClassifier, dataset: Dataset, *, steps: int, batch_size: int = 128, lr: float = 3e-3, seed: int = 0
) -> Iterator[float]:
    """Train `model` on labelled glyphs, yielding the loss of every step; the model is in eval mode at the end."""
    optimizer = torch.optim.AdamW(model.parameters(), lr)
    decay = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps)
    model.train()
    for indices in data.StepSampler(len(dataset), batch_size, seed, 0, steps):
        items = [dataset[i] for i in indices]
        images, labels = torch.stack([image for image, _ in items]), torch.tensor([label for _, label in items])
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
        yield loss.item()
    model.eval()
