"""Sampling against diffusers' pipelines and schedulers stepped by hand, guidance against its formula, noise against its
contract, schedules against the configs that they are taken from."""

import json
import math
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
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


# --- diffusers' own pipelines and schedulers --------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "changes"), [
    ("ddpm", {}), ("ddpm", {"variance_type": "fixed_large"}), ("ddim", {}), ("ddim", {"timestep_spacing": "trailing"}),
    ("ddim", {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}),
    ("ddim", {"steps_offset": 1, "set_alpha_to_one": False}), ("ddim", {"clip_sample_range": 0.5}),
    ("ddpm", {"thresholding": True, "sample_max_value": 2.0, "dynamic_thresholding_ratio": 0.9}),
], ids=str)  # fmt: skip
def test_pictures_are_those_of_the_diffusers_pipeline_of_the_same_config(name, changes, make_model, tmp_path):
    model = make_model("unet", num_class_embeds=None).eval()
    pipeline = {"ddpm": diffusers.DDPMPipeline, "ddim": diffusers.DDIMPipeline}[name](model, diffusion.SAMPLERS[name](**changes))
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(tmp_path)
    options = {"batch_size": 2, "num_inference_steps": 5, "output_type": "np"}
    expected = pipeline(generator=torch.manual_seed(1), **options).images
    plain = type(pipeline)(model, diffusion.SAMPLERS[name]())
    plain.set_progress_bar_config(disable=True)
    assert not changes or abs(plain(generator=torch.manual_seed(1), **options).images - expected).max() > 1e-3
    loaded, generator = folders.load(tmp_path), torch.Generator().manual_seed(1)
    noise = torch.randn(2, 1, 8, 8, generator=generator)  # the pipeline's own
    drawn = diffusion.generate(loaded, noise, sampler=name, steps=5, generator=generator)
    assert abs((drawn / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy() - expected).max() < 1e-6


VELOCITY = {"prediction_type": "v_prediction"}


@pytest.fixture(scope="module")
def stable_diffusion():
    """A tiny text-to-image pipeline without a text encoder."""
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, attention_head_dim=8, cross_attention_dim=24,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), latent_channels=4, norm_num_groups=4, sample_size=8)
    parts = (vae, None, None, unet.eval(), diffusers.PNDMScheduler(), None, None)
    pipeline = diffusers.StableDiffusionPipeline(*parts, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize(("name", "calls", "changes"), [
    ("EulerDiscrete", 4, {}), ("EulerDiscrete", 4, VELOCITY), ("EulerDiscrete", 4, {"use_karras_sigmas": True}),
    ("EulerDiscrete", 4, {"timestep_spacing": "leading"}), ("EulerAncestralDiscrete", 4, VELOCITY), ("LMSDiscrete", 4, {}),
    ("HeunDiscrete", 7, VELOCITY), ("HeunDiscrete", 7, {"clip_sample": True}), ("KDPM2Discrete", 7, {}), ("PNDM", 13, VELOCITY),
    ("KDPM2AncestralDiscrete", 7, {}), ("UniPCMultistep", 4, {}), ("DPMSolverMultistep", 4, {"use_karras_sigmas": True}),
], ids=str)  # fmt: skip
def test_any_scheduler_of_diffusers_draws_what_its_pipeline_draws(name, calls, changes, stable_diffusion):
    pipeline, text, noise = stable_diffusion, torch.randn(2, 5, 24), torch.randn(2, 4, 8, 8)
    pipeline.scheduler = getattr(diffusers, f"{name}Scheduler")(steps_offset=1, **changes)
    options = {"latents": noise, "num_inference_steps": 4, "height": 8, "width": 8, "output_type": "latent"}
    prompts = {"prompt_embeds": text, "negative_prompt_embeds": torch.zeros_like(text)}
    expected = pipeline(**options, **prompts, guidance_scale=2.5, generator=torch.manual_seed(1)).images
    given = {"conditioning": {"encoder_hidden_states": text}, "negative": {"encoder_hidden_states": torch.zeros_like(text)}}
    options = {"sampler": pipeline.scheduler, "steps": 4, "guidance": 1.5, "generator": torch.manual_seed(1)}
    states = list(sample(pipeline.unet, noise, **options, **given))
    torch.testing.assert_close(states[-1].sample, expected, rtol=1e-5, atol=1e-4)
    assert [state.step for state in states] == list(range(1, calls + 1)) and {state.steps for state in states} == {calls}
    assert [state.timestep for state in states] == pipeline.scheduler.timesteps.tolist()


class Oracle(nn.Module):
    """A perfect denoiser of one known picture: predicts the noise, or the velocity, in x_t at any timestep."""

    def __init__(self, picture, kind, abar):
        super().__init__()
        self.config = SimpleNamespace(sample_size=8, in_channels=1)
        self.picture, self.kind, self.abar = nn.Parameter(picture), kind, abar

    def forward(self, x, t):
        sigma = torch.tensor(np.interp(float(t), range(1000), ((1 - self.abar) / self.abar).sqrt()))
        signal, spread = (1 / (1 + sigma**2).sqrt()).float(), (sigma / (1 + sigma**2).sqrt()).float()
        noise = (x - signal * self.picture) / spread
        return SimpleNamespace(sample=noise if self.kind == "epsilon" else signal * noise - spread * self.picture)


@pytest.mark.parametrize("name", [
    "EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete", "LMSDiscrete", "KDPM2Discrete", "DPMSolverMultistep", "PNDM",
])  # fmt: skip
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_preview_is_the_picture_that_a_perfect_denoiser_knows(name, kind):
    scheduler = getattr(diffusers, f"{name}Scheduler")(beta_start=1e-4, beta_end=0.02, prediction_type=kind)
    picture = 3 * torch.randn(2, 1, 8, 8)  # beyond -1 to 1: nothing is clamped
    model = Oracle(picture, kind, scheduler.alphas_cumprod)
    for state in sample(model, torch.randn(2, 1, 8, 8), sampler=scheduler, steps=6, generator=torch.manual_seed(1)):
        torch.testing.assert_close(state.x0, picture, rtol=0.02, atol=0.02)
    assert picture.abs().max() > 4


def test_the_preview_is_at_the_noise_level_of_the_step_where_its_timestep_is_rounded():
    scheduler = DPMSolverMultistepScheduler(use_karras_sigmas=True)
    for state in sample(Fake(num_classes=None), torch.randn(2, 1, 8, 8), sampler=scheduler, steps=6):
        torch.testing.assert_close(state.x0, scheduler.model_outputs[-1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "settings", "reach"), [
    ("ddim", {"clip_sample": False}, math.inf), ("ddim", {"clip_sample": True}, 1), ("ddim", {"clip_sample_range": 2.0}, 2),
    ("ddim", {"thresholding": True}, 1), ("dpm++", {"clip_sample": False}, math.inf), ("dpm++", {"clip_sample": True}, 1),
    ("dpm++", {"thresholding": True}, 1),
], ids=str)  # fmt: skip
def test_the_preview_is_bounded_as_the_config_says(name, settings, reach):
    model = Fake()
    model.config.noise_schedule = settings
    first = next(sample(model, 4 * start_noise(model, 2), sampler=name, steps=3)).x0.abs().max()
    assert first == reach or (reach == math.inf and first > 2)


@pytest.mark.parametrize(("scheduler", "message"), [
    (diffusers.FlowMatchEulerDiscreteScheduler(), "FlowMatchEulerDiscreteScheduler has no betas"),
    (diffusers.EDMEulerScheduler(), "EDMEulerScheduler has no betas"),
    (DDPMScheduler(variance_type="learned_range"), "DDPMScheduler with variance_type='learned_range'.*ddim"),
    (DDIMScheduler(steps_offset=1), "1000 steps reach timestep 1000, the last is 999"),
])  # fmt: skip
def test_schedulers_that_are_not_for_these_models_are_refused(scheduler, message):
    model = Fake()
    with pytest.raises(ValueError, match=message):
        diffusion.generate(model, torch.zeros(1, 1, 8, 8), sampler=scheduler, steps=1000)
    assert not model.calls


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


@pytest.mark.parametrize("guidance", [0.4, 2.0, 7.5])
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


def test_noise_is_that_of_every_earlier_version():
    start, step = start_noise(Fake(), 3, seed=3)[2], torch.randn(1, 8, 8, generator=diffusion.step_generators(3, seed=3)[2])
    for drawn, seed in ((start, 3_000_011), (step, 2**31 + 3_000_011)):
        assert torch.equal(drawn, torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(seed)))


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


STABLE_DIFFUSION = {
    "_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "beta_start": 0.00085, "num_train_timesteps": 1000, "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1,
    "trained_betas": None, "clip_sample": False,
}  # fmt: skip


@pytest.mark.parametrize("name", diffusion.SAMPLERS)
@pytest.mark.parametrize("source", [
    STABLE_DIFFUSION, DDIMScheduler(thresholding=True, timestep_spacing="trailing").config,
    DDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction").config,
    {"_class_name": "DDPMScheduler", "variance_type": "fixed_large", "steps_offset": 2, "clip_sample": False},
], ids=["Stable Diffusion", "spacing", "zero SNR", "DDPM"])  # fmt: skip
def test_a_sampler_has_every_setting_of_its_source_that_diffusers_would_give_it(name, source):
    expected, made = diffusion.SAMPLERS[name].from_config(source).config, make_scheduler(name, source).config
    own = set(diffusion.SAMPLERS[name]().config) - {"_use_default_values", "variance_type"}
    assert {key: made[key] for key in own} == {key: expected[key] for key in own}
    if name == "ddpm":
        assert made["variance_type"] == expected["variance_type"]


def test_the_noise_schedule_is_the_sources_even_where_classes_differ_in_their_defaults():
    heun = diffusers.HeunDiscreteScheduler()
    assert torch.equal(make_scheduler("ddim", heun).betas, heun.betas) and heun.betas[-1] == pytest.approx(0.012)
    saved = json.loads(heun.to_json_string())
    for key in ("beta_start", "beta_end"):
        del saved[key]
    assert torch.equal(make_scheduler("ddim", saved).betas, heun.betas)
    assert not make_scheduler("ddim", heun).config.clip_sample
    assert not make_scheduler("ddim", EulerDiscreteScheduler()).config.clip_sample  # which has no such setting
    zero = make_scheduler("ddim", EulerDiscreteScheduler(rescale_betas_zero_snr=True))
    assert zero.alphas_cumprod[-1] == 0


@pytest.mark.parametrize(("name", "settings", "message"), [
    ("dpm++", {"clip_sample_range": 2.0}, r"sampler dpm\+\+ cannot keep clip_sample_range=2.0.*pass a diffusers scheduler"),
    ("dpm++", {"clip_sample_range": 2.0, "clip_sample": False}, None),
    ("ddim", {"use_karras_sigmas": True}, "sampler ddim cannot keep use_karras_sigmas=True"),
    ("dpm++", {"use_karras_sigmas": True}, None),
    ("dpm++", {"interpolation_type": "log_linear"}, "interpolation_type='log_linear'"),
    ("ddpm", {"sigma_max": 80.0}, "sigma_max=80.0"),
    ("ddim", {"timestep_type": "continuous"}, "timestep_type='continuous'"),
    ("dpm++", {"use_flow_sigmas": True}, "use_flow_sigmas=True"),
    ("ddim", {"snr_shift_scale": 3.0}, "snr_shift_scale=3.0"),
    ("ddim", {"predict_epsilon": False}, "predict_epsilon=False"),
    ("ddim", {"predict_epsilon": True, "snr_shift_scale": 1.0, "sigma_min": None, "final_sigmas_type": "zero"}, None),
    ("ddim", {"beta_schedule": "sigmoid"}, "make no DDIMScheduler: sigmoid is not implemented"),
    ("ddpm", {"beta_schedule": "sigmoid"}, None),
    ("ddim", {"_class_name": "EDMEulerScheduler", "sigma_data": 0.5}, "EDMEulerScheduler has no betas"),
    ("ddim", {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}, "FlowMatchEulerDiscreteScheduler has no betas"),
    ("ddim", {"prediction_type": "flow_prediction"}, "'flow_prediction'; known: epsilon, v_prediction, sample"),
    ("ddim", {"num_train_timesteps": 0}, "num_train_timesteps.* not 0"),
    ("ddim", {"num_train_timesteps": 10**12}, "num_train_timesteps.* not 1000000000000"),
    ("ddim", {"beta_end": "0.02"}, "make no DDIMScheduler"),
    ("ddim", {"beta_end": math.nan}, r"1000 numbers in 0\.\.1"),
    ("ddim", {"trained_betas": [0.1, 0.2]}, r"1000 numbers in 0\.\.1"),
    ("ddim", {"timestep_spacing": "uneven"}, "make no DDIMScheduler: uneven"),
    ("ddim", [0.1, 0.2], "not a list"),
], ids=str)  # fmt: skip
def test_what_a_sampler_cannot_keep_is_named(name, settings, message):
    if message is None:
        assert type(make_scheduler(name, settings)) is diffusion.SAMPLERS[name]
        return
    with pytest.raises(ValueError, match=message):
        make_scheduler(name, settings)


@pytest.mark.parametrize("settings", [
    STABLE_DIFFUSION, {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    {"use_karras_sigmas": True, "variance_type": "learned_range", "clip_sample_range": 3.0, "timestep_spacing": "trailing"},
])  # fmt: skip
def test_training_follows_the_forward_process_whatever_the_samplers_settings(settings, make_model):
    model, x0, noise = make_model("unet"), torch.randn(3, 1, 8, 8), torch.randn(3, 1, 8, 8)
    model.register_to_config(noise_schedule=settings)
    t, expected = torch.tensor([0, 500, 999]), DDPMScheduler.from_config(settings)
    scheduler = diffusion.training_scheduler(model)
    assert torch.equal(diffusion.add_noise(scheduler, x0, noise, t), expected.add_noise(x0, noise, t))
    assert scheduler.config.prediction_type == settings.get("prediction_type", "epsilon")


def test_training_on_a_scheduler_of_sigmas_is_training_on_its_betas():
    euler, x0, noise = EulerDiscreteScheduler(prediction_type="v_prediction"), torch.randn(2, 1, 4, 4), torch.randn(2, 1, 4, 4)
    t, ddpm = torch.tensor([10, 900]), DDPMScheduler(prediction_type="v_prediction")
    assert torch.equal(diffusion.add_noise(euler, x0, noise, t), ddpm.add_noise(x0, noise, t))
    assert torch.equal(diffusion.target(euler, x0, noise, t), ddpm.get_velocity(x0, noise, t))


@pytest.mark.parametrize(("settings", "message"), [
    ({"snr_shift_scale": 3.0}, "training cannot keep snr_shift_scale=3.0"),
    ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}, "FlowMatchEulerDiscreteScheduler has no betas"),
])  # fmt: skip
def test_what_training_cannot_keep_is_named(settings, message, make_model):
    model = make_model("unet")
    model.register_to_config(noise_schedule=settings)
    with pytest.raises(ValueError, match=message):
        diffusion.training_scheduler(model)


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


def test_a_module_of_ones_own_without_a_config_samples_from_given_noise(own):
    noise = torch.randn(2, 1, 8, 8)
    states = list(sample(own, noise, steps=3))
    assert len(states) == 3 and states[-1].sample.shape == noise.shape
    with pytest.raises(ValueError, match="no classes: leave class_labels out"):
        next(sample(own, noise, steps=3, class_labels=torch.tensor([0, 1])))
    with pytest.raises(ValueError, match="Own has no config.sample_size and in_channels; give it both"):
        start_noise(own, 2)
