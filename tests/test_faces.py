"""The faces: pictures, tokens and words."""

import json

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from typer.testing import CliRunner

import sparsedm
from sparsedm import cli, data
from sparsedm.checkpoints import folders
from sparsedm.data import faces, prompts
from sparsedm.data.latents import TEXT
from sparsedm.experiments import recipes, results
from sparsedm.measure import drawing, evaluation, judges, metrics
from sparsedm.measure.protocol import Protocol
from sparsedm.models.uvit import UViTModel
from sparsedm.training import distill


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
        ("purple hair", "'purple hair'.*purple shirt"),
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


@pytest.mark.parametrize(
    "text, word, outcome",
    (
        ("", "cap", "cap"),
        ("blue hair, smile", "cap", "blue hair, smile, cap"),
        ("blue hair, cap, smile", "cap", "blue hair, smile"),
        ("Long blue hair, grin", "red hair", "long hair, red hair, big smile"),  # another value of the same attribute
        ("mohawk, smile", "beanie", "smile, beanie"),  # values that no face shows together
        ("sunglasses", "wink", "wink"),
        ("bald, smile", "red hair", "smile, red hair"),
        ("red hair, smile", "bald", "smile, bald"),
        ("bald, beard, red hair", "beard", "bald"),
        ("bald, beard, red hair", "no beard", "bald, no beard"),
    ),
)
def test_a_word_is_added_or_taken_out_and_what_contradicts_it_gives_way(text, word, outcome):
    assert prompts.toggled(text, word) == outcome
    prompts.parse(outcome)


def test_what_cannot_be_toggled_is_named():
    with pytest.raises(ValueError, match="'kap'.*cap"):
        prompts.toggled("smile", "kap")
    with pytest.raises(ValueError, match="'smyle'.*smile"):
        prompts.toggled("smyle", "cap")


@pytest.mark.parametrize("options", ({"size": 15}, {"size": 65}, {"n": 0}, {"split": "all"}))
def test_bad_options(options):
    with pytest.raises(ValueError, match="faces need|split is"):
        data.load("faces", **{"n": 4, **options})


# --- models of faces --------------------------------------------------------------------------------------------------


def _tiny(**changes):
    torch.manual_seed(0)
    config = {
        "sample_size": 16, "in_channels": 3, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2,
        "context_dim": faces.DIM, "context_tokens": faces.TOKENS,
    }  # fmt: skip
    model = UViTModel(**{**config, **changes}).eval()
    model.register_to_config(noise_schedule=recipes.RECIPES["faces-uvit"].schedule)
    torch.nn.init.normal_(model.final_layer.weight)
    return model


def _tiny_unet():
    model = UNet2DConditionModel(
        sample_size=16, in_channels=3, out_channels=3, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=faces.DIM, attention_head_dim=2,
    )  # fmt: skip
    model.register_to_config(context_tokens=faces.TOKENS, noise_schedule=recipes.RECIPES["faces-unet"].schedule)
    return model.eval()


@pytest.mark.parametrize("make", (_tiny, _tiny_unet))
def test_models_of_faces_train_and_are_drawn_from_words(make, tmp_path):
    model = make()
    before = model.state_dict()["conv_in.weight" if make is _tiny_unet else "context_embed.weight"].clone()
    list(distill.train(model, data.load("faces", n=16, size=16), steps=2, batch_size=8, lr=1e-2))
    assert not torch.equal(before, model.state_dict()["conv_in.weight" if make is _tiny_unet else "context_embed.weight"])
    folders.save(model, tmp_path / "faces")
    back = folders.load(tmp_path / "faces")
    assert drawing.draws_faces(back) and sparsedm.count(back).dense == sparsedm.count(model).dense
    runs = {}
    for prompt in ("", "red hair, cap"):
        given, nothing = drawing.conditions(back, 3, prompt), drawing.conditions(back, 3)
        states = drawing.draw(back, 3, None, given, nothing, batch_size=2, steps=2, guidance=1.0)
        runs[prompt] = _outcome(states).images
    assert runs[""].shape == (3, 3, 16, 16) and not torch.equal(runs[""], runs["red hair, cap"])


def _outcome(states):
    while True:
        try:
            next(states)
        except StopIteration as end:
            return end.value


def test_text_tokens_of_a_config_are_checked(tmp_path):
    folders.save(_tiny_unet(), tmp_path)
    config = tmp_path / folders.CONFIG
    config.write_text(config.read_text().replace(f'"context_tokens": {faces.TOKENS}', '"context_tokens": "many"'))
    with pytest.raises(ValueError, match="context_tokens is 'many'"):
        folders.load(tmp_path)


def test_prompts_are_for_models_of_faces():
    letters = folders.load("glyphs-uvit")
    assert drawing.conditions(letters, 2) is None
    with pytest.raises(ValueError, match="does not draw faces"):
        drawing.conditions(letters, 2, "red hair")
    with pytest.raises(ValueError, match="purple"):
        drawing.conditions(_tiny(), 2, "purple hair")
    assert not drawing.draws_faces(_tiny(in_channels=4)) and not drawing.draws_faces(_tiny(context_tokens=9))


def test_faces_are_scored_by_what_was_asked(monkeypatch):
    pictures = data.load("faces", split="test", n=60)
    images = torch.stack([pictures[i][0] for i in range(60)])
    asked = evaluation.asked(_tiny(sample_size=32), "faces", 60)
    monkeypatch.setattr(metrics.judges, "classifier_of", lambda asset: _Reads(pictures))
    assert metrics.attribute_accuracy(images, asked) == 1
    assert 0.1 < metrics.attribute_accuracy(images.roll(1, 0), asked) < 0.6  # of other faces: by chance
    wrong = asked.clone()
    wrong[0] = torch.where(asked[0] >= 0, (asked[0] + 1) % 2, -1)
    missed = (wrong[0] != asked[0]).sum() / (asked >= 0).sum()
    assert metrics.attribute_accuracy(images, wrong) == pytest.approx(1 - missed.item())


class _Reads:
    """Reads faces by looking them up."""

    channels = 3

    def __init__(self, pictures):
        self.known = {data.to_uint8(pictures[i][0]).numpy().tobytes(): faces.row(pictures.face(i)) for i in range(len(pictures))}

    def read(self, images):
        return torch.stack([self.known[data.to_uint8(image).numpy().tobytes()] for image in images])


def test_models_of_other_things_are_not_scored_as_faces():
    evaluation.check_model(_tiny(), "faces", "", None)
    for model, dataset in ((folders.load("glyphs-uvit"), "faces"), (_tiny(), "glyphs"), (_tiny(context_dim=32), "faces")):
        with pytest.raises(ValueError, match="name its own data"):
            evaluation.check_model(model, dataset, "", None)


def test_command_draws_faces_from_words(tmp_path):
    folders.save(_tiny(), tmp_path / "model")
    arguments = ["generate", str(tmp_path / "model"), str(tmp_path / "faces.png"), "--n", "2", "--steps", "2"]
    drawn = CliRunner().invoke(cli.app, [*arguments, "--prompt", "blue hair, sunglasses"])
    assert drawn.exit_code == 0, drawn.output
    assert Image.open(tmp_path / "faces.png").mode == "RGB"
    refused = CliRunner().invoke(cli.app, [*arguments, "--prompt", "blue nose"])
    assert isinstance(refused.exception, ValueError) and "'blue nose'" in str(refused.exception)


def test_more_faces_are_drawn_to_those_that_are_there(tmp_path):
    model, drawn = _tiny(), {}
    for n in (4, 6):
        protocol = Protocol(n=n, steps=2, batch_size=2)
        drawn[n] = _outcome(evaluation.sample(model, tmp_path, protocol, dataset="faces"))
    assert drawn[6].shape == (6, 3, 16, 16) and torch.equal(drawn[4], drawn[6][:4])


def test_the_bundled_classifier_reads_every_attribute_of_real_faces():
    pictures = data.load("faces", split="test", n=400)
    images = torch.stack([pictures[i][0] for i in range(400)])
    shown = torch.stack([faces.row(pictures.face(i)) for i in range(400)])
    right = judges.FACES.read(images) == shown
    for i, name in enumerate(faces.ATTRIBUTES):
        assert right[shown[:, i] >= 0, i].float().mean() > 0.97, name
    assert metrics.attribute_accuracy(data.to_uint8(images), shown) > 0.99
    assert metrics.attribute_accuracy(images.roll(1, 0), shown) < 0.5
    stored = json.loads((results.RESULTS / "face-classifier.json").read_text())
    assert min(stored["accuracies"].values()) > 0.97


@pytest.mark.parametrize("text", ["", "mohawk", "cap", "wink", "red hair", "bald, smile", "blue shirt, on pink"])
def test_a_description_is_completed_with_what_goes_together(text):
    named, rng = prompts.parse(text), np.random.default_rng(0)
    made = [faces.completed(named, rng) for _ in range(40)]
    assert all(named.items() <= face.items() for face in made) and len({face["skin"] for face in made}) == 5
    for face in made:
        assert prompts.parse(prompts.describe(face)).items() <= face.items()  # nothing contradicts
