"""Pictures drawn batch by batch."""

import pytest
import torch

from sparsedm import diffusion
from sparsedm.measure import drawing


def drawn(states) -> tuple[drawing.Drawn, list]:
    """What a generator returns, and what it yields."""
    told = []
    try:
        while True:
            told.append(next(states))
    except StopIteration as end:
        return end.value, told


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])  # ddpm adds noise in every step
def test_pictures_do_not_depend_on_the_batches(model, sampler):
    options = {"sampler": sampler, "steps": 3, "seed": 5}
    labels = drawing.labels(model, 5)
    some, told = drawn(drawing.draw(model, 5, labels, batch_size=2, **options))
    whole, _ = drawn(drawing.draw(model, 5, labels, batch_size=8, **options))
    assert some.images.shape == (5, 1, 8, 8) and some.seconds > 0
    torch.testing.assert_close(some.images, whole.images, atol=1e-5, rtol=1e-5)
    assert [state.done for state in told] == list(range(1, 10)) and {state.total for state in told} == {9}
    alone = diffusion.generate(
        model, diffusion.start_noise(model, 1, 5, 4), sampler=sampler, steps=3, class_labels=labels[4:],
        generator=diffusion.step_generators(1, 5, 4),
    )  # fmt: skip
    torch.testing.assert_close(some.images[4:], alone, atol=1e-5, rtol=1e-5)


def test_labels_are_those_of_a_word_one_label_or_all_in_turn(model):
    assert drawing.labels(model, 6).tolist() == [0, 1, 2, 3, 0, 1]
    assert drawing.labels(model, 3, label=2).tolist() == [2, 2, 2]
    assert drawing.labels(model, 3, word="BAD1").tolist() == [11, 10, 13, 1]


def test_a_model_without_classes_draws_without_labels(make_model):
    plain = make_model("uvit", num_classes=None)
    assert drawing.labels(plain, 6) is None
    with pytest.raises(ValueError, match="no classes"):
        next(drawing.draw(plain, 2, drawing.labels(plain, 2, label=1), steps=2))


def test_a_word_and_a_label_are_refused(model):
    with pytest.raises(ValueError, match="the word or the label"):
        drawing.labels(model, 3, word="A", label=1)


@pytest.mark.parametrize("guidance", [float("nan"), float("inf"), -5])
def test_guidance_is_a_finite_number(model, guidance):
    with pytest.raises(ValueError, match="guidance must be a finite number of at least 0"):
        next(drawing.draw(model, 2, drawing.labels(model, 2), steps=2, guidance=guidance))
