"""Pictures to score are those of the model that is scored: never another's, never damaged ones."""

import copy
import json
import shutil
from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import sparsedm
from sparsedm import cli
from sparsedm.masking import layers
from sparsedm.measure import evaluation, fingerprint
from sparsedm.measure.protocol import Protocol
from sparsedm.models.uvit import UViTModel

PROTOCOL = Protocol(n=6, steps=2, batch_size=2, precision="fp32")


def made(states):
    """What a generator returns."""
    while True:
        try:
            next(states)
        except StopIteration as end:
            return end.value


def changed(model):
    """The model with one weight changed by a little."""
    other = copy.deepcopy(model)
    next(other.parameters()).data.flatten()[0] += 1e-3
    return other


# --- fingerprints -----------------------------------------------------------------------------------------------------


def test_a_fingerprint_is_that_of_the_weights_class_and_config(model, tmp_path):
    own = fingerprint.of_model(model)
    sparsedm.save(model, tmp_path / "model")
    assert fingerprint.of_model(sparsedm.load(tmp_path / "model")) == own == fingerprint.of_model(copy.deepcopy(model).train())
    assert fingerprint.of_model(changed(model)) != own != fingerprint.of_model(copy.deepcopy(model).half())
    model.register_to_config(noise_schedule={"prediction_type": "v_prediction"})
    assert fingerprint.of_model(model) != own


def test_masks_count_and_folding_does_not(model):
    patterns = {str(pattern): layers.sparsify(copy.deepcopy(model), pattern) for pattern in ("2:4", "1:4")}
    found = {fingerprint.of_model(model), *map(fingerprint.of_model, patterns.values())}
    assert len(found) == 3
    assert {fingerprint.of_model(layers.fold(sparse)) for sparse in patterns.values()} < found


def test_tensors_of_any_kind_and_order_have_fingerprints():
    tensors = {"a": torch.zeros(2, 3), "b": torch.ones((), dtype=torch.bfloat16), "c": torch.zeros(0), "d": torch.eye(3).T[1:]}
    own = fingerprint.of_tensors(tensors, "word")
    assert own == fingerprint.of_tensors(dict(reversed(tensors.items())), "word") and len(own) == 16
    others = [{**tensors, "a": torch.zeros(3, 2)}, {**tensors, "a": torch.zeros(2, 3).int()}, {**tensors, "e": tensors["c"]}]
    assert len({own, fingerprint.of_tensors(tensors), *map(fingerprint.of_tensors, others)}) == 5


# --- pictures that are taken up ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("stopped", [False, True], ids=["finished", "stopped"])
def test_pictures_of_the_same_model_are_taken_up_and_of_another_refused(model, tmp_path, monkeypatch, stopped):
    monkeypatch.setattr(evaluation, "CHUNK", 2)
    states = evaluation.sample(model, tmp_path, PROTOCOL)
    if stopped:
        for _ in range(2):
            next(states)
        states.close()
    else:
        made(states)
    left = sorted(path.name for path in tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=rf"{tmp_path} holds pictures of another model; .*remove .*samples-ddim2-1234"):
        evaluation.sample(changed(model), tmp_path, PROTOCOL)
    assert sorted(path.name for path in tmp_path.rglob("*")) == left
    again = list(evaluation.sample(copy.deepcopy(model), tmp_path, PROTOCOL))
    assert [state.done for state in again] == ([4, 6] if stopped else [])
    more = evaluation.sample(model, tmp_path, replace(PROTOCOL, n=8))
    assert [state.done for state in more] == [8]


def test_pictures_of_another_shape_are_another_models(make_model, tmp_path):
    made(evaluation.sample(make_model("unet"), tmp_path, PROTOCOL))
    with pytest.raises(ValueError, match="another model"):
        evaluation.sample(make_model("unet", sample_size=16), tmp_path, PROTOCOL)


def test_pictures_of_nobody_known_are_drawn_again_with_a_word(model, tmp_path):
    expected = made(evaluation.sample(model, tmp_path, PROTOCOL))
    path = evaluation.samples_file(tmp_path, PROTOCOL)
    protocol = {k: str(v) for k, v in vars(PROTOCOL).items() if k != "n"}
    save_file({"images": torch.zeros_like(expected)}, path, metadata=protocol)  # as earlier versions wrote it
    with pytest.warns(UserWarning, match=r"samples-ddim2-1234\.safetensors does not say which model .*drawn again"):
        states = evaluation.sample(model, tmp_path, PROTOCOL)
    assert torch.equal(made(states), expected) and torch.equal(load_file(path)["images"], expected)


def test_pictures_under_another_protocol_are_drawn_again(model, tmp_path):
    made(evaluation.sample(model, tmp_path, PROTOCOL))
    assert len(list(evaluation.sample(model, tmp_path, replace(PROTOCOL, guidance=1.0)))) == 3


def test_damaged_pictures_are_named(model, tmp_path):
    made(evaluation.sample(model, tmp_path, PROTOCOL))
    path = evaluation.samples_file(tmp_path, PROTOCOL)
    path.write_bytes(path.read_bytes()[:-9])
    for read in (lambda: evaluation.sample(model, tmp_path, PROTOCOL), lambda: evaluation.sampled(tmp_path, PROTOCOL, 2)):
        with pytest.raises(ValueError, match=r"samples-ddim2-1234\.safetensors is not a readable .*; remove it"):
            read()


def test_a_flipped_bit_in_pictures_is_named(model, tmp_path):
    expected = made(evaluation.sample(model, tmp_path, PROTOCOL))
    path = evaluation.samples_file(tmp_path, PROTOCOL)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    for read in (lambda: evaluation.sample(model, tmp_path, PROTOCOL), lambda: evaluation.sampled(tmp_path, PROTOCOL, 2)):
        with pytest.raises(ValueError, match=r"samples-ddim2-1234\.safetensors: images is damaged .*; remove it.*drawn again"):
            read()
    path.unlink()
    assert torch.equal(made(evaluation.sample(model, tmp_path, PROTOCOL)), expected) and path.read_bytes() == whole


def test_pictures_without_checksums_are_taken_up(model, tmp_path):
    expected = made(evaluation.sample(model, tmp_path, PROTOCOL))
    path = evaluation.samples_file(tmp_path, PROTOCOL)
    with safe_open(path, "pt") as file:
        stored = {k: v for k, v in file.metadata().items() if k not in ("checksums", "format")}  # as earlier versions wrote it
    save_file({"images": expected.clone()}, path, metadata=stored)
    assert list(evaluation.sample(model, tmp_path, PROTOCOL)) == []
    assert evaluation.sampled(tmp_path, PROTOCOL, 2).shape == expected[:2].shape


def test_another_autoencoder_is_refused(tmp_path):
    torch.manual_seed(0)
    model = UViTModel(sample_size=8, in_channels=4, embed_dim=16, depth=2, num_heads=2)
    blocks = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
    vaes = [AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4, **blocks).eval() for _ in range(2)]
    pictures = made(evaluation.sample(model, tmp_path, PROTOCOL, vae=vaes[0]))
    assert torch.equal(made(evaluation.sample(model, tmp_path, PROTOCOL, vae=vaes[0])), pictures)
    for other in (vaes[1], None):
        with pytest.raises(ValueError, match="another autoencoder"):
            evaluation.sample(model, tmp_path, PROTOCOL, vae=other)


def test_other_texts_are_refused(tmp_path):
    torch.manual_seed(0)
    model = UViTModel(sample_size=8, in_channels=4, embed_dim=16, depth=2, num_heads=2, context_dim=6, context_tokens=3)
    text = torch.randn(3, 3, 6)
    between = torch.cat([text[:1], torch.randn(1, 3, 6), text[2:]])  # the first and the last are the same
    for name, texts in (("a", text), ("b", between)):
        (tmp_path / name).mkdir()
        content = {"latents": torch.zeros(3, 4, 8, 8), "encoder_hidden_states": texts}
        save_file(content, tmp_path / name / "some.safetensors")
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    told = [{"dataset": f"latents:{tmp_path / name}"} for name in ("a", "copy", "b")]
    pictures = made(evaluation.sample(model, tmp_path / "out", PROTOCOL, **told[0]))
    assert torch.equal(made(evaluation.sample(model, tmp_path / "out", PROTOCOL, **told[1])), pictures)
    with pytest.raises(ValueError, match="other texts"):
        evaluation.sample(model, tmp_path / "out", PROTOCOL, **told[2])


def test_latents_are_nothing_to_compare_pictures_with_and_refused_at_the_start():
    for dataset, reference in (("latents:a", ""), ("cifar10", "latents:a")):
        with pytest.raises(ValueError, match=r"latents:a holds latents, no pictures .*\(reference\)"):
            evaluation.check(2048, dataset, "inception.pth", reference)


# --- the command ------------------------------------------------------------------------------------------------------


def test_evaluate_gives_no_model_the_scores_of_another(make_model, tmp_path):
    teacher = make_model("uvit")
    for name, model in {"a": teacher, "b": changed(teacher), "c": changed(changed(teacher))}.items():
        sparsedm.save(model, tmp_path / name)

    def evaluate(model, base):
        options = ("--data", "digits", "--n", "4", "--steps", "2", "--base", str(tmp_path / base), "--json")
        return CliRunner().invoke(cli.app, ["evaluate", str(tmp_path / model), str(tmp_path / "s"), *options])

    first = evaluate("a", "b")
    assert json.loads(first.stdout) == json.loads((tmp_path / "s" / "scores.json").read_text())
    assert evaluate("a", "b").stdout == first.stdout
    for model, base, place in (("b", "b", tmp_path / "s"), ("a", "c", tmp_path / "s" / "base")):
        refused = evaluate(model, base).exception
        assert isinstance(refused, ValueError) and str(refused).startswith(f"{place} holds pictures of another model"), refused
    sparsedm.save(changed(teacher), tmp_path / "a")  # trained in place
    assert "holds pictures of another model" in str(evaluate("a", "b").exception)
    shutil.rmtree(tmp_path / "s")
    assert not evaluate("b", "c").exception


def test_a_foreign_base_is_refused_before_anything_is_drawn(make_model, tmp_path, monkeypatch):
    teacher = make_model("uvit")
    for name, model in {"a": teacher, "b": changed(teacher)}.items():
        sparsedm.save(model, tmp_path / name)
    made(evaluation.sample(teacher, tmp_path / "s" / "base", replace(PROTOCOL, n=4, batch_size=250)))
    monkeypatch.setattr(evaluation.diffusion, "generate", None)
    options = ("--data", "digits", "--n", "4", "--steps", "2", "--base", str(tmp_path / "b"))
    refused = CliRunner().invoke(cli.app, ["evaluate", str(tmp_path / "a"), str(tmp_path / "s"), *options]).exception
    assert isinstance(refused, ValueError) and "another model" in str(refused)
