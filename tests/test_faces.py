"""The faces: pictures, tokens and words."""

import numpy as np
import pytest
import torch

from sparsedm import data
from sparsedm.data import faces, prompts
from sparsedm.data.latents import TEXT


@pytest.fixture(scope="module")
def drawn():
    return data.load("faces", n=300)


def test_a_face_depends_on_its_number_and_seed_alone(drawn):
    picture, condition = drawn[7]
    again = data.load("faces", n=8)[7]
    assert torch.equal(picture, again[0]) and torch.equal(condition[TEXT], again[1][TEXT])
    for other in (data.load("faces", n=8, seed=1)[7], data.load("faces", n=8, split="test")[7]):
        assert not torch.equal(picture, other[0])
    assert picture.shape == (3, 32, 32) and -1 <= picture.min() < picture.max() <= 1


@pytest.mark.parametrize("size", (16, 47, 64))
def test_every_size_shows_the_same_face(drawn, size):
    small = torch.nn.functional.interpolate(drawn[5][0][None], (16, 16), mode="area")
    other = torch.nn.functional.interpolate(data.load("faces", n=6, size=size)[5][0][None], (16, 16), mode="area")
    assert (small - other).abs().mean() < 0.05 < (small - drawn[6][0].mean()).abs().mean()


def test_every_value_of_every_attribute_is_drawn_and_seen(drawn):
    for name, values in faces.ATTRIBUTES.items():
        assert {drawn.face(i)[name] for i in range(300) if name in drawn.face(i)} == set(range(len(values)))
    face = dict.fromkeys(faces.ATTRIBUTES, 0) | {"hair": 1, "beard": 1}
    for name, values in faces.ATTRIBUTES.items():
        pictures = [faces.draw({**face, name: v}, 32, np.random.default_rng(0)) for v in range(len(values))]
        assert len({picture.numpy().tobytes() for picture in pictures}) == len(values), name


def test_no_face_contradicts_itself(drawn):
    for i in range(300):
        prompts.parse(prompts.describe(drawn.face(i)))


def test_tokens_name_what_the_description_names(drawn):
    for i in range(50):
        codes = drawn[i][1][TEXT]
        assert faces.read_tokens(codes) == drawn.named(i)
        assert drawn.named(i).items() <= drawn.face(i).items()
    full = sum(drawn.named(i) == drawn.face(i) for i in range(300)) / 300
    assert 0.45 < full < 0.7
    assert faces.read_tokens(drawn.null[TEXT]) == {}


def test_codes_are_orthogonal():
    rows = torch.cat([faces.tokens({name: v})[i][None] for i, (name, values) in enumerate(faces.ATTRIBUTES.items())
                      for v in range(len(values))])  # fmt: skip
    assert torch.equal(rows @ rows.T, faces.DIM * torch.eye(len(rows)))
    with pytest.raises(ValueError, match="tokens of a face"):
        faces.read_tokens(torch.randn(faces.TOKENS, faces.DIM))


@pytest.mark.parametrize(
    "text, words",
    (
        ("red curly hair, round glasses, big smile, blue shirt, on yellow",
         {"red hair", "curly hair", "round glasses", "big smile", "blue shirt", "on yellow"}),
        ("long red hair and a cap", {"long hair", "red hair", "cap"}),
        ("Blue HAIR sunglasses smile", {"blue hair", "sunglasses", "smile"}),
        ("a person with a moustache; grin, pink background", {"moustache", "big smile", "on pink"}),
        ("no hair no beard dark skin", {"bald", "no beard", "dark skin"}),
        ("", set()),
    ),
)  # fmt: skip
def test_words_are_read(text, words):
    face = prompts.parse(text)
    assert {faces.ATTRIBUTES[name][value] for name, value in face.items()} == words
    assert prompts.parse(prompts.describe(face)).items() <= face.items()


@pytest.mark.parametrize(
    "text, message",
    (
        ("sunglases", "sunglases.*sunglasses"),
        ("purple hair", "purple.*purple shirt"),
        ("zzzz", "zzzz.*try 'red curly"),
        ("bald, long hair", "'bald' or 'long hair'"),
        ("mohawk, beanie", "'mohawk' together with 'beanie'"),
        ("bald, red hair", "bald.*'red hair'"),
        ("wink sunglasses", "'sunglasses' together with 'wink'"),
    ),
)
def test_words_that_no_face_has_are_named(text, message):
    with pytest.raises(ValueError, match=message):
        prompts.parse(text)


@pytest.mark.parametrize("options", ({"size": 15}, {"size": 65}, {"n": 0}, {"split": "all"}))
def test_bad_options(options):
    with pytest.raises(ValueError, match="faces need|split is"):
        data.load("faces", **{"n": 4, **options})
