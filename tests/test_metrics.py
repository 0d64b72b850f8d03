"""SSIM against scikit-image, Fréchet distance against its formula, the classifier against real glyphs."""

import json
import os
import re

import numpy as np
import pytest
import torch
import torch_fidelity
from skimage.metrics import structural_similarity
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.utils import create_feature_extractor
from typer.testing import CliRunner

from sparsedm import cli, data
from sparsedm.checkpoints import folders
from sparsedm.experiments import experiment
from sparsedm.measure import evaluation, judges, metrics

HALF = 2048


def _noisy(images, sigma=0.5):
    return (images + sigma * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))).clamp(-1, 1)


# --- SSIM -------------------------------------------------------------------------------------------------------------


def _skimage(a, b):
    """Per picture, uint8 or float in [-1, 1]; with scikit-image's settings for Wang et al. 2004."""
    a, b = ((x.double() / 255 if x.dtype == torch.uint8 else (x.double() + 1) / 2).numpy() for x in (a, b))
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0, "channel_axis": 0}
    return torch.tensor([structural_similarity(x, y, **options) for x, y in zip(a, b)])


@pytest.mark.parametrize("shape", [(4, 1, 16, 16), (3, 3, 32, 24), (2, 3, 11, 11)], ids=str)
@pytest.mark.parametrize("noise", [0.0, 0.1, 0.5, None])
def test_ssim_of_random_pictures_equals_scikit_image(shape, noise):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(shape, generator=generator) * 2 - 1 for _ in "ab")
    b = b if noise is None else (a + noise * b).clamp(-1, 1)
    torch.testing.assert_close(metrics.ssim(a, b).double(), _skimage(a, b), rtol=0, atol=2e-5)


def test_ssim_of_glyphs_equals_scikit_image(glyphs):
    images = glyphs[0][:72]
    for a, b in ((images[:36], images[36:]), (images, _noisy(images))):
        torch.testing.assert_close(metrics.ssim(a, b).double(), _skimage(a, b), rtol=0, atol=1e-4)
        small_a, small_b = data.to_uint8(a), data.to_uint8(b)
        torch.testing.assert_close(metrics.ssim(small_a, small_b).double(), _skimage(small_a, small_b), rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", [4, 8, 16])
def test_ssim_of_equal_pictures_is_1_at_every_size_and_symmetric(size):
    a, b = torch.rand(2, 3, 1, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    torch.testing.assert_close(metrics.ssim(a, a), torch.ones(3))
    torch.testing.assert_close(metrics.ssim(a, b), metrics.ssim(b, a))
    assert metrics.ssim(a, b).max() < 0.8


def test_ssim_refuses_other_shapes():
    with pytest.raises(ValueError, match=r"\[2, 1, 16, 16\] and \[3, 1, 16, 16\]"):
        metrics.ssim(torch.zeros(2, 1, 16, 16), torch.zeros(3, 1, 16, 16))


# --- Fréchet distance -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scores(glyphs):
    """Of the second half of the glyphs against the first, as they are and with noise."""
    pictures = {"real": glyphs[0], "noisy": _noisy(glyphs[0])}
    return {name: metrics.frechet(data.to_uint8(x[HALF:]), data.to_uint8(glyphs[0][:HALF])) for name, x in pictures.items()}


def test_fd_of_two_halves_of_real_glyphs_is_near_zero_and_far_below_that_of_noisy_ones(scores):
    real, noisy = scores["real"], scores["noisy"]
    assert set(real) == {"fd_glyph", "kd_glyph", "precision", "recall", "n"} and real["n"] == HALF
    assert real["fd_glyph"] < 0.02 * noisy["fd_glyph"]
    assert abs(real["kd_glyph"]) < 0.02 * noisy["kd_glyph"]
    assert min(real["precision"], real["recall"]) > 0.9 > 0.5 > noisy["precision"]


def test_fd_equals_its_formula_on_the_classifiers_features(scores, glyphs):
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), the trace of the root from the eigenvalues."""
    pixels = data.to_float(data.to_uint8(glyphs[0]))
    with torch.no_grad():
        features = torch.cat([judges.classifier_of("glyph-classifier").features(x) for x in pixels.split(512)]).double().numpy()
    a, b = features[HALF:], features[:HALF]
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = np.sqrt(np.linalg.eigvals(cov_a @ cov_b).real.clip(0)).sum()
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * root
    assert scores["real"]["fd_glyph"] == pytest.approx(expected, rel=0.01)


def test_a_data_set_is_read_as_its_pictures_are(scores, glyphs):
    images = data.to_uint8(glyphs[0])
    assert metrics.frechet(images[HALF:], data.load("glyphs", split="test", n=HALF)) == scores["real"]


@pytest.mark.parametrize("n, m", [(2047, 2048), (2048, 100)])
def test_too_few_samples_for_a_frechet_distance_say_how_many_it_needs(n, m):
    sets = (torch.zeros(k, 1, 16, 16, dtype=torch.uint8) for k in (n, m))
    with pytest.raises(metrics.TooFewSamples, match=rf"at least 2048 samples, there are {min(n, m)}"):
        metrics.frechet(*sets)


def test_frechet_takes_uint8_only(glyphs):
    with pytest.raises(ValueError, match="uint8"):
        metrics.frechet(glyphs[0][:HALF], glyphs[0][HALF:])


# --- Inception --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """torch-fidelity's Inception with random weights, and their file."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "load", lambda *_, **__: {})
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        net = FeatureExtractorInceptionV3("random", ["2048"], "")
    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    torch.save(net.state_dict(), path)
    return net, path


def test_inceptions_features_are_torch_fidelitys(inception, monkeypatch):
    net, path = inception
    images, asked = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)), {}
    names = ("frechet_inception_distance", "kernel_inception_distance_mean", "precision", "recall")
    monkeypatch.setitem(metrics.MIN_SAMPLES, "fd", 4)
    monkeypatch.setattr(torch_fidelity, "calculate_metrics", lambda **given: asked.update(given) or dict.fromkeys(names, 0.0))
    assert set(metrics.frechet(images, images, str(path))) == {"fid", "kid", "precision", "recall", "n"}
    chosen = {key: value for key, value in asked.items() if key.startswith("feature_extractor")}
    extractor = create_feature_extractor(chosen.pop("feature_extractor"), ["2048"], cuda=False, verbose=False, **chosen)
    assert torch.equal(extractor(images)[0], net(images)[0]) and net(images)[0].std() > 0.1


class _Trap:
    def __reduce__(self):
        return os.mkdir, ("sprung",)


def _without(state, name):
    return {key: value for key, value in state.items() if key != name}


WRONG = {
    "code": (lambda state: {**state, "trap": _Trap()}, r"holds pickled code \(posix\.mkdir\), which is not run"),
    "a list": (lambda state: [1], "holds no state dict"),
    "a layer less": (lambda state: _without(state, "fc.bias"), r"torch-fidelity's Inception: .*fc\.bias"),
    "a layer more": (lambda state: {**state, "extra": torch.zeros(1)}, r"torch-fidelity's Inception: .*extra"),
    "another shape": (lambda state: {**state, "fc.bias": torch.zeros(3)}, r"torch-fidelity's Inception: .*fc\.bias"),
}


@pytest.mark.parametrize("what", WRONG)
def test_inceptions_weights_are_checked_before_any_work_and_run_no_code(inception, tmp_path, monkeypatch, what):
    monkeypatch.chdir(tmp_path)
    change, message = WRONG[what]
    torch.save(change(inception[0].state_dict()), "wrong.pth")
    monkeypatch.setattr(evaluation, "sample", None)
    options = ("--data", "digits", "--inception", "wrong.pth")
    evaluated = CliRunner().invoke(cli.app, ["evaluate", "glyphs-uvit", "scores", *options]).exception
    with pytest.raises(ValueError) as reproduced:
        next(experiment.reproduce("cifar10-ddpm", "runs", inception="wrong.pth"))
    for error in (evaluated, reproduced.value):
        assert isinstance(error, ValueError) and re.match(rf"wrong\.pth .*{message}", str(error)), error
    assert os.listdir() == ["wrong.pth"]


def test_a_distance_reads_inceptions_weights_as_tensors_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(metrics.MIN_SAMPLES, "fd", 4)
    torch.save({"trap": _Trap()}, "wrong.pth")
    images = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"wrong\.pth holds pickled code \(posix\.mkdir\), which is not run"):
        metrics.frechet(images, images, "wrong.pth")
    assert os.listdir() == ["wrong.pth"]


def test_a_missing_inception_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing"):
        metrics.check_inception(tmp_path / "nothing.pth")


# --- readability ------------------------------------------------------------------------------------------------------


def test_classifier_reads_real_glyphs_as_well_as_its_result_says(glyphs):
    images, labels = glyphs
    assert metrics.readability(images, labels) > 0.995
    assert metrics.readability(data.to_uint8(images), labels) == metrics.readability(images, labels)
    stated = json.loads((folders.ASSETS / "results" / "glyph-classifier.json").read_text())["accuracy"]
    assert metrics.readability(images, labels) == pytest.approx(stated, abs=0.003)


def test_readability_of_shuffled_labels_is_chance(glyphs):
    images, labels = glyphs
    shuffled = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    assert metrics.readability(images, shuffled) == pytest.approx(1 / 36, abs=0.01)


def test_readability_counts(glyphs):
    images, labels = glyphs[0][:40], glyphs[1][:40].clone()
    labels[:10] = (labels[:10] + 1) % 36
    assert metrics.readability(images, labels) == 0.75


def test_readability_of_noise_is_low():
    noise = torch.rand(360, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert metrics.readability(noise, torch.arange(360) % 36) < 0.1


def test_too_few_pictures_to_read_say_how_many_it_needs():
    with pytest.raises(metrics.TooFewSamples, match="at least 36 samples, there are 5"):
        metrics.readability(torch.zeros(5, 1, 16, 16), torch.zeros(5))


def test_classifier_reads_larger_and_coloured_pictures(glyphs):
    images, labels = glyphs[0][:72], glyphs[1][:72]
    larger, coloured = images.repeat_interleave(2, -1).repeat_interleave(2, -2), images.expand(-1, 3, -1, -1)
    assert torch.equal(judges.GLYPHS.read(larger), judges.GLYPHS.read(images)) and torch.equal(
        judges.GLYPHS.read(coloured), judges.GLYPHS.read(images)
    )
    assert metrics.readability(larger, labels) > 0.98
