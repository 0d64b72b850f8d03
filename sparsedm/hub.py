"""Model folders on the Hugging Face hub: pushed with a card that says what they are, pulled as folders for `sparsedm.load`."""

import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import ModelMixin
from huggingface_hub import HfApi, snapshot_download

from . import layers, macs
from .models import zoo

_FILES = [zoo.CONFIG, zoo.WEIGHTS, zoo.INDEX, zoo.SHARDS, zoo.PACKED, "README.md"]


def push(
    model: ModelMixin,
    repo: str,
    *,
    packed: bool = False,
    dtype: torch.dtype | None = torch.float16,
    scores: Mapping[str, object] | None = None,
    note: str = "",
    private: bool = False,
    token: str | None = None,
) -> str:
    """Save the model, folded or `packed`, with a card, and upload the folder to the repository "user/name"; returns its URL.

    Args:
        scores, note: for the card: measured values by name, and how it was made.
        token: by default that of `hf auth login`.

    Raises:
        huggingface_hub.errors.HfHubHTTPError: the hub refused.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "model")
        zoo.save(model, folder, dtype, packed=packed)
        (folder / "README.md").write_text(card(zoo.load(folder), repo, scores, note, zoo.bytes_of(folder)))
        api = HfApi(token=token)
        api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload with sparsedm")
    return f"https://huggingface.co/{repo}"


def pull(repo: str, *, revision: str | None = None, token: str | None = None) -> Path:
    """Download a repository's model folder into the hub's cache; `sparsedm.load` reads it, and checks packed files."""
    return Path(snapshot_download(repo, revision=revision, allow_patterns=_FILES, token=token))


def card(
    model: ModelMixin, repo: str, scores: Mapping[str, object] | None = None, note: str = "", size: int | None = None
) -> str:
    """A model card (Markdown with the hub's header)."""
    counts, found = macs.count(model), Counter(map(str, layers.patterns(model).values()))
    parameters = sum(p.numel() for p in model.parameters())
    nonzero = sum(int(p.count_nonzero()) for p in model.parameters())
    patterns = ", ".join(f"{count} layers {pattern}" for pattern, count in found.most_common()) or "dense"
    pruned = ", channels pruned" if getattr(model.config, "pruning", None) else ""
    table = ["| score | value |", "|---|---|", *(f"| {name} | {_cell(value)} |" for name, value in (scores or {}).items()), ""]
    lines = [
        "---", "library_name: diffusers", "tags: [sparsedm, diffusion, sparse]", "---", "", f"# {repo.split('/')[-1]}", "",
        *([note, ""] if note else []),
        f"- {type(model).__name__}: {patterns}{pruned}; the zeros were verified.",
        f"- {parameters:,} parameters, {nonzero:,} of them not zero" + (f"; {size:,} bytes." if size else "."),
        f"- MACs per picture and step: {counts.dense:,} dense, {counts.sparse:,} with zeros skipped.", "",
        *(table if scores else []),
        "```python", "import sparsedm", "from sparsedm import hub", "", f'model = sparsedm.load(hub.pull("{repo}"))',
        "fast = sparsedm.pack(model)", "```", "",
    ]  # fmt: skip
    return "\n".join(lines)


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
