"""The commands that make models, run as a user runs them."""

import io
import json
import os
import re
import signal
import struct
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import ranks
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from typer.testing import CliRunner
from wandb.proto import wandb_internal_pb2

from sparsedm import cli
from sparsedm.checkpoints import folders
from sparsedm.masking import layers
from sparsedm.measure import speed
from sparsedm.models.uvit import UViTModel
from sparsedm.packing import packed
from sparsedm.training import runlog

QUICK = ("--data", "digits", "--steps", "4", "--batch-size", "4", "--set", "checkpoint_every=2")


def ask(*arguments) -> dict:
    """The outcome of a command as JSON."""
    result = CliRunner().invoke(cli.app, [*map(str, arguments), "--json"], catch_exceptions=False)
    return json.loads(result.stdout)


def refusal(monkeypatch, capsys, *arguments) -> str:
    """The one line with which a command refuses."""
    monkeypatch.setattr(sys, "argv", ["sparsedm", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 1 and len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[-1]


@pytest.fixture
def tiny(tmp_path):
    torch.manual_seed(0)
    model = UViTModel(sample_size=8, in_channels=1, embed_dim=16, depth=2, num_heads=2, num_classes=11)
    folders.save(model, tmp_path / "tiny")
    return tmp_path / "tiny"


def test_a_model_is_trained_pruned_made_sparse_and_drawn(tiny, tmp_path):
    trained = ask("train", tiny, tmp_path / "trained", *QUICK)
    assert trained["loss"] > 0 and folders.load(trained["model"]).config.num_classes == 11
    student = ask("finetune", trained["model"], tmp_path / "student", *QUICK, "--set", "teacher_weight=0.5")
    assert set(map(str, layers.patterns(folders.load(student["model"])).values())) == {"2:4"}
    assert ask("info", tmp_path / "student") == ask("info", student["model"])
    smaller = ask("prune", trained["model"], tmp_path / "pruned", "--ratio", 0.5, "--data", "digits", "--n", 4)
    assert 0.4 < smaller["macs_share"] < 0.7
    both = ask("finetune", trained["model"], tmp_path / "both", "--student", smaller["model"], *QUICK, "--estimator", "s-ste")
    told = ask("info", both["model"])
    assert told["pruned"] and told["macs"]["sparse"] < 0.7 * told["macs"]["dense"] and set(told["patterns"].values()) == {"2:4"}
    packed = ask("sparsify", trained["model"], tmp_path / "packed", "--packed", "--pattern", "1:4")
    assert "quantization_config" in folders.read_json(Path(packed["model"], folders.CONFIG))
    calibrated = ask("sparsify", trained["model"], tmp_path / "calibrated", "--method", "admm", "--data", "digits", "--n", 8)
    assert set(ask("info", calibrated["model"])["patterns"].values()) == {"2:4"}
    assert all(state["after"] < state["before"] for state in calibrated["layers"])
    drawn = ask("generate", packed["model"], tmp_path / "some.png", "--n", 4, "--steps", 3)
    assert (tmp_path / "some.png").stat().st_size > 100 and drawn["ms_per_step"] > 0
    scores = ask("evaluate", student["model"], tmp_path / "s", "--data", "digits", "--n", 6, "--steps", 2, "--base", tiny)
    assert scores["n"] == 6 and -1 <= scores["ssim_to_base"] <= 1


def test_latents_are_decoded_by_the_autoencoder_that_is_named(tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    model = UViTModel(sample_size=8, in_channels=4, embed_dim=16, depth=2, num_heads=2, num_classes=11)
    folders.save(model, tmp_path / "latent")
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    AutoencoderKL(block_out_channels=(4, 4), norm_num_groups=2, latent_channels=4, **blocks).save_pretrained(tmp_path / "vae")
    draw = ("generate", tmp_path / "latent", tmp_path / "some.png", "--n", 4, "--steps", 2)
    score = ("evaluate", tmp_path / "latent", tmp_path / "scores", "--n", 3, "--steps", 2, "--data", "digits", "--base")
    for command in (draw, (*score, tmp_path / "latent")):
        assert "makes latents of 4 channels; name their autoencoder" in refusal(monkeypatch, capsys, *command)
        ask(*command, "--vae", tmp_path / "vae")
    assert Image.open(tmp_path / "some.png").size == ((2 * 17 + 1) * 8,) * 2  # two by two pictures of 16x16
    (samples,) = (tmp_path / "scores").glob("*.safetensors")
    assert load_file(samples)["images"].shape == (3, 3, 16, 16)


def test_tensorboard_gets_settings_losses_flips_and_pictures(tiny, tmp_path):
    out = tmp_path / "out"
    ask("finetune", tiny, out, "--data", "digits", "--steps", 100, "--batch-size", 4, "--samples-every", 50)
    (settings,) = out.glob("tracker/**/hparams.yml")
    assert {"steps: 100", "pattern: '2:4'"} <= set(settings.read_text().splitlines())
    written = EventAccumulator(str(out / "tracker" / "out")).Reload()
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert {"loss", "noise", "teacher", "lr", "mask_change"} <= set(written.Tags()["scalars"])
    for name in written.Tags()["scalars"]:
        expected = [(line["step"], line[name]) for line in lines if name in line]
        assert [(event.step, event.value) for event in written.Scalars(name)] == [pytest.approx(pair) for pair in expected]
    drawn = sorted((out / "samples").iterdir())
    assert [path.name for path in drawn] == ["00000050.png", "00000100.png"]
    for path, event in zip(drawn, written.Images("samples"), strict=True):
        shown = Image.open(io.BytesIO(event.encoded_image_string))
        assert np.array_equal(np.asarray(shown.convert("RGB")), np.asarray(Image.open(path).convert("RGB")))


def test_wandb_gets_the_same(tiny, tmp_path):
    out = tmp_path / "out"
    options = ("--data", "digits", "--steps", 100, "--batch-size", 4, "--samples-every", 50, "--track", "wandb")
    ((code, printed),) = ranks.ended(
        ranks.start(1, tmp_path / "told", offline, "finetune", tiny, out, *options), tmp_path / "told"
    )
    assert code == 0, printed
    (written,) = out.glob("tracker/wandb/offline-run-*/run-*.wandb")
    records = wandb_records(written)
    runs = [record.run for record in records if record.HasField("run")]
    assert {(run.project, run.display_name) for run in runs} == {("sparsedm", "out")}
    configs = [config for record in records for config in (record.run.config, record.config)]
    settings = [(item.key, item.value_json) for config in configs for item in config.update]
    assert ("steps", "100") in settings and ("pattern", '"2:4"') in settings
    history = {}
    for record in records:
        items = {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        if items:
            history.setdefault(items["_step"], {}).update(items)
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(history) == [50, 100]
    for line, logged in zip(lines, history.values(), strict=True):
        assert all(logged[name] == pytest.approx(value) for name, value in line.items() if name != "step")
    drawn = sorted((out / "samples").iterdir())
    shown = [next(written.parent.glob(f"files/media/images/samples_{step}_*.png")) for step in history]
    for path, copy in zip(drawn, shown, strict=True):
        assert np.array_equal(np.asarray(Image.open(copy).convert("RGB")), np.asarray(Image.open(path).convert("RGB")))


def offline(*arguments) -> None:
    """What another process does: run a command, and tell nothing to wandb's server."""
    os.environ["WANDB_MODE"] = "offline"
    ranks.command(*arguments)


def wandb_records(path: Path) -> list[wandb_internal_pb2.Record]:
    """What a run of wandb wrote: protocol buffers in a LevelDB log, in blocks of 32 KiB."""
    data, at, record, records = path.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        length, kind = struct.unpack_from("<HB", data, at + 4)  # after a checksum
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            records.append(wandb_internal_pb2.Record.FromString(record))
            record = b""
        if -at % 2**15 < 7:  # a header does not fit, zeros fill the block
            at += -at % 2**15
    return records


def test_an_official_checkpoint_becomes_a_model_folder(tmp_path, monkeypatch, capsys):
    model = UViTModel(sample_size=8, in_channels=3, embed_dim=16, depth=2, num_heads=4)
    torch.save(model.state_dict(), tmp_path / "nnet_ema.pth")
    convert = ("convert", tmp_path / "nnet_ema.pth", tmp_path / "uvit")
    assert "of its width 16; give num_heads (--heads)" in refusal(monkeypatch, capsys, *convert)
    assert "not with heads" in refusal(monkeypatch, capsys, *convert, "--set", "heads=4")
    assert "num_heads takes a number, not 'four'" in refusal(monkeypatch, capsys, *convert, "--set", "num_heads=four")
    assert "num_heads takes a number, not True" in refusal(monkeypatch, capsys, *convert, "--set", "num_heads=true")
    found = ask(*convert, "--heads", "4", "--norm-eps", "1e-4")
    assert folders.load(found["model"]).config.num_heads == 4
    told = ask("info", tmp_path / "uvit" / folders.WEIGHTS)
    assert told == ask("info", tmp_path / "uvit") and told["class"] == "UViTModel"
    state = folders.load(found["model"]).state_dict()
    assert found["class"] == "UViTModel" and all(torch.equal(state[key], value) for key, value in model.state_dict().items())


def interrupted(*arguments) -> None:
    """What another process does: run a command, and get Ctrl-C after its second line of the log."""
    add = runlog.RunLog.add

    def add_and_interrupt(log, state):
        line = add(log, state)
        if line and line["step"] == 100:
            os.kill(os.getpid(), signal.SIGINT)
        return line

    runlog.RunLog.add = add_and_interrupt
    ranks.command(*arguments)


def test_ctrl_c_leaves_a_checkpoint_that_resume_takes_up(tiny, tmp_path, monkeypatch, capsys):
    long = ("--data", "digits", "--batch-size", "4", "--set", "checkpoint_every=100000", "--steps", "150")
    whole = ask("train", tiny, tmp_path / "whole", *long)
    told = tmp_path / "told"
    ((code, printed),) = ranks.ended(ranks.start(1, told, interrupted, "train", tiny, tmp_path / "out", *long), told)
    assert code == 130 and "go on with the same command and --resume" in printed
    assert "holds a run; go on with it by --resume" in refusal(monkeypatch, capsys, "train", tiny, tmp_path / "out", *long)
    resumed = ask("train", tiny, tmp_path / "out", *long, "--resume")
    a, b = (folders.load(found["model"]).state_dict() for found in (whole, resumed))
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert [line["step"] for line in runlog.read(tmp_path / "out" / "log.jsonl")] == [50, 100, 150]


def test_a_second_run_in_the_same_folder_is_refused(tiny, tmp_path, monkeypatch, capsys):
    endless = ("--data", "digits", "--steps", "100000", "--batch-size", "4", "--set", "checkpoint_every=1")
    (first,) = ranks.start(1, tmp_path / "told", ranks.command, "train", tiny, tmp_path / "out", *endless)
    try:
        while not (tmp_path / "out" / "train" / "checkpoint.pt").exists() and first.is_alive():
            time.sleep(0.02)
        assert "is in use by another run" in refusal(monkeypatch, capsys, "train", tiny, tmp_path / "out", *QUICK)
    finally:
        first.kill()
        first.join()
    message = refusal(monkeypatch, capsys, "train", tiny, tmp_path / "out", *QUICK)
    assert "holds a run; go on with it" in message  # its checkpoint; a dead process has no claim


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "nothing", "{}/o"), "unknown model 'nothing'"),
        (("train", "{}/tiny", "{}/o", "--set", "lr"), "--set takes NAME=VALUE, not 'lr'"),
        (("train", "{}/tiny", "{}/o", "--data", "nothing"), "nothing"),
        (("train", "{}/tiny", "{}/o", "--data", "digits", "--set", "learning=1"), "learning"),
        (("train", "{}/tiny", "{}/o", "--resume"), "holds no run to resume"),
        (("train", "{}/tiny", "{}/o", "--device", "abacus"), "device 'abacus' is not there"),
        (("prune", "{}/tiny", "{}/tiny"), "is there already"),
        (("finetune", "{}/tiny", "{}/o", "--pattern", "4:2"), "4:2"),
        (("finetune", "{}/tiny", "{}/o", "--estimator", "ste"), "unknown estimator 'ste'; known: sr-ste, ast, s-ste"),
        (("finetune", "{}/tiny", "{}/o", "--estimator", "s-ste", "--decay", "0.1"), "S-STE has no decay"),
        (("finetune", "{}/tiny", "{}/o", "--dtype", "int8"), "unknown dtype 'int8'; known: float32, float16, bfloat16"),
        (("finetune", "{}/tiny", "{}/o", "--data", "glyphs-rgb"), "UViTModel takes pictures of 1 channels"),
        (("generate", "{}/tiny", "{}/o.png", "--label", "11", "--json"), "the classes of this model are 0 to 9, and 10 for none"),
        (("sparsify", "{}/tiny", "{}/o", "--exclude", "nope.*"), "'nope.*' matches no layer"),
        (("train", "{}/tiny", "{}/o", "--data", "digits", "--track", "aim"), "tracker 'aim' is not installed"),
        (("evaluate", "{}/tiny", "{}/o", "--precision", "int8"), "unknown precision 'int8'; known: bf16, fp32"),
        (("evaluate", "glyphs-uvit", "{}/o", "--n", "99"), "a Fréchet distance needs at least 2048 samples, there are 99"),
        (("evaluate", "{}/tiny", "{}/o", "--data", "glyphs"), "glyphs are pictures of shape [1, 16, 16], and those of UViTModel"),
        (
            ("evaluate", "{}/tiny", "{}/o", "--data", "digits"),
            "digits is scored with Inception's weights (FID) or against a base",
        ),
        (("train", "nothing", "{}/o", "--set", "teacher=1"), "unknown training setting 'teacher'; known: steps, "),
        (("train", "nothing", "{}/o", "--set", "out=x"), "unknown training setting 'out'"),
        (("finetune", "nothing", "{}/o", "--set", "scheduler=ddim"), "unknown training setting 'scheduler'"),
        (("train", "nothing", "{}/o", "--set", "lr=much"), "lr must be a finite number of at least 0, not 'much'"),
        (("train", "nothing", "{}/o", "--set", "ema_decay=7"), "ema_decay must be a finite number from 0 to 1, not 7"),
        (("reproduce", "glyphs-unet", "--out", "{}/o", "--set", "out=x"), "unknown training setting 'out'"),
        (("reproduce", "glyphs-unet", "--out", "{}/o", "--set", "seed=1"), "use --seed"),
        (("reproduce", "glyphs-unet", "--out", "{}/o", "--set", "warmup=-5"), "warmup must be a whole number of at least 0"),
        (("bench", "--dtypes", "int8"), "--dtypes takes float32, bfloat16, float16, not 'int8'"),
        (("bench", "--batches", "0"), "--batches takes whole numbers of at least 1, such as 1,4, not '0'"),
        (("bench", "--batches", ","), "--batches takes whole numbers of at least 1, such as 1,4, not ','"),
        (("bench", "--batches", ""), "--batches takes whole numbers of at least 1, such as 1,4, not ''"),
        (("bench", "--threads", ","), "--threads takes whole numbers of at least 1, such as 1,4, not ','"),
        (("bench", "--dtypes", ","), "--dtypes takes float32, bfloat16, float16, not ','"),
        (("bench", "--threads", "1,many"), "--threads takes whole numbers of at least 1, such as 1,4, not 'many'"),
        (("bench", "--output", "{}/tiny"), "tiny is a folder; name a file"),
        (("bench", "--output", "{}/times.png"), "is where the figure would be drawn; name a JSON file"),
        (("generate", "{}/tiny", "{}/o.png", "--word", "AB", "--label", "1"), "give the word or the label, not both"),
        (("generate", "nothing", "{}/o.xyz"), "o.xyz does not end as a picture does, such as .png"),
        (("generate", "nothing", "{}/tiny/config.json/o.png"), "config.json is no folder; name another place for o.png"),
        (("generate", "{}/tiny", "{}/o.png", "--sampler", "euler2"), "unknown sampler 'euler2'; known: "),
        (("evaluate", "nothing", "{}/o", "--sampler", "euler2"), "unknown sampler 'euler2'; known: "),
        (
            ("evaluate", "{}/tiny", "{}/o", "--data", "digits", "--base", "glyphs-uvit"),
            "the base makes pictures of shape [1, 16, 16], the model of [1, 8, 8]; take a base of the same shape",
        ),
        (("evaluate", "glyphs-uvit", "{}/o", "--reference", "folder:{}/nothing"), "nothing does not exist"),
        (("sparsify", "{}/tiny", "{}/o", "--pattern", "4:4"), "pattern 4:4 keeps every weight"),
        (("export", "{}/tiny", "{}/o", "--format", "packed"), "no N:M sparse layer to pack"),
        (("prune", "{}/tiny", "{}/o", "--data", "digits", "--ratio", "1"), "ratio 1.0 is not between 0 and 1"),
        (("prune", "{}/tiny", "{}/o", "--data", "digits", "--score", "best"), "unknown score 'best'; known: squared"),
        (
            ("prune", "{}/tiny", "{}/o", "--score", "magnitude", "--round-to", "1024"),
            "ratio 0.3 with round_to 1024 removes nothing; take a higher ratio",
        ),
        (("generate", "{}/tiny", "{}/o.png", "--vae", "{}/nothing"), "nothing is no folder of an autoencoder"),
        (("reproduce", "glyphs-unet", "--out", "{}/o", "--vae", "{}/nothing"), "nothing is no folder of an autoencoder"),
        (("reproduce", "glyphs-unet", "--out", "{}/o", "--reference", "folder:{}/nothing"), "nothing does not exist"),
        (("evaluate", "{}/tiny", "{}/o", "--base", "{}/tiny", "--data", "nonsense"), "unknown data set 'nonsense'; known: "),
        (("evaluate", "{}/tiny", "{}/o", "--base", "{}/tiny", "--data", "folder:{}/nothing"), "nothing does not exist"),
        (
            ("evaluate", "glyphs-uvit", "{}/o", "--n", "2048", "--reference", "digits"),
            "a Fréchet distance to digits needs at least 2048 samples, there are ",
        ),
        (("bench", "--models", "glyphs-uvit,typo"), "unknown model 'typo'; bundled: "),
        (("bench", "--what", "shares", "--models", "glyphs-uvit,typo"), "unknown model 'typo'; bundled: "),
        (("train", "{}/tiny", "{}/o", *QUICK, "--set", "lr=1e38", "--json"), "the loss is nan at step 2; start anew"),
    ],
)
def test_bad_input_is_one_line(arguments, message, tiny, tmp_path, monkeypatch, capsys):
    assert message in refusal(monkeypatch, capsys, *(str(a).format(tmp_path) for a in arguments))
    left = [path.name for path in tmp_path.iterdir()]
    assert left == ["tiny"] or "loss is nan" in message  # what trained has left its checkpoint


@pytest.mark.parametrize(
    ("model", "option", "message"),
    [
        ("glyphs-uvit-2x4", ("--label", "99"), "the classes of this model are 0 to 35"),
        ("glyphs-uvit-2x4", ("--sampler", "euler2"), "unknown sampler 'euler2'; known: "),
        ("plain", ("--guidance", "3"), "this model has no classes"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_packing(model, option, message, tmp_path, monkeypatch, capsys):
    plain = layers.sparsify(UViTModel(sample_size=8, in_channels=1, embed_dim=16, depth=2, num_heads=2), "2:4")
    folders.save(plain, tmp_path / "plain")
    monkeypatch.setattr(packed, "pack", lambda *model, **options: pytest.fail("it is packed"))
    place = tmp_path / model if model == "plain" else model
    assert message in refusal(monkeypatch, capsys, "generate", place, tmp_path / "o.png", *option)


def test_bench_refuses_a_figure_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    (tmp_path / "times.png").mkdir()
    monkeypatch.setattr(speed, "pair", lambda *model, **options: pytest.fail("it is measured"))
    assert "times.png is a folder; name a file" in refusal(monkeypatch, capsys, "bench", "--output", tmp_path / "times.json")


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "m", "o.png", "--guidance", "-5"),
        ("generate", "m", "o.png", "--guidance", "nan"),
        ("generate", "m", "o.png", "--guidance", "inf"),
        ("generate", "m", "o.png", "--seed", str(2**70)),
        ("generate", "m", "o.png", "--steps", "0"),
        ("evaluate", "m", "o", "--seed", "-1"),
        ("train", "m", "o", "--samples-every", "-1"),
        ("train", "m", "o", "--batch-size", "0"),
        ("finetune", "m", "o", "--decay", "nan"),
        ("prune", "m", "o", "--n", "0"),
        ("prune", "m", "o", "--round-to", "1000000000"),
        ("prune", "m", "o", "--threshold", "2"),
        ("export", "m", "o", "--batch", "0"),
        ("reproduce", "glyphs-unet", "--n", "0"),
    ],
)
def test_a_number_out_of_range_is_refused_with_its_options_name(arguments):
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 2 and arguments[-2] in result.stderr
    assert re.search(r"[Ii]nput should|not in the range|valid", result.stderr)
