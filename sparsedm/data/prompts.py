"""Faces in words: `parse("red curly hair, round glasses, big smile, on yellow")`, and `describe`, its inverse."""

import difflib
import itertools
from collections.abc import Mapping

from .faces import ATTRIBUTES, CONFLICTS, HIDDEN, attribute_of, visible

EXAMPLE = "red curly hair, round glasses, big smile, on yellow"

_SILENT = {"a", "an", "and", "the", "with", "of", "in", "has", "have", "wearing", "person", "face", "someone", "who", "is"}
_SYNONYMS = {
    "blonde hair": "blond hair", "gray hair": "white hair", "grey hair": "white hair", "ginger hair": "red hair",
    "curls": "curly hair", "no hair": "bald", "glasses": "round glasses", "shades": "sunglasses", "grin": "big smile",
    "laughing": "big smile", "smiling": "smile", "sad": "frown", "frowning": "frown", "winking": "wink", "surprise": "surprised",
    "mustache": "moustache", "bearded": "beard", "no moustache": "no beard", "baseball cap": "cap", "woolly hat": "beanie",
    "closed eye": "closed eyes", "eyes closed": "closed eyes", "eyes open": "open eyes", "on gray": "on grey",
    **{f"{color} background": f"on {color}" for color in ("yellow", "green", "blue", "pink", "grey", "orange")},
}  # fmt: skip
_PHRASES = {word: word for values in ATTRIBUTES.values() for word in values} | _SYNONYMS
_LONGEST = max(len(phrase.split()) for phrase in _PHRASES)
_UNSAID = ("open eyes", "no glasses", "no beard", "no hat")  # what a description leaves out, as people do


def parse(text: str) -> dict[str, int]:
    """The attributes that `text` names, by their numbers in `faces.ATTRIBUTES`; {} for empty text: everything is left open.

    Commas are optional, the case does not matter, and several words may share a noun ("long red hair").

    Raises:
        ValueError: words that are not known (with the nearest known ones), or values that contradict each other.
    """
    face, chosen = {}, {}
    for phrase in (phrase for part in text.lower().replace(";", ",").split(",") for phrase in _phrases(part)):
        name = attribute_of(phrase)
        value = ATTRIBUTES[name].index(phrase)
        if face.setdefault(name, value) != value:
            raise ValueError(f"a face has {chosen[name]!r} or {phrase!r}, not both; leave one out")
        chosen[name] = phrase
    _check_conflicts(set(chosen.values()))
    return face


def _phrases(part: str) -> list[str]:
    """The values named in a part of a text without commas. Raises ValueError for unknown words."""
    words, phrases, i = part.split(), [], 0
    nouns = set()  # that words before them have used
    while i < len(words):
        for length in range(min(_LONGEST, len(words) - i), 0, -1):
            if phrase := _PHRASES.get(" ".join(words[i : i + length])):
                phrases.append(phrase)
                i += length
                break
        else:
            shared = next((noun for noun in words[i + 1 :] if f"{words[i]} {noun}" in _PHRASES), None)
            if shared:
                phrases.append(_PHRASES[f"{words[i]} {shared}"])
                nouns.add(shared)
            elif words[i] not in nouns and words[i] not in _SILENT:
                raise ValueError(_unknown(words[i], words[i : i + 2]))
            i += 1
    return phrases


def _unknown(word: str, words: list[str]) -> str:
    known = list(_PHRASES)
    inside = [phrase for phrase in known if word in phrase.split()]
    word = " ".join(words) if inside else word  # an adjective: its noun is the mistake
    close = inside or difflib.get_close_matches(" ".join(words), known) or difflib.get_close_matches(word, known, cutoff=0.5)
    hint = f"near it: {', '.join(dict.fromkeys(map(_PHRASES.get, close)))}" if close else f"try {EXAMPLE!r}"
    return f"{word!r} is not among the words for faces; {hint}"


def _check_conflicts(words: set[str]) -> None:
    if not (pair := _conflict(words)):
        return
    first, second = pair
    if first == "bald":
        raise ValueError(f"a bald face without a beard does not show {second!r}; leave one out")
    raise ValueError(f"no face has {first!r} together with {second!r}; leave one out")


def _conflict(words: set[str]) -> tuple[str, str] | None:
    """Two of the words that no face shows together."""
    colours = () if words & {"beard", "moustache"} else itertools.product(("bald",), ATTRIBUTES[HIDDEN])
    return next((pair for pair in (*CONFLICTS, *colours) if set(pair) <= words), None)


def toggled(text: str, word: str) -> str:
    """The description `text` with the value `word` added, in place of what contradicts it; without it if it was there.

    Raises:
        ValueError: `word` is not a value in `faces.ATTRIBUTES`, or as `parse`.
    """
    if word not in _PHRASES.values():
        raise ValueError(_unknown(word, [word]))
    name, words = attribute_of(word), {attribute_of(value): value for value in _values(parse(text))}
    if words.get(name) == word:
        del words[name]
    else:
        words[name] = word
    while pair := _conflict(set(words.values())):
        del words[attribute_of(pair[0] if pair[1] == word else pair[1])]
    return ", ".join(words.values())


def _values(face: Mapping[str, int]) -> list[str]:
    return [ATTRIBUTES[name][value] for name, value in face.items()]


def describe(face: Mapping[str, int]) -> str:
    """The attributes of `face` in words, which `parse` reads; what most faces have ("no hat") is left out."""
    words = {name: ATTRIBUTES[name][value] for name, value in visible(face).items()}
    if words.get("hair", "").endswith(" hair") and "hair colour" in words:
        words["hair"] = f"{words.pop('hair colour').removesuffix(' hair')} {words['hair']}"
    return ", ".join(word for word in words.values() if word not in _UNSAID)
