"""Training: what the loss is, that it learns, and that a killed run ends where an unbroken one does."""

import copy
import functools
import random

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import Dataset

import sparsedm
from sparsedm import data, diffusion, plots
from sparsedm.masking import layers, nm
from sparsedm.models.uvit import UViTModel
from sparsedm.support import processes
from sparsedm.training import checkpoint, distill, recovery, runlog

STEPS = {"steps": 6, "batch_size": 8, "lr": 1e-3, "warmup": 2, "checkpoint_every": 2}


def tiny(dropout: bool = False) -> UViTModel:
    torch.manual_seed(3)
    model = UViTModel(sample_size=8, in_channels=1, embed_dim=16, depth=2, num_heads=2, num_classes=11)
    if dropout:
        model.mid_block.mlp.act = nn.Sequential(nn.GELU(), nn.Dropout(0.5))
    return model


def run(model, **options):
    return list(distill.train(model, "digits", **{**STEPS, **options}))


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_pictures_of_a_named_set_have_the_models_size(tmp_path, make_model):
    for name in "abcd":
        Image.new("RGB", (20, 12)).save(tmp_path / f"{name}.png")
    model, seen = make_model("unet", in_channels=3, out_channels=3), []
    model.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape)))
    list(distill.train(model, f"folder:{tmp_path}", steps=1, batch_size=4))
    assert seen == [(4, 3, 8, 8)]


@pytest.mark.parametrize("schedule, sampler", [({}, "dpm++"), ({"clip_sample_range": 2.0}, "ddim")], ids=str)
def test_a_preview_takes_the_first_sampler_that_keeps_the_noise_schedule(schedule, sampler, tmp_path):
    model = tiny()
    model.register_to_config(noise_schedule=schedule)
    *_, state = distill.train(model, "digits", steps=1, batch_size=2)
    noise, labels = diffusion.start_noise(model, runlog.GRID), torch.arange(runlog.GRID) % 10
    images = diffusion.generate(state.ema_model(), noise, sampler=sampler, steps=20, class_labels=labels)
    with Image.open(runlog.RunLog(tmp_path / "log.jsonl").draw(state)) as drawn:
        assert drawn.tobytes() == plots.picture(images, columns=4, scale=runlog.scale(images)).tobytes()


def test_a_preview_names_the_setting_that_no_sampler_keeps(tmp_path):
    model = tiny()
    *_, state = distill.train(model, "digits", steps=1, batch_size=2)
    model.register_to_config(noise_schedule={"use_flow_sigmas": True})
    with pytest.raises(ValueError, match=r"sampler dpm\+\+ cannot keep use_flow_sigmas=True"):
        runlog.RunLog(tmp_path / "log.jsonl").draw(state)


@pytest.mark.parametrize("optimizer", checkpoint.OPTIMIZERS)
@pytest.mark.parametrize("stop", [1, 2, 5])
def test_stopped_and_resumed_run_ends_with_the_same_weights(tmp_path, stop, optimizer):
    whole, broken = tiny(dropout=True), tiny(dropout=True)
    run(whole, optimizer=optimizer)
    states = distill.train(broken, "digits", out=tmp_path, optimizer=optimizer, **STEPS)
    for _ in range(stop):
        next(states)
    states.close()
    resumed = tiny(dropout=True)
    run(resumed, out=tmp_path, optimizer=optimizer)
    assert equal(whole, resumed)


def test_sparse_schedule_resumes_exactly(tmp_path):
    options = {"pattern_schedule": ((0, "7:8"), (3, "2:4")), "teacher_weight": 0.5}
    teacher = tiny()
    whole, broken, resumed = (layers.sparsify(tiny(), "2:4") for _ in range(3))
    list(distill.finetune(whole, teacher, "digits", **STEPS, **options))
    states = distill.finetune(broken, teacher, "digits", out=tmp_path, **STEPS, **options)
    patterns = [str(next(layers.nm_layers(state.model))[1].pattern) for state, _ in zip(states, range(5))]
    assert patterns == ["7:8", "7:8", "7:8", "2:4", "2:4"]
    list(distill.finetune(resumed, teacher, "digits", out=tmp_path, **STEPS, **options))
    assert equal(whole, resumed)
    assert str(next(layers.nm_layers(resumed))[1].pattern) == "2:4"


def test_loss_is_noise_error_plus_weighted_teacher_error():
    student, teacher = layers.sparsify(tiny(), "2:4"), tiny()
    nn.init.normal_(teacher.decoder_pred.weight)
    before = copy.deepcopy(student).train()
    state = next(distill.finetune(student, teacher, "digits", noise_weight=2.0, teacher_weight=0.3, p_uncond=0.0, **STEPS))
    scheduler = diffusion.make_scheduler("ddpm")
    indices = next(iter(data.StepSampler(len(data.Digits()), 8, 0, 0, 1)))
    images, labels = (torch.stack([torch.as_tensor(data.Digits()[i][k]) for i in indices]) for k in (0, 1))
    torch.manual_seed(0)  # step 0 of seed 0
    torch.rand(8)
    t, noise = torch.randint(1000, (8,)), torch.randn(images.shape)
    noisy = scheduler.add_noise(images, noise, t)
    out, wanted = before(noisy, t, labels).sample, teacher(noisy, t, labels).sample
    assert state.terms["noise"] == pytest.approx(F.mse_loss(out, noise).item(), rel=1e-5)
    assert state.terms["teacher"] == pytest.approx(F.mse_loss(out, wanted).item(), rel=1e-5)
    assert state.loss == pytest.approx(2 * state.terms["noise"] + 0.3 * state.terms["teacher"], rel=1e-5)
    assert not any(p.grad is not None for p in teacher.parameters())
    assert not teacher.training


class Blank(Dataset):
    """Sixteen pictures of zeros, whose noisy pictures are the noise alone, scaled."""

    classes = ("none",)

    def __len__(self):
        return 16

    def __getitem__(self, i):
        return torch.zeros(1, 8, 8), 0


def test_the_loss_is_that_of_sparsedm():
    """Its code: MSE(eps, student) + 0.1 MSE(teacher, student), each the mean over C, H, W and then over the batch."""
    student, teacher, calls = layers.sparsify(tiny(), "2:4"), tiny(), {}
    nn.init.normal_(teacher.decoder_pred.weight)
    for name, model in (("student", student), ("teacher", teacher)):
        model.register_forward_hook(lambda module, args, output, name=name: calls.update({name: (*args, output.sample.detach())}))
    state = next(distill.finetune(student, teacher, Blank(), p_uncond=0.0, **STEPS))
    noisy, t, predicted = calls["student"]
    abar = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64).mul(-1).add(1).cumprod(0)[t].view(-1, 1, 1, 1)
    noise = noisy / (1 - abar).sqrt()
    assert torch.equal(noisy, calls["teacher"][0]) and abs(noise.std() - 1) < 0.1
    first, second = ((goal - predicted).square().mean((1, 2, 3)).mean() for goal in (noise, calls["teacher"][2]))
    assert state.loss == pytest.approx((first + 0.1 * second).item(), rel=1e-5) and second > 0.1 * first


def test_the_average_of_weights_follows_the_ramp_that_its_settings_state():
    model, decay = tiny(), 0.2
    weight = model.norm.weight
    averages, raw = [], []
    for state in distill.train(model, "digits", **{**STEPS, "ema_decay": decay}):
        averages.append(dict(state.ema_model().named_parameters())["norm.weight"].detach())
        raw.append(weight.detach().clone())
    assert torch.equal(averages[0], raw[0])  # decay 0 at the first step
    for s in range(1, len(raw)):
        d = min(decay, (1 + s) / (10 + s))
        torch.testing.assert_close(averages[s], d * averages[s - 1] + (1 - d) * raw[s], rtol=0, atol=1e-6)
    assert 2 / 11 < decay < 3 / 12  # both ends of the ramp were there
    assert "min(d, (1 + s) / (10 + s))" in distill.TrainConfig.__doc__


def test_velocity_models_are_trained_on_velocity():
    model = tiny()
    model.register_to_config(noise_schedule={"prediction_type": "v_prediction"})
    noise_loss, velocity_loss = run(tiny(), steps=1)[0].loss, run(model, steps=1)[0].loss
    assert noise_loss != pytest.approx(velocity_loss, rel=1e-3)


@pytest.mark.parametrize("optimizer", checkpoint.OPTIMIZERS)
def test_training_learns(optimizer):
    losses = [s.loss for s in run(tiny(), steps=150, batch_size=32, lr=3e-3, optimizer=optimizer)]
    assert sum(losses[-20:]) < 0.7 * sum(losses[:20])


def test_model_holds_the_ema_weights_at_the_end_and_the_raw_ones_before():
    model = tiny()
    states = distill.train(model, "digits", **{**STEPS, "ema_decay": 0.9})
    last = None
    for last in states:
        if last.step == STEPS["steps"]:
            averaged = last.ema_model()
            assert not equal(averaged, model)
    assert equal(averaged, model)
    assert not model.training


def test_decoupled_decay_shrinks_the_pruned_weights():
    frozen = {"lr": 0.1, "warmup": 0, "noise_weight": 0.0, "teacher_weight": 0.0, "clip": 0}
    model = layers.sparsify(tiny(), "2:4", decay=0.5, decay_mode="decoupled")
    before, mask = model.mid_block.attn.proj.weight.detach().clone(), model.mid_block.attn.proj.mask()
    next(distill.finetune(model, None, "digits", **{**STEPS, **frozen}))
    expected = torch.where(mask, before, before * (1 - 0.1 * 0.5))
    torch.testing.assert_close(model.mid_block.attn.proj.weight.detach(), expected)


def test_global_random_state_is_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    run(tiny_with_state_kept(), steps=2)
    assert torch.equal(torch.rand(3), expected)


def tiny_with_state_kept() -> UViTModel:
    with torch.random.fork_rng():
        return tiny()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be a whole number of at least 1, not 0"),
        ({"steps": 2.5}, "steps must be a whole number of at least 1, not 2.5"),
        ({"batch_size": True}, "batch_size must be a whole number"),
        ({"lr": "much"}, "lr must be a finite number of at least 0, not 'much'"),
        ({"lr": float("nan")}, "lr must be a finite number"),
        ({"clip": float("inf")}, "clip must be a finite number"),
        ({"betas": (0.9,)}, r"betas must be \(a finite number from 0 to 1, .*\), not \(0.9,\)"),
        ({"ema_decay": 7}, "ema_decay must be a finite number from 0 to 1, not 7"),
        ({"p_uncond": 5}, "p_uncond must be a finite number from 0 to 1, not 5"),
        ({"warmup": -5}, "warmup must be a whole number of at least 0, not -5"),
        ({"flip": "yes"}, "flip must be true or false, not 'yes'"),
        ({"seed": 2**70}, "seed must be a whole number from 0 to 4294967295"),
        ({"mixed_precision": "bf8"}, "unknown mixed_precision 'bf8'; known: no, fp16, bf16"),
        ({"lr_schedule": "piecewise_constant"}, "unknown lr_schedule .*; known: .*cosine"),
        ({"pattern_schedule": (5, "2:4")}, r"pattern_schedule must be a list of \(a whole number of at least 0, text\)"),
        ({"pattern_schedule": ((0, "4:2"),)}, "pattern 4:2 is not N:M"),
        ({"pattern_schedule": ((0, "4:4"),)}, "pattern 4:4 keeps every weight"),
        ({"optimizer": "sgdm"}, "unknown optimizer 'sgdm'; known: adamw, muon"),
        ({"pattern_schedule": ((5, "2:4"), (0, "7:8"))}, "must increase"),
        ({"batch_size": 4000}, "larger than the data set"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        run(tiny(), **options)


class Pictures(Dataset):
    """Grey pictures of some shape, all of one label, in so many classes."""

    def __init__(self, *shape: int, classes: int = 1):
        self.shape, self.classes = shape, tuple(map(str, range(classes)))

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int):
        return torch.zeros(self.shape), 0


@pytest.mark.parametrize(
    ("pictures", "message"),
    [
        (Pictures(3, 8, 8), "UViTModel takes pictures of 1 channels, those of the data set have 3$"),
        (Pictures(1, 8, 16), r"this U-ViT takes pictures of shape \[1, 8, 8\], not \[1, 8, 16\]"),
        (Pictures(1, 8, 8, classes=12), "UViTModel has 10 classes and a label for none, the data set 12$"),
        (Pictures(1, 8, 8, classes=11), "the data set 11; set p_uncond=0"),
    ],
)
def test_pictures_that_do_not_fit_the_model_are_refused(pictures, message):
    with pytest.raises(ValueError, match=message):
        next(distill.train(tiny(), pictures, **STEPS))


def test_a_table_without_a_label_for_none_is_trained_on_all_its_labels():
    assert next(distill.train(tiny(), Pictures(1, 8, 8, classes=11), **{**STEPS, "p_uncond": 0.0})).step == 1


def test_pictures_of_a_named_data_set_have_the_models_size(make_model, tmp_path):
    for i in range(4):
        Image.new("RGB", (40, 36), (60 * i, 0, 0)).save(tmp_path / f"{i}.png")
    model, seen = make_model("unet", sample_size=24, in_channels=3, out_channels=3, num_class_embeds=None), []
    model.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    list(distill.train(model, f"folder:{tmp_path}", steps=1, batch_size=4))
    assert seen == [(4, 3, 24, 24)]


def test_unknown_data_set_lists_the_known_ones():
    with pytest.raises(ValueError, match="unknown data set 'glyfs'; known: glyphs"):
        next(distill.train(tiny(), "glyfs", **STEPS))


def test_checkpoint_of_other_settings_is_refused(tmp_path):
    run(tiny(), out=tmp_path)
    with pytest.raises(ValueError, match="lr 0.001 instead of 0.5"):
        run(tiny(), out=tmp_path, lr=0.5)


def test_damaged_checkpoint_is_refused_by_name(tmp_path):
    run(tiny(), out=tmp_path)
    path = tmp_path / distill.CHECKPOINT
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="checkpoint.pt is not a readable checkpoint"):
        run(tiny(), out=tmp_path)


def test_a_flipped_bit_of_a_checkpoint_is_refused_or_changes_nothing(tmp_path):
    whole, draw, refused = tiny(), random.Random(0), 0
    run(whole, out=tmp_path)
    path = tmp_path / distill.CHECKPOINT
    content = path.read_bytes()
    for _ in range(60):
        damaged = bytearray(content)
        damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        again = tiny()
        try:
            run(again, out=tmp_path)  # it has no step left: the weights are those of the checkpoint
        except ValueError as error:
            assert path.name in str(error)
            refused += 1
            continue
        assert equal(whole, again)
    assert refused > 30


def _change_optimizer(state, key, change):
    entry = state["states"][2]["state"][0]
    entry[key] = change(entry[key])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: _change_optimizer(c, "exp_avg", lambda x: x.flatten()[:3]), r"exp_avg of parameter 0 has shape \[3\]"),
        (lambda c: _change_optimizer(c, "exp_avg_sq", lambda x: x.mT.contiguous()), "exp_avg_sq of parameter 0 has shape"),
        (lambda c: _change_optimizer(c, "step", lambda x: torch.ones(5)), r"step of parameter 0 has shape \[5\], not \[\]"),
        (lambda c: c["states"][2]["state"][0].pop("exp_avg_sq"), "its optimizer keeps step, exp_avg of parameter 0"),
        (lambda c: c["states"][2]["param_groups"][0]["params"].reverse(), "its optimizer has other parameters"),
        (lambda c: c["states"][1]["shadow_params"].__setitem__(0, torch.zeros(3)), r"the average has shape \[3\]"),
        (lambda c: c["states"][1]["shadow_params"].pop(), "checkpoint.pt is not of this model"),
        (lambda c: c["states"][0].popitem(), "checkpoint.pt is not of this model.*final_layer"),
        (lambda c: c["states"].pop(), "checkpoint.pt is not of this model"),
        (lambda c: c.update(config=3), "checkpoint.pt is not a readable checkpoint"),
        (lambda c: c.update(step="6"), "checkpoint.pt is not a readable checkpoint"),
    ],
)
def test_a_checkpoint_whose_tensors_have_other_shapes_is_refused_before_an_optimizer_sees_them(tmp_path, change, message):
    _stop(distill.train(tiny(), "digits", out=tmp_path, **STEPS), 2)
    path = tmp_path / distill.CHECKPOINT
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)
    with pytest.raises(ValueError, match=message):
        run(tiny(), out=tmp_path)


def _stop(states, steps):
    for _ in range(steps):
        next(states)
    states.close()


def test_moments_of_an_optimizer_get_the_strides_of_their_parameters(tmp_path):
    whole, resumed = tiny(), tiny()
    run(whole)
    _stop(distill.train(tiny(), "digits", out=tmp_path, **STEPS), 2)
    content = torch.load(tmp_path / distill.CHECKPOINT, weights_only=True)
    for entry in content["states"][2]["state"].values():
        for key in ("exp_avg", "exp_avg_sq"):
            entry[key] = entry[key].movedim(0, -1).contiguous().movedim(-1, 0)  # the same numbers, in another order in memory
    torch.save(content, tmp_path / distill.CHECKPOINT)
    run(resumed, out=tmp_path)
    assert equal(whole, resumed)


def test_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tmp_path):
    model = tiny()
    states = distill.train(model, "digits", out=tmp_path, **STEPS)
    next(states), next(states)
    kept = (tmp_path / distill.CHECKPOINT).read_bytes()
    with torch.no_grad():
        model.norm.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="the loss is nan at step 3; .* lower lr; the last checkpoint is"):
        next(states)
    assert (tmp_path / distill.CHECKPOINT).read_bytes() == kept
    whole, resumed = tiny(), tiny()
    run(whole)
    assert run(resumed, out=tmp_path)[0].step == 3 and equal(whole, resumed)


def test_a_run_whose_disk_filled_up_goes_on_from_the_previous_checkpoint(tmp_path):
    resource = pytest.importorskip("resource")
    whole, broken, resumed = tiny(), tiny(), tiny()
    run(whole)
    states, path = distill.train(broken, "digits", out=tmp_path, **STEPS), tmp_path / distill.CHECKPOINT
    next(states), next(states)
    kept, (soft, hard) = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(kept) // 2, hard))  # no file may grow beyond
    try:
        next(states)
        with pytest.raises(OSError, match="what was there is untouched"):
            next(states)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == kept and not list(tmp_path.glob("*.tmp"))
    assert run(resumed, out=tmp_path)[0].step == 3 and equal(whole, resumed)


@pytest.mark.parametrize("option", [{"accumulate": 4}, {"gradient_checkpointing": True}, {"compile": True}])
def test_options_that_save_memory_or_time_change_no_gradients(option, tmp_path, monkeypatch):
    traced = functools.partial(torch.compile, backend="aot_eager")  # sparse layers as C++ code: test_layers
    monkeypatch.setattr(torch, "compile", traced)

    def first_step(name, **options):
        teacher, student = tiny(), layers.sparsify(tiny(), "2:4")
        options = {**STEPS, "steps": 1, "warmup": 0, "clip": 0.0, "teacher_weight": 0.5, **options}
        (state,) = distill.finetune(student, teacher, "digits", out=tmp_path / name, **options)
        saved = torch.load(tmp_path / name / distill.CHECKPOINT, weights_only=True)["states"][2]["state"]
        return state, [entry["exp_avg"] for entry in saved.values()]  # AdamW's: a tenth of the gradients

    (plain, expected), (other, gradients) = first_step("plain"), first_step("other", **option)
    assert other.terms == pytest.approx(plain.terms) and other.loss == pytest.approx(plain.loss)
    assert sum(float(x.abs().sum()) for x in expected) > 0
    for a, b in zip(gradients, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_mixed_precision_computes_in_bfloat16_on_float32_weights():
    (plain,), model, seen = run(tiny(), steps=1), tiny(), []
    model.mid_block.mlp.fc1.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    (state,) = run(model, steps=1, mixed_precision="bf16")  # in the same process
    assert seen == [torch.bfloat16] and {p.dtype for p in model.parameters()} == {torch.float32}
    assert state.loss == pytest.approx(plain.loss, rel=1e-2) and state.loss != plain.loss


def test_fp16_on_a_cpu_says_that_it_is_float32():
    with pytest.warns(UserWarning, match="on the CPU this trains in float32"):
        run(tiny(), steps=1, mixed_precision="fp16")


@pytest.fixture
def scalers(monkeypatch):
    """The scaler and the autocast of a GPU, which accelerate leaves out on a CPU; a list of the scalers that were made."""
    plain, made = processes.accelerator, []

    def as_on_a_gpu(precision):
        accelerator = plain(precision)
        if precision == "fp16":
            made.append(torch.amp.GradScaler("cpu", init_scale=2.0 ** (40 if len(made) else 16)))
            accelerator.native_amp, accelerator.scaler = True, made[-1]
        return accelerator

    monkeypatch.setattr(processes, "accelerator", as_on_a_gpu)
    return made


@pytest.mark.filterwarnings("ignore:fp16 needs")
def test_fp16_gradients_are_scaled_and_steps_that_overflow_left_out(scalers, tmp_path):
    options = {"steps": 40, "warmup": 0}
    full = [state.loss for state in run(tiny(), **options)]
    half = [state.loss for state in run(tiny(), **options, mixed_precision="fp16")]
    assert half == pytest.approx(full, rel=0.01) and half != full and scalers[0].get_scale() == 2.0**16
    model, again = tiny(), tiny()
    before, losses, moved = model.mid_block.mlp.fc1.weight.clone(), [], []
    options = {**STEPS, **options, "mixed_precision": "fp16"}
    for state in distill.train(model, "digits", **options):
        losses.append(state.loss)
        moved.append(not torch.equal(before, model.mid_block.mlp.fc1.weight))
    overflows = moved.index(True)  # the scale is halved until the gradients fit
    assert 5 < overflows < 30 and all(moved[overflows:]) and scalers[1].get_scale() == 2.0 ** (40 - overflows)
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10]) and model.mid_block.mlp.fc1.weight.dtype == torch.float32
    states = distill.train(again, "digits", out=tmp_path, **options)
    for _ in range(overflows - 2):
        next(states)
    states.close()
    again = tiny()
    list(distill.train(again, "digits", out=tmp_path, **options))  # with the scale that it had
    assert equal(model, again)


def test_a_run_may_go_on_in_other_parts(tmp_path):
    whole = layers.sparsify(tiny(), "2:4")
    list(distill.train(whole, "digits", out=tmp_path / "whole", **STEPS))
    broken, resumed = (layers.sparsify(tiny(), "2:4") for _ in range(2))
    states = distill.train(broken, "digits", out=tmp_path / "broken", **STEPS)
    for _ in range(3):
        next(states)
    states.close()
    list(distill.train(resumed, "digits", out=tmp_path / "broken", **{**STEPS, "accumulate": 2}))
    for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_batches_that_cannot_be_cut_are_refused():
    with pytest.raises(ValueError, match="batch_size 8 cannot be shared by 1 processes in 3 parts"):
        next(distill.train(tiny(), "digits", **{**STEPS, "accumulate": 3}))


# --- recovery: train_only="norms" -------------------------------------------------------------------------------------

RECOVERY = {"train_only": "norms", "noise_weight": 0.0, "teacher_weight": 1.0}


def folded() -> UViTModel:
    """A sparse student of `tiny` whose output is not zero."""
    student = tiny()
    nn.init.normal_(student.decoder_pred.weight)
    return layers.fold(layers.sparsify(student, "2:4"))


def teacher() -> UViTModel:
    model = tiny()
    nn.init.normal_(model.decoder_pred.weight)
    return model


def test_recovery_changes_biases_norms_and_the_scale_of_rows_alone():
    student, before = folded(), folded().state_dict()
    list(distill.finetune(student, teacher(), "digits", **STEPS, **RECOVERY))
    after = student.state_dict()
    assert after.keys() == before.keys() and [type(m) for m in student.modules()] == [type(m) for m in folded().modules()]
    assert all(p.requires_grad for p in student.parameters())
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert {name for name in after if after[name].dim() == 1} <= changed
    assert not {"label_emb.weight", "pos_embed"} & changed
    weight, original = after["mid_block.mlp.fc1.weight"], before["mid_block.mlp.fc1.weight"]
    assert torch.equal(weight == 0, original == 0) and "mid_block.mlp.fc1.weight" in changed
    scale = (weight / original)[original != 0].view(len(weight), -1)  # 2 of 4 of each row
    torch.testing.assert_close(scale, scale[:, :1].expand_as(scale))


def test_recovery_learns_from_the_teacher():
    states = list(
        distill.finetune(folded(), teacher(), "digits", **STEPS | {"steps": 80, "batch_size": 32, "lr": 5e-3}, **RECOVERY)
    )
    losses = [s.loss for s in states]
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])


def test_stopped_recovery_leaves_plain_layers_and_resumes_exactly(tmp_path):
    whole, broken, resumed = folded(), folded(), folded()
    list(distill.finetune(whole, teacher(), "digits", **STEPS, **RECOVERY))
    states = distill.finetune(broken, teacher(), "digits", out=tmp_path, **STEPS, **RECOVERY)
    for _ in range(3):
        shown = next(states).ema_model()
    states.close()
    assert broken.state_dict().keys() == whole.state_dict().keys() == shown.state_dict().keys()
    list(distill.finetune(resumed, teacher(), "digits", out=tmp_path, **STEPS, **RECOVERY))
    assert equal(whole, resumed)


@pytest.mark.parametrize(("layer", "x"), [(nn.Linear(4, 3), torch.randn(2, 4)), (nn.Conv2d(4, 3, 1), torch.randn(2, 4, 5, 5))])
def test_scaled_layers_take_their_input_by_keyword(layer, x):
    with recovery.norms_only(layer):
        torch.testing.assert_close(layer(input=x), layer(x))


def test_recovery_refuses_weights_that_are_not_settled():
    with pytest.raises(ValueError, match="keeps the sparse weights; calibrate or fold"):
        next(distill.finetune(layers.sparsify(tiny()), tiny(), "digits", **STEPS, **RECOVERY))
    with pytest.raises(ValueError, match="unknown train_only 'biases'; known: '', norms"):
        next(distill.finetune(folded(), tiny(), "digits", **STEPS, **RECOVERY | {"train_only": "biases"}))


def test_checkpoints_from_before_a_setting_was_known_are_resumed(tmp_path):
    whole, broken, resumed = tiny(), tiny(), tiny()
    run(whole)
    states = distill.train(broken, "digits", out=tmp_path, **STEPS)
    next(states)
    states.close()
    content = torch.load(tmp_path / checkpoint.CHECKPOINT, weights_only=True)
    del content["config"]["train_only"]
    torch.save(content, tmp_path / checkpoint.CHECKPOINT)
    run(resumed, out=tmp_path)
    assert equal(whole, resumed)


def test_a_module_of_ones_own_without_a_config_is_trained_and_made_sparse(own):
    before = copy.deepcopy(own.state_dict())
    run(own, steps=2)
    assert not torch.equal(own.mid.weight, before["mid.weight"])
    student = sparsedm.sparsify(copy.deepcopy(own), "2:4", include=["mid"])
    states = list(distill.finetune(student, own, "digits", **{**STEPS, "steps": 2}))
    assert states[-1].terms["teacher"] > 0 and nm.verify(layers.fold(student).mid.weight, "2:4") == 0
    list(sparsedm.calibrate(own, "digits", n=64, include=["mid"], exclude=[]))
    assert nm.verify(own.mid.weight, "2:4") == 0
    with pytest.raises(ValueError, match=r"Own has no enable_gradient_checkpointing\(\); leave gradient_checkpointing out"):
        run(own, gradient_checkpointing=True)
