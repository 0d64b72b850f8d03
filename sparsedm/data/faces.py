"""Cartoon faces, drawn from a seed, each with a description as tokens: a text-to-image data set that needs no download."""

import itertools
from collections.abc import Mapping

import numpy as np
import torch
from scipy.linalg import hadamard
from torch.utils.data import Dataset

from .base import SPLITS, check_split, to_float
from .latents import TEXT
from .portraits import draw

SIZES = range(16, 65)

# The attributes in the order of their tokens; their values are the words of a description.
ATTRIBUTES = {
    "skin": ("pale skin", "light skin", "tan skin", "brown skin", "dark skin"),
    "hair": ("bald", "short hair", "curly hair", "long hair", "bun", "mohawk"),
    "hair colour": ("black hair", "brown hair", "blond hair", "red hair", "white hair", "blue hair", "pink hair"),
    "eyes": ("open eyes", "closed eyes", "wink"),
    "glasses": ("no glasses", "round glasses", "sunglasses"),
    "mouth": ("smile", "big smile", "straight mouth", "frown", "surprised"),
    "beard": ("no beard", "beard", "moustache"),
    "hat": ("no hat", "cap", "beanie", "party hat"),
    "shirt": ("red shirt", "orange shirt", "green shirt", "blue shirt", "purple shirt", "white shirt", "black shirt"),
    "background": ("on yellow", "on green", "on blue", "on pink", "on grey", "on orange"),
}
_CHANCES = {  # of the values; equal where nothing is said
    "hair": (0.1, 0.26, 0.2, 0.22, 0.11, 0.11),
    "eyes": (0.76, 0.14, 0.1),
    "glasses": (0.62, 0.2, 0.18),
    "mouth": (0.32, 0.26, 0.14, 0.12, 0.16),
    "beard": (0.68, 0.17, 0.15),
    "hat": (0.67, 0.13, 0.12, 0.08),
}

# What no picture shows together: two values of two attributes.
CONFLICTS = (
    *itertools.product(("bun", "mohawk"), ("cap", "beanie", "party hat")),
    *itertools.product(("sunglasses",), ("closed eyes", "wink")),
)
HIDDEN = "hair colour"  # of a bald face without a beard
_FULL = 0.5  # share of the pictures whose description names every attribute

TOKENS, DIM = len(ATTRIBUTES), 64
_CODES = torch.from_numpy(hadamard(DIM)).float()  # one row a value, then one row an attribute that is left open
_FIRST = dict(zip(ATTRIBUTES, itertools.accumulate(map(len, ATTRIBUTES.values()), initial=0)))
_OPEN = sum(map(len, ATTRIBUTES.values()))


class Faces(Dataset):
    """Cartoon faces with ten attributes, drawn from a seed, as (picture [3, size, size], {"encoder_hidden_states": tokens}).

    The tokens [10, 64] are the description, one for each attribute. Half of the descriptions name every attribute; the others
    leave some open, at random, so that a model learns to draw from a few words.

    Args:
        n: number of pictures.
        size: height and width in pixels, 16 to 64.
        seed: with it and its number each picture is drawn.
        split: "train" or "test": different pictures from the same distribution.

    Attributes:
        name: what tells these faces and their descriptions from others; their number does not change them.
        null: the tokens that leave everything open, for guidance.
    """

    channels = 3

    def __init__(self, n: int = 40_000, size: int = 32, seed: int = 0, split: str = "train"):
        check_split(split)
        if n < 1 or size not in SIZES:
            raise ValueError(f"faces need n >= 1 and a size from {SIZES[0]} to {SIZES[-1]}, not n={n}, size={size}")
        self.size, self.seed, self.split = size, seed, split
        self.name = f"faces of {size}x{size}, {split}, seed {seed}"
        self.null = {TEXT: tokens({})}
        self._images = torch.zeros(n, 3, size, size, dtype=torch.uint8)
        self._drawn = np.zeros(n, dtype=bool)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        rng = self._rng(index)
        face = _draw_attributes(rng)
        named = _draw_named(face, rng)
        if not self._drawn[index]:
            self._images[index] = draw(face, self.size, rng)
            self._drawn[index] = True
        return to_float(self._images[index]), {TEXT: tokens(named)}

    def face(self, index: int) -> dict[str, int]:
        """The attributes of picture `index`: the number of the value in `ATTRIBUTES`; an attribute that is hidden is left out."""
        return visible(_draw_attributes(self._rng(index)))

    def named(self, index: int) -> dict[str, int]:
        """The attributes that the description of picture `index` names."""
        rng = self._rng(index)
        return _draw_named(_draw_attributes(rng), rng)

    def _rng(self, index: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, SPLITS[self.split], index))


def _draw_attributes(rng: np.random.Generator) -> dict[str, int]:
    """A value for every attribute; where two values conflict, the second gives way to the first of its attribute."""
    face = {name: int(rng.choice(len(values), p=_CHANCES.get(name))) for name, values in ATTRIBUTES.items()}
    words = {values[face[name]] for name, values in ATTRIBUTES.items()}
    for first, second in CONFLICTS:
        if {first, second} <= words:
            face[attribute_of(second)] = 0
    return face


def completed(named: Mapping[str, int], rng: np.random.Generator) -> dict[str, int]:
    """The attributes in `named`, whose values go together, and for every other one a value that is drawn as those of pictures."""
    while True:
        face = visible({**_draw_attributes(rng), **named})
        words = {ATTRIBUTES[name][value] for name, value in face.items()}
        if named.keys() <= face.keys() and not any(set(pair) <= words for pair in CONFLICTS):
            return face


def _draw_named(face: Mapping[str, int], rng: np.random.Generator) -> dict[str, int]:
    share, chances = rng.uniform(0, 1), rng.uniform(0, 1, TOKENS)
    full = rng.uniform() < _FULL
    names = [name for name, chance in zip(ATTRIBUTES, chances) if full or chance < share]
    return {name: value for name, value in visible(face).items() if name in names}


def visible(face: Mapping[str, int]) -> dict[str, int]:
    """The attributes of `face` that a picture shows: without its hair colour if there is neither hair nor beard."""
    hidden = face.get("hair") == 0 and face.get("beard", 0) == 0
    return {name: value for name, value in face.items() if not (hidden and name == HIDDEN)}


def attribute_of(word: str) -> str:
    """The attribute that `word` is a value of. Raises KeyError for an unknown word."""
    return _ATTRIBUTE_OF[word]


_ATTRIBUTE_OF = {word: name for name, values in ATTRIBUTES.items() for word in values}


def row(face: Mapping[str, int]) -> torch.Tensor:
    """The values of `face`, [10], -1 for attributes that are not in `face`."""
    return torch.tensor([face.get(name, -1) for name in ATTRIBUTES])


def tokens(face: Mapping[str, int]) -> torch.Tensor:
    """The description of `face` for a model, [10, 64]: one orthogonal code for each attribute; those not in `face` stay open."""
    rows = [_FIRST[name] + face[name] if name in face else _OPEN + i for i, name in enumerate(ATTRIBUTES)]
    return _CODES[rows]


def read_tokens(codes: torch.Tensor) -> dict[str, int]:
    """The attributes that tokens [10, 64] name: the inverse of `tokens`. Raises ValueError for other tokens."""
    rows = (codes @ _CODES.T).argmax(-1).tolist()
    face = {name: row - _FIRST[name] for name, row in zip(ATTRIBUTES, rows) if row < _OPEN}
    if not torch.equal(tokens(face), codes):
        raise ValueError("these are not the tokens of a face")
    return face
