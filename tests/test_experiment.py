"""A recipe from end to end at a tiny size: train, resume, save, sample, score, results and card."""

import dataclasses
import functools
import json
import shutil
import time

import pytest
import ranks
import torch
from diffusers import UNet2DModel
from PIL import Image
from ranks import command

from sparsedm import data
from sparsedm.checkpoints import folders
from sparsedm.experiments import beginning, experiment, plan, recipes, results
from sparsedm.masking import layers, nm
from sparsedm.measure import evaluation, judges, metrics
from sparsedm.models.uvit import UViTModel
from sparsedm.pruning import structure
from sparsedm.support import processes
from sparsedm.training import runlog

TINY = {"sample_size": 16, "in_channels": 1, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 37}
TRAIN = {"steps": 6, "batch_size": 8, "lr": 1e-3, "checkpoint_every": 2}
SCHEDULE = recipes.RECIPES["glyphs-uvit"].schedule
PROTOCOL = recipes.Protocol(n=64, steps=2, batch_size=16)


@pytest.fixture
def tiny_recipes(monkeypatch, tmp_path):
    teacher = recipes.Recipe("headline", "Tiny", "teacher", model=(UViTModel, TINY), schedule=SCHEDULE, train=TRAIN)
    student = recipes.Recipe("headline", "Tiny", "student", "teacher", pattern="2:4", distil=True, train=TRAIN, bundle=True)
    monkeypatch.setitem(recipes.RECIPES, "teacher", teacher)
    monkeypatch.setitem(recipes.RECIPES, "student", student)
    monkeypatch.setattr(data, "load", lambda name, **options: data.Glyphs(**{"n": 72, **options}))
    monkeypatch.setitem(metrics.MIN_SAMPLES, "fd", PROTOCOL.n)  # scores of few pictures: quick, and enough to tell runs apart
    monkeypatch.setattr(metrics, "KID_SUBSET", 32)
    monkeypatch.setattr(experiment, "WATCH_PICTURES", PROTOCOL.n)
    monkeypatch.setattr(evaluation, "CHUNK", 20)
    monkeypatch.setattr(folders, "ASSETS", tmp_path / "assets")
    monkeypatch.setattr(experiment, "RESULTS", tmp_path / "assets" / "results")
    return tmp_path / "runs"


def test_teacher_and_student_end_to_end(tiny_recipes, monkeypatch):
    monkeypatch.setattr(judges, "classifier_of", _untrained_classifier)
    list(experiment.reproduce("teacher", tiny_recipes, PROTOCOL))
    stages = [state.stage for state in experiment.reproduce("student", tiny_recipes, PROTOCOL, bundle=True)]
    assert stages[0] == "train" and stages[-1] == "done" and "sample the base" not in stages
    result = json.loads((tiny_recipes / "student" / "results.json").read_text())
    assert result["macs"]["sparse"] < result["macs"]["dense"] == result["macs"]["executed"]
    assert result["train_images"] == 48 and result["train_seconds"] >= 0
    assert set(result["scores"]) == {"fd_glyph", "kd_glyph", "precision", "recall", "n", "readability", "ssim_to_base"}
    assert "Tiny student" in (folders.ASSETS / "student" / "README.md").read_text()
    assert torch.equal(
        folders.load(folders.ASSETS / "student").mid_block.mlp.fc1.weight,
        folders.load(tiny_recipes / "student/model").mid_block.mlp.fc1.weight,
    )
    again = [state.stage for state in experiment.reproduce("student", tiny_recipes, PROTOCOL)]
    assert again == ["done"]  # a finished run is not repeated ...
    more = [state.stage for state in experiment.reproduce("student", tiny_recipes, dataclasses.replace(PROTOCOL, n=66))]
    assert {"sample", "score"} <= set(more)  # ... unless it is to be scored in another way


@pytest.mark.parametrize("reinit", [False, True])
def test_pruned_models_are_made_by_recipe(tiny_recipes, monkeypatch, reinit):
    monkeypatch.setattr(beginning, "IMPORTANCE_PICTURES", 4)
    prune = {"ratio": 0.5, "round_to": 4, "score": "squared", "threshold": 0.9, "reinit": reinit}
    monkeypatch.setitem(recipes.RECIPES, "pruned", recipes.Recipe("headline", "Tiny", "pruned", "teacher", prune=prune))
    torch.manual_seed(1)
    base = UViTModel(**TINY)
    base.register_to_config(noise_schedule=SCHEDULE)
    torch.nn.init.normal_(base.final_layer.weight)
    folders.save(base, tiny_recipes / "teacher" / "model")
    stages = [state.stage for state in until_sampled("pruned", tiny_recipes)]
    assert set(stages[:-1]) == {"importance"}
    pruned = folders.load(tiny_recipes / "pruned" / "model")
    kept = structure.channels(pruned.config.pruning["mid_block.mlp.fc1"]["out"], 64)
    assert len(kept) == 32 and pruned.mid_block.attn.num_heads == 1 and pruned.config.noise_schedule
    same = torch.equal(pruned.mid_block.mlp.fc1.weight, base.mid_block.mlp.fc1.weight.half().float()[kept])
    assert same != reinit
    shutil.rmtree(tiny_recipes / "pruned")
    assert [state.stage for state in until_sampled("pruned", tiny_recipes)] == ["sample"]  # the gradients were kept
    assert folders.load(tiny_recipes / "pruned" / "model").config.pruning == pruned.config.pruning
    shutil.rmtree(tiny_recipes / "pruned")
    (kept,) = (tiny_recipes / "teacher").glob("importance-*.safetensors")
    kept.write_bytes((whole := kept.read_bytes())[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match=rf"{kept}: .* is damaged .*; remove it, and the importance is computed again"):
        list(until_sampled("pruned", tiny_recipes))
    torch.nn.init.normal_(base.mid_block.mlp.fc1.weight)
    folders.save(base, tiny_recipes / "teacher" / "model")  # another teacher has others
    assert {state.stage for state in until_sampled("pruned", tiny_recipes)} == {"importance", "sample"}


@pytest.mark.parametrize("options", [{"n": 64}, {"n": 8, "data": None, "steps": 2}], ids=["data", "trajectories"])
def test_calibrated_models_are_made_by_recipe_and_recovered(tiny_recipes, monkeypatch, options):
    tune = {**TRAIN, "train_only": "norms", "noise_weight": 0.0, "teacher_weight": 1.0}
    shared = {
        "suite": "headline",
        "backbone": "Tiny",
        "base": "teacher",
        "pattern": "2:4",
        "calibrate": {"packages": 1, **options},
    }
    for name, extra in {"calibrated": {"bundle": True}, "recovered": {"distil": True, "train": tune}}.items():
        monkeypatch.setitem(recipes.RECIPES, name, recipes.Recipe(method=name, role=name, **shared, **extra))
    base = UViTModel(**TINY)
    base.register_to_config(noise_schedule=SCHEDULE)
    torch.nn.init.normal_(base.final_layer.weight)
    folders.save(base, tiny_recipes / "teacher" / "model")
    for name, stages in {"calibrated": {"calibrate", "sample"}, "recovered": {"calibrate", "train", "sample"}}.items():
        assert {state.stage for state in until_sampled(name, tiny_recipes)} == stages
    first, second = (folders.load(tiny_recipes / name / "model") for name in ("calibrated", "recovered"))
    weights = [model.mid_block.mlp.fc1.weight for model in (first, second)]
    assert nm.verify(weights[0], "2:4") == 0 and torch.equal(weights[0] == 0, weights[1] == 0)
    assert not torch.equal(*weights)
    result = {"train": {}, "command": "", "parameters": 9, "nonzero_parameters": 5, "macs": {"dense": 2, "sparse": 1}}
    card = results.card("calibrated", {**result, "scores": {"fd_glyph": 2.0}, "protocol": vars(PROTOCOL)})
    assert f"Calibrated from `teacher` with {options['n']} noised pictures" in card and "not trained" in card


def test_scratch_draws_the_weights_of_the_narrow_layers():
    wide = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(32, 64), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip
    wide.register_to_config(noise_schedule=SCHEDULE)
    prune = {"ratio": 0.75, "score": "random", "reinit": True}
    with pytest.raises(StopIteration) as end:
        next(beginning.pruned(wide, recipes.Recipe("headline", "Tiny", "scratch", prune=prune), None, 0))
    for name, layer in layers.weight_layers(end.value.value):
        bound = layer.weight[0].numel() ** -0.5  # PyTorch draws uniformly up to it
        assert 0.8 * bound < layer.weight.abs().max() < 1.0001 * bound, name


def carry_out(out):
    """What every process does: a recipe that prunes, watches, trains and scores."""
    prune = {"ratio": 0.5, "round_to": 4, "score": "squared", "threshold": 0.9}
    options = {"pattern": "2:4", "distil": True, "prune": prune, "train": TRAIN, "watch": (0, 2)}
    protocol = recipes.Protocol(n=30, steps=2, batch_size=8)
    recipes.RECIPES["pruned"] = recipes.Recipe("headline", "Tiny", "pruned", "teacher", **options, protocol=protocol)
    beginning.IMPORTANCE_PICTURES, experiment.WATCH_PICTURES, metrics.MIN_SAMPLES["fd"] = 4, 20, 20
    data.load = lambda name, **options: data.Glyphs(**{"n": 72, **options})
    evaluation.score = lambda images, *rest: {"n": len(images), "mean": images.float().mean().item()}
    command("reproduce", "pruned", "--out", out, "--json")


def test_processes_share_a_recipe(tmp_path):
    torch.manual_seed(1)
    base = UViTModel(**TINY)
    base.register_to_config(noise_schedule=SCHEDULE)
    torch.nn.init.normal_(base.final_layer.weight)
    found = []
    for count in (1, 2):
        out = tmp_path / str(count)
        folders.save(base, out / "teacher" / "model")
        told = ranks.ended(ranks.start(count, out / "told", carry_out, out), out / "told")
        assert all(code == 0 for code, _ in told), told
        assert [bool(printed) for _, printed in told] == [True, False][:count]
        (result,) = json.loads(told[0][1]).values()
        assert result == json.loads((out / "pruned" / "results.json").read_text())
        curve = [(point["step"], point["n"]) for point in result["curve"]]
        assert result["scores"]["n"] == 30 and curve == [(0, 20), (2, 20), (6, 20)]
        assert len((out / "pruned" / "log.jsonl").read_text().splitlines()) == 1
        found.append((result, folders.load(out / "pruned" / "model")))
    (one, whole), (two, shared) = found
    assert two["curve"] == [pytest.approx(point, rel=1e-2) for point in one["curve"]]
    assert whole.config.pruning == shared.config.pruning and whole.config.pruning
    for a, b in zip(whole.parameters(), shared.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)  # float16


def until_sampled(name, out):
    for state in experiment.reproduce(name, out, PROTOCOL):
        yield state
        if state.stage == "sample":
            return


def _untrained_classifier(asset):
    from sparsedm.models.classifier import GlyphClassifier

    torch.manual_seed(0)
    return GlyphClassifier().eval()


def test_interrupted_training_and_sampling_go_on(tiny_recipes, monkeypatch):
    monkeypatch.setattr(judges, "classifier_of", _untrained_classifier)
    monkeypatch.setattr(experiment, "RunLog", functools.partial(runlog.RunLog, every=1))
    whole, broken = tiny_recipes / "whole", tiny_recipes / "broken"
    list(experiment.reproduce("teacher", whole, PROTOCOL))
    for stage, stops in (("train", 3), ("sample", 3)):
        states = experiment.reproduce("teacher", broken, PROTOCOL)
        seen = 0
        for state in states:
            seen += state.stage == stage
            if seen == stops:
                states.close()
                break
    list(experiment.reproduce("teacher", broken, PROTOCOL))
    logs = [[json.loads(line)["step"] for line in (f / "teacher/log.jsonl").read_text().splitlines()] for f in (whole, broken)]
    assert logs[0] == logs[1] == [1, 2, 3, 4, 5, 6]
    results = [json.loads((f / "teacher/results.json").read_text())["scores"] for f in (whole, broken)]
    assert results[0] == results[1]


def test_watched_run_has_a_curve_that_ends_with_its_score(tiny_recipes, monkeypatch):
    monkeypatch.setattr(judges, "classifier_of", _untrained_classifier)
    watched = recipes.Recipe("headline", "Tiny", "watched", "teacher", pattern="2:4", train=TRAIN, watch=(0, 2, 4))
    monkeypatch.setitem(recipes.RECIPES, "watched", watched)
    list(experiment.reproduce("teacher", tiny_recipes, PROTOCOL))
    states = experiment.reproduce("watched", tiny_recipes, PROTOCOL)
    assert next(state for state in states if state.stage == "sample step 2")
    states.close()
    list(experiment.reproduce("watched", tiny_recipes, PROTOCOL))
    result = json.loads((tiny_recipes / "watched" / "results.json").read_text())
    assert [point["step"] for point in result["curve"]] == [0, 2, 4, 6]
    assert result["curve"][-1]["fd_glyph"] == pytest.approx(result["scores"]["fd_glyph"])  # of the same pictures
    assert len({point["fd_glyph"] for point in result["curve"]}) == 4


def test_real_pictures_have_the_size_of_those_that_are_scored(tmp_path, monkeypatch):
    for i in range(3):
        Image.new("RGB", (40, 36)).save(tmp_path / f"{i}.png")
    seen = []

    def frechet(images, real, weights, judge):
        seen.append((len(real), *real[0][0].shape))
        return {"fid": 0.0}

    monkeypatch.setattr(metrics, "frechet", frechet)
    pictures = torch.zeros(2, 3, 24, 24, dtype=torch.uint8)
    assert evaluation.score(pictures, None, f"folder:{tmp_path}", inception="weights") == {"n": 2, "fid": 0.0}
    evaluation.score(pictures, None, "latents:nowhere", inception="weights", reference=f"folder:{tmp_path}")
    assert seen == [(3, 3, 24, 24)] * 2


def test_seeds_have_their_own_runs_and_noise(tiny_recipes, monkeypatch):
    monkeypatch.setattr(judges, "classifier_of", _untrained_classifier)
    for seed in (0, 1):
        list(experiment.reproduce("teacher", tiny_recipes, PROTOCOL, seed=seed))
    first, second = (json.loads((tiny_recipes / run / "results.json").read_text()) for run in ("teacher", "teacher-seed1"))
    assert second["command"].endswith("reproduce teacher --seed 1") and second["train"]["seed"] == second["seed"] == 1
    assert second["protocol"]["seed"] == first["protocol"]["seed"] + 1 and second["scores"] != first["scores"]


def test_results_name_the_commit_that_the_run_began_with(tiny_recipes, monkeypatch):
    monkeypatch.setattr(judges, "classifier_of", _untrained_classifier)
    states = experiment.reproduce("teacher", tiny_recipes, PROTOCOL)
    monkeypatch.setattr(plan, "code_version", lambda: "abc1234")
    next(states)
    monkeypatch.setattr(plan, "code_version", lambda: "another")
    list(states)
    assert json.loads((tiny_recipes / "teacher/results.json").read_text())["commit"] == "abc1234"


def test_folder_of_other_settings_is_refused(tiny_recipes):
    next(experiment.reproduce("teacher", tiny_recipes, PROTOCOL))
    with pytest.raises(ValueError, match="holds a run with other settings"):
        next(experiment.reproduce("teacher", tiny_recipes, PROTOCOL, steps=7))


def hold(folder):
    """What another process does: keep the folder."""
    with processes.claimed(folder):
        (folder / "held").touch()
        time.sleep(600)


def test_a_recipe_that_another_process_carries_out_is_refused(tiny_recipes, tmp_path):
    folder = tiny_recipes / "teacher"
    (other,) = ranks.start(1, tmp_path / "told", hold, folder)
    try:
        while not (folder / "held").exists() and other.is_alive():
            time.sleep(0.01)
        with pytest.raises(BlockingIOError, match="teacher is in use by another run"):
            next(experiment.reproduce("teacher", tiny_recipes, PROTOCOL))
    finally:
        other.kill()
        other.join()
    assert next(experiment.reproduce("teacher", tiny_recipes, PROTOCOL)).stage == "train"


def test_results_are_those_of_the_models_that_are_there(tiny_recipes, monkeypatch):
    monkeypatch.setattr(judges, "classifier_of", _untrained_classifier)
    for name in ("teacher", "student"):
        list(experiment.reproduce(name, tiny_recipes, PROTOCOL))
    path = tiny_recipes / "student" / "results.json"
    scores = json.loads(path.read_text())["scores"]

    def stages():
        return [state.stage for state in experiment.reproduce("student", tiny_recipes, PROTOCOL)]

    assert stages() == ["done"]
    teacher = folders.load(tiny_recipes / "teacher" / "model")
    torch.nn.init.normal_(teacher.final_layer.weight)
    folders.save(teacher, tiny_recipes / "teacher" / "model")  # as another training would
    with pytest.raises(ValueError, match=r"teacher holds pictures of another model; .*remove .*teacher/samples"):
        stages()
    (tiny_recipes / "teacher" / "samples-ddim2-1234.safetensors").unlink()
    assert {"sample the base", "score"} <= set(stages())
    again = json.loads(path.read_text())["scores"]
    assert again.pop("ssim_to_base") != scores.pop("ssim_to_base") and again == scores
    student = folders.load(tiny_recipes / "student" / "model")
    torch.nn.init.normal_(student.final_layer.weight)
    folders.save(student, tiny_recipes / "student" / "model")
    with pytest.raises(ValueError, match=r"student holds pictures of another model"):
        stages()
    found = json.loads(path.read_text())
    del found["sources"]  # as earlier versions wrote it
    path.write_text(json.dumps(found))
    with pytest.warns(UserWarning, match=r"results\.json does not say which weights"):
        assert stages() == ["done"]


def test_results_are_those_of_the_reference_pictures_that_are_there(tiny_recipes, monkeypatch, tmp_path):
    monkeypatch.setattr(judges, "classifier_of", _untrained_classifier)
    picture = tmp_path / "real" / "a.png"
    picture.parent.mkdir()
    Image.new("RGB", (16, 16)).save(picture)

    def stages():
        states = experiment.reproduce("teacher", tiny_recipes, PROTOCOL, reference=f"folder:{picture.parent}")
        return [state.stage for state in states]

    assert "score" in stages() and stages() == ["done"]
    Image.new("RGB", (16, 16), "red").save(picture)
    assert stages() == ["score", "done"] and stages() == ["done"]
    shutil.copy(picture, picture.with_name("b.png"))
    assert stages() == ["score", "done"]
    (picture.parent / "notes.txt").write_text("no picture")
    assert stages() == ["done"]
    shutil.rmtree(picture.parent)
    assert stages() == ["done"]  # a finished run does not need its reference


@pytest.mark.parametrize("name", ["settings.json", "results.json"])
def test_damaged_files_of_a_run_are_named(tiny_recipes, name):
    next(experiment.reproduce("teacher", tiny_recipes, PROTOCOL))
    (tiny_recipes / "teacher" / name).write_text('{"steps": 6, "ba')
    with pytest.raises(ValueError, match=rf"teacher/{name} is damaged: .*; remove it"):
        next(experiment.reproduce("teacher", tiny_recipes, PROTOCOL))


def test_a_run_goes_on_after_its_log_was_cut(tiny_recipes, monkeypatch):
    monkeypatch.setattr(experiment, "RunLog", functools.partial(runlog.RunLog, every=1))
    states = experiment.reproduce("teacher", tiny_recipes, PROTOCOL)
    for _ in range(4):
        next(states)
    states.close()
    log = tiny_recipes / "teacher" / "log.jsonl"
    log.write_bytes(log.read_bytes()[:-20])
    with pytest.warns(UserWarning, match=r"log\.jsonl was cut"):
        assert (
            next(state for state in experiment.reproduce("teacher", tiny_recipes, PROTOCOL) if state.stage == "train").done == 5
        )
    assert [line["step"] for line in runlog.read(log)] == [1, 2, 3, 5]


def test_a_model_that_a_kill_left_between_two_renames_is_found(tiny_recipes):
    teacher = UViTModel(**TINY)
    teacher.register_to_config(noise_schedule=SCHEDULE)
    folders.save(teacher, tiny_recipes / "teacher" / "model")
    (tiny_recipes / "teacher" / "model").rename(tiny_recipes / "teacher" / ".model.7.old")
    assert next(experiment.reproduce("student", tiny_recipes, PROTOCOL)).stage == "train"
    assert [path.name for path in (tiny_recipes / "teacher").iterdir()] == ["model"]


def test_student_that_is_not_sparse_is_not_scored(tiny_recipes):
    model = UViTModel(**TINY)
    model.register_to_config(noise_schedule=SCHEDULE)
    plan.note_settings(tiny_recipes / "student", TRAIN)
    folders.save(model, tiny_recipes / "student" / "model")
    with pytest.raises(ValueError, match=r"in_blocks\.0\.attn\.qkv is not 2:4"):
        next(experiment.reproduce("student", tiny_recipes, PROTOCOL))


def test_unknown_recipe_lists_those_that_are_close():
    with pytest.raises(ValueError, match="unknown recipe 'glyphs-vit'; close: glyphs-uvit"):
        next(experiment.reproduce("glyphs-vit"))


def test_every_student_names_a_base_that_exists():
    assert all(not r.base or r.base in recipes.RECIPES for r in recipes.RECIPES.values())
