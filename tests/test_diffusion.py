"""Sampling against diffusers' schedulers stepped by hand, guidance against its formula, noise against its contract."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from torch import nn

from sparsedm import diffusion
from sparsedm.checkpoints import folders
from sparsedm.diffusion import make_scheduler, predict_x0, sample, start_noise
from sparsedm.models import denoisers

PREDICTIONS = ["epsilon", "v_prediction", "sample"]
SCHEDULE = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear", "clip_sample": True}
BY_HAND = {
    "ddim": lambda kind: DDIMScheduler(**SCHEDULE, prediction_type=kind),
    "ddpm": lambda kind: DDPMScheduler(**SCHEDULE, prediction_type=kind),
    "dpm++": lambda kind: DPMSolverMultistepScheduler(
        **{k: v for k, v in SCHEDULE.items() if k != "clip_sample"},
        prediction_type=kind, algorithm_type="dpmsolver++", solver_order=2,
    ),
}  # fmt: skip


class Fake(nn.Module):
    """A denoiser with 3 classes and "none": predicts x / 2 plus one number per class, and remembers its calls."""

    def __init__(self, table=(0.1, -0.2, 0.3, 0.05), num_classes=4):
        super().__init__()
        self.config = SimpleNamespace(sample_size=8, in_channels=1, num_classes=num_classes)
        self.table = nn.Parameter(torch.tensor(table))
        self.calls = []

    def forward(self, x, t, class_labels=None):
        self.calls.append((len(x), int(t), None if class_labels is None else class_labels.tolist()))
        shift = 0 if class_labels is None else self.table[class_labels].view(-1, 1, 1, 1)
        return SimpleNamespace(sample=x / 2 + shift)


@pytest.mark.parametrize("steps", [1, 7, 50])
@pytest.mark.parametrize("kind", PREDICTIONS)
@pytest.mark.parametrize("name", BY_HAND)
def test_sampling_equals_the_diffusers_scheduler_stepped_by_hand(make_model, name, kind, steps):
    model, labels = make_model("uvit").eval(), torch.tensor([0, 3])
    model.register_to_config(noise_schedule={**SCHEDULE, "prediction_type": kind})
    noise, seed = start_noise(model, 2, seed=5), torch.Generator
    states = sample(model, noise, sampler=name, steps=steps, class_labels=labels, generator=seed().manual_seed(1))
    scheduler, generator, x = BY_HAND[name](kind), seed().manual_seed(1), noise
    scheduler.set_timesteps(steps)
    for i, (t, state) in enumerate(zip(scheduler.timesteps, states, strict=True), 1):
        with torch.no_grad():
            output = model(x, t, class_labels=labels).sample
        stepped = scheduler.step(output, t, x, generator=generator)
        x = stepped.prev_sample
        assert (state.step, state.steps, state.timestep) == (i, steps, int(t)) and state.seconds > 0
        assert torch.equal(state.sample, x)
        if name != "dpm++":
            torch.testing.assert_close(state.x0, stepped.pred_original_sample, rtol=1e-4, atol=1e-5)
    assert i == steps and not x.requires_grad


def test_a_scheduler_object_is_used_as_it_is(make_model):
    model, noise = make_model("unet").eval(), torch.randn(1, 1, 8, 8)
    scheduler = DDIMScheduler(beta_end=0.03, prediction_type="sample", timestep_spacing="trailing")
    assert next(sample(model, noise, sampler=scheduler, steps=4)).timestep == 999
    assert next(sample(model, noise, sampler="ddim", steps=4)).timestep == 750


def test_generate_is_the_last_state_of_sample(make_model):
    model = make_model("uvit").eval()
    noise = start_noise(model, 1)
    *_, last = sample(model, noise, steps=3)
    assert torch.equal(diffusion.generate(model, noise, steps=3), last.sample)


def test_a_repeated_run_is_equal_and_another_noise_is_not(make_model):
    model = make_model("unet").eval()
    one, again, other = (diffusion.generate(model, start_noise(model, 2, seed), steps=3) for seed in (0, 0, 1))
    assert torch.equal(one, again) and not torch.equal(one, other)


# --- what the network predicts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PREDICTIONS)
@pytest.mark.parametrize("t", [0, 10, 500, 900])
def test_predict_x0_inverts_add_noise_for_the_training_target(kind, t):
    scheduler = make_scheduler("ddpm", {**SCHEDULE, "prediction_type": kind})
    x0, noise = torch.rand(3, 1, 4, 4).double() * 2 - 1, torch.randn(3, 1, 4, 4).double()
    times = torch.full((3,), t)
    x_t = scheduler.add_noise(x0, noise, times)
    goal = diffusion.target(scheduler, x0, noise, times)
    expected = {"epsilon": noise, "v_prediction": scheduler.get_velocity(x0, noise, times), "sample": x0}[kind]
    assert torch.equal(goal, expected)
    torch.testing.assert_close(predict_x0(scheduler, goal, t, x_t), x0, rtol=1e-3, atol=1e-3)
    assert predict_x0(scheduler, goal * 100, t, x_t * 100).abs().max() <= 1


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_predict_x0_takes_one_timestep_per_picture(kind):
    scheduler = make_scheduler("ddpm", {**SCHEDULE, "prediction_type": kind})
    x0, noise, t = torch.rand(4, 1, 4, 4).double(), torch.randn(4, 1, 4, 4).double(), torch.tensor([0, 100, 400, 800])
    goal = diffusion.target(scheduler, x0, noise, t)
    torch.testing.assert_close(predict_x0(scheduler, goal, t, scheduler.add_noise(x0, noise, t)), x0, rtol=1e-3, atol=1e-3)


def test_an_unknown_prediction_type_is_named():
    scheduler = DDPMScheduler()
    scheduler.register_to_config(prediction_type="score")
    with pytest.raises(ValueError, match="'score'.*v_prediction"):
        diffusion.target(scheduler, *[torch.zeros(1, 1, 2, 2)] * 2, torch.tensor([0]))


# --- labels and guidance ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [0.4, 2.0, -0.5])
def test_guidance_is_cond_plus_g_times_cond_minus_uncond(guidance):
    table, labels = (0.1, -0.2, 0.3, 0.05), torch.tensor([2, 0])
    guided = Fake(table)
    # x / 2 is common to both halves, so guidance only changes the number of each class
    equivalent = Fake(tuple(c + guidance * (c - table[3]) for c in table))
    noise = start_noise(guided, 2)
    options = {"steps": 4, "class_labels": labels}
    expected = diffusion.generate(equivalent, noise, **options)
    torch.testing.assert_close(diffusion.generate(guided, noise, guidance=guidance, **options), expected, rtol=1e-5, atol=1e-5)
    assert guided.calls[0] == (4, 750, [2, 0, 3, 3]) and len(guided.calls) == 4
    assert equivalent.calls[0] == (2, 750, [2, 0])


def test_without_labels_a_conditional_model_draws_with_the_null_label():
    model = Fake()
    diffusion.generate(model, start_noise(model, 2), steps=1)
    assert model.calls == [(2, 0, [3, 3])]


def test_an_unconditional_model_gets_no_labels():
    model = Fake(num_classes=None)
    diffusion.generate(model, start_noise(model, 2), steps=1)
    assert model.calls == [(2, 0, None)]


@pytest.mark.parametrize("config, null", [
    ({"num_classes": 37}, 36), ({"num_class_embeds": 5}, 4), ({"num_classes": None, "num_class_embeds": None}, None), ({}, None),
], ids=str)  # fmt: skip
def test_null_label_is_the_last_of_the_table(config, null):
    assert denoisers.null_label(SimpleNamespace(config=SimpleNamespace(**config))) == null


# --- noise ------------------------------------------------------------------------------------------------------------


def test_noise_of_a_picture_depends_on_seed_and_number_alone():
    model = Fake()
    noise = start_noise(model, 6, seed=3)
    assert noise.shape == (6, 1, 8, 8) and len({tuple(row.flatten().tolist()) for row in noise}) == 6
    assert torch.equal(start_noise(model, 2, seed=3), noise[:2])
    assert torch.equal(start_noise(model, 3, seed=3, first=2), noise[2:5])
    assert not torch.isin(start_noise(model, 6, seed=4), noise).any()
    many = start_noise(model, 500)
    assert abs(many.mean().item()) < 0.02 and many.std().item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("name", BY_HAND)
def test_a_picture_depends_on_seed_and_number_alone(name):
    def draw(n, seed, first=0):
        generators, noise = diffusion.step_generators(n, seed, first), start_noise(Fake(), n, seed, first)
        return diffusion.generate(Fake(), noise, sampler=name, steps=5, generator=generators)

    pictures = draw(6, seed=3)
    assert torch.equal(draw(2, 3, first=3), pictures[3:5]) and torch.equal(draw(1, 3, first=5), pictures[5:])
    assert (draw(6, seed=4) != pictures).float().mean() > 0.9


def test_the_noise_of_steps_is_not_that_of_the_start():
    steps = torch.stack([torch.randn(1, 8, 8, generator=generator) for generator in diffusion.step_generators(6, seed=3)])
    assert not torch.isin(steps, start_noise(Fake(), 6, seed=3)).any()


def test_noise_does_not_disturb_the_global_generator():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    start_noise(Fake(), 2)
    assert torch.equal(torch.rand(3), expected)


def test_noise_takes_a_rectangular_sample_size():
    model = Fake()
    model.config.sample_size = (4, 6)
    assert start_noise(model, 2).shape == (2, 1, 4, 6)


# --- schedulers by name, errors ---------------------------------------------------------------------------------------


def test_the_scheduler_follows_the_models_noise_schedule():
    model = folders.load("glyphs-uvit")
    for name, cls in diffusion.SAMPLERS.items():
        scheduler = make_scheduler(name, model)
        assert type(scheduler) is cls and scheduler.config.prediction_type == "v_prediction"
        torch.testing.assert_close(scheduler.betas, torch.linspace(1e-4, 0.02, 1000))
    source = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="sample")
    assert torch.equal(make_scheduler("ddim", source).betas, source.betas)
    assert make_scheduler("ddim", source.config).config.prediction_type == "sample"
    assert make_scheduler("ddim").config.prediction_type == "epsilon"


def test_an_unknown_sampler_lists_the_known_ones():
    with pytest.raises(ValueError, match="'euler'.*ddim, ddpm, dpm\\+\\+"):
        diffusion.generate(Fake(), torch.zeros(1, 1, 8, 8), sampler="euler")


@pytest.mark.parametrize("model, options, message", [
    (Fake(), {"steps": 0}, r"1\.\.1000, not 0"),
    (Fake(), {"steps": 1001}, r"1\.\.1000, not 1001"),
    (Fake(num_classes=None), {"guidance": 1.0}, "no classes"),
    (Fake(num_classes=None), {"class_labels": torch.tensor([0])}, "no classes"),
    (Fake(), {"class_labels": torch.tensor([4])}, "the classes of this model are 0 to 2, and 3 for none"),
    (Fake(), {"class_labels": torch.tensor([-1])}, "the classes of this model are 0 to 2, and 3 for none"),
])  # fmt: skip
def test_bad_sampling_arguments_are_errors(model, options, message):
    with pytest.raises(ValueError, match=message):
        diffusion.generate(model, torch.zeros(1, 1, 8, 8), **options)
    assert not model.calls
