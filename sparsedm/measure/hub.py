"""Model folders on the Hugging Face hub: pushed with a model card, pulled for `sparsedm.load`."""

import copy
import platform
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import ModelMixin
from huggingface_hub import HfApi, snapshot_download

from ..checkpoints import folders
from ..masking import layers
from ..models.denoisers import example_inputs
from ..packing.packed import pack
from ..support.latency import interleaved
from . import cards, macs, sizes

_FILES = [folders.CONFIG, folders.WEIGHTS, folders.INDEX, folders.SHARDS, folders.PACKED, "README.md"]


def push(
    model: ModelMixin,
    repo: str,
    *,
    packed: bool = False,
    dtype: torch.dtype | None = torch.float16,
    scores: Mapping[str, object] | None = None,
    recipe: Mapping[str, object] | None = None,
    latency: bool = False,
    note: str = "",
    private: bool = False,
    token: str | None = None,
) -> str:
    """Save the model, folded or `packed`, with a card, and upload the folder to the repository "user/name"; returns its URL.

    Args:
        packed: save the weights without their zeros.
        dtype: of the saved weights, by default float16; None keeps their own dtype, as `sparsedm.save` and `save_packed` do.
        scores: measured values by name, for the card.
        recipe: settings of the training by name, for the card.
        latency: measure one sampling step on this machine, for the card.
        note: further text for the card.
        private: make a private repository.
        token: of the hub, by default the token of `hf auth login`.

    Raises:
        huggingface_hub.errors.HfHubHTTPError: the hub refused.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "model")
        folders.save(model, folder, dtype, packed=packed)
        saved = folders.load(folder)
        time = step_time(saved) if latency else ""
        size, packed = folders.bytes_of(folder), "quantization_config" in folders.read_json(folder / folders.CONFIG)
        (folder / folders.CARD).write_text(card(saved, repo, scores, note, size, recipe, time, packed))
        api = HfApi(token=token)
        api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload with sparsedm")
    return f"https://huggingface.co/{repo}"


def pull(repo: str, *, revision: str | None = None, token: str | None = None) -> Path:
    """Download a repository's model folder into the hub's cache; `sparsedm.load` reads it, and checks packed files."""
    return Path(snapshot_download(repo, revision=revision, allow_patterns=_FILES, token=token))


def step_time(model: ModelMixin, batch: int = 4, rounds: int = 15) -> str:
    """The milliseconds of one call for `batch` pictures, dense and packed, measured on this machine, in a sentence."""
    inputs, variants = example_inputs(model, batch), {"dense": model}
    if layers.patterns(model):
        variants["packed"] = pack(copy.deepcopy(model), batch=batch)
    calls = {name: lambda variant=variant: variant(**inputs) for name, variant in variants.items()}
    with torch.no_grad():
        times = interleaved(calls, rounds=rounds)
    steps = ", ".join(f"{time.median * 1e3:.2f} ms {name}" for name, time in times.items())
    return (
        f"One step of {batch} pictures: {steps} ({model.device.type}, {platform.machine()}, {torch.get_num_threads()} threads)."
    )


def card(
    model: ModelMixin,
    repo: str,
    scores: Mapping[str, object] | None = None,
    note: str = "",
    size: int | None = None,
    recipe: Mapping[str, object] | None = None,
    time: str = "",
    packed: bool = False,
) -> str:
    """A model card (Markdown with the hub's header).

    Args:
        scores: measured values by name.
        note: further text.
        size: bytes of the saved weights.
        recipe: settings of the training by name.
        time: the sentence of `step_time`.
        packed: whether weights are saved without their zeros.
    """
    counts, patterns = macs.count(model), Counter(map(str, layers.patterns(model).values()))
    kinds = ", ".join(f"{count} layers {pattern}" for pattern, count in patterns.most_common()) or "dense"
    weights = cards.weights(sizes.parameters(model), sizes.nonzero(model))
    pruned = ", channels pruned" if getattr(model.config, "pruning", None) else ""
    lines = [
        "---", "library_name: diffusers", "tags: [sparsedm, diffusion, sparse]", "---", "", f"# {repo.split('/')[-1]}", "",
        *([note, ""] if note else []),
        f"- {type(model).__name__}: {kinds}{pruned}; the zeros were verified.",
        f"- {weights}" + (f"; {size:,} bytes." if size else "."),
        f"- {cards.macs(counts.dense, counts.sparse)}",
        *([f"- {time}"] if time else []),
        *([f"- Made with {', '.join(f'{name} {value}' for name, value in recipe.items())}."] if recipe else []), "",
        *([cards.scores(scores), ""] if scores else []),
        "```python", "import sparsedm", "from sparsedm.measure import hub", "", f'model = sparsedm.load(hub.pull("{repo}"))',
        "fast = sparsedm.pack(model)", "```", "",
        *(["The weights are packed: diffusers' `from_pretrained` reads them after `import sparsedm`.", ""]
          if packed and not pruned else []),
    ]  # fmt: skip
    return "\n".join(lines)
