"""DeepCache against a UNet called by hand, and the table of what else the same time buys, from invented results."""

import json

import pytest
import torch
from diffusers import UNet2DConditionModel

import sparsedm
from sparsedm import diffusion
from sparsedm.diffusion import deepcache
from sparsedm.experiments import claims, recipes, results, rivals, timing
from sparsedm.experiments.significance import Chance
from sparsedm.measure.protocol import Protocol
from sparsedm.packing import kernels, packed

BASE = "glyphs-unet"


def shallow(model, x, t, labels, deep):
    """The first down block and the last up block of a UNet2DModel, by hand, with `deep` for all between them."""
    emb = model.time_embedding(model.time_proj(t.expand(len(x)))) + model.class_embedding(labels)
    skips = (model.conv_in(x),)
    _, own = model.down_blocks[0](skips[0], emb)
    last = model.up_blocks[-1]
    hidden = last(deep, (*skips, *own)[: len(last.resnets)], emb)
    return model.conv_out(model.conv_act(model.conv_norm_out(hidden)))


@pytest.mark.parametrize("interval", [1, 2, 3])
def test_sampling_with_deepcache_equals_steps_by_hand(make_model, interval):
    model, labels, steps = make_model("unet").eval(), torch.tensor([0, 3]), 5
    noise, before = diffusion.start_noise(model, 2), set(model.state_dict())
    drawn = [s.sample for s in diffusion.sample(model, noise, steps=steps, class_labels=labels, cache_interval=interval)]
    kept, deep = [], None
    hook = model.up_blocks[-1].register_forward_pre_hook(lambda block, args: kept.append(args[0]))
    scheduler, x = diffusion.make_scheduler("ddim", model), noise
    scheduler.set_timesteps(steps)
    for i, (t, expected) in enumerate(zip(scheduler.timesteps, drawn, strict=True)):
        with torch.no_grad():
            whole = model(x, t, class_labels=labels).sample
            if i % interval:
                output = shallow(model, x, t, labels, deep)
            else:
                output, deep = whole, kept[-1]
        x = scheduler.step(output, t, x).prev_sample
        torch.testing.assert_close(expected, x)
    hook.remove()
    assert set(model.state_dict()) == before and all("forward" not in vars(m) for m in model.modules())


def test_text_unets_and_packed_models_are_cached_too(make_model):
    config = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (8, 16), "layers_per_block": 1}
    blocks = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}
    text = UNet2DConditionModel(**config, **blocks, cross_attention_dim=8, attention_head_dim=4, norm_num_groups=4).eval()
    inputs = {"encoder_hidden_states": torch.randn(2, 3, 8)}
    small = packed.pack(sparsedm.fold(sparsedm.sparsify(make_model("unet"), "2:4")), backend="kernel")
    for model, given in ((text, {"conditioning": inputs}), (small, {"class_labels": torch.tensor([1, 2])})):
        calls = []
        model.mid_block.resnets[0].register_forward_hook(lambda *_, calls=calls: calls.append(1))
        drawn = diffusion.generate(model, diffusion.start_noise(model, 2), steps=5, cache_interval=2, **given)
        assert len(calls) == 3 and drawn.isfinite().all()


@pytest.mark.parametrize(
    ("kind", "interval", "said"), [("uvit", 2, "for UNets .* not for this UViTModel"), ("unet", 0, "at least 1")]
)
def test_what_deepcache_is_not_for_is_refused(make_model, kind, interval, said):
    with pytest.raises(ValueError, match=said):
        deepcache.in_turn(make_model(kind), interval)
    with pytest.raises(ValueError, match=said):
        diffusion.generate(make_model(kind), torch.zeros(1, 1, 8, 8), cache_interval=interval)


def test_protocols_without_a_cache_are_stored_as_before():
    assert "cache_interval" not in Protocol().facts() and Protocol(cache_interval=2).facts()["cache_interval"] == 2


@pytest.fixture
def stored(monkeypatch, tmp_path):
    """Invented results of the UNet's rivals; a step takes 32 ms, packed 16, without its deep blocks 8 and 4."""
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    monkeypatch.setattr(rivals, "TIMES", tmp_path / "bench-rivals.json")
    for key, fd in (("50-steps", 2.0), ("25-steps", 3.0), ("cached-2", 2.5), ("2x4-50-steps", 2.2), ("2x4-cached-5", 2.9)):
        name = f"{BASE}-{key}"
        run = {"scores": {"fd_glyph": fd, "readability": 0.9, "ssim_to_base": 0.8}, "macs": {"sparse": 10}, "train_images": 0}
        run["protocol"] = recipes.recipe(name).protocol.facts()
        (tmp_path / f"{name}.json").write_text(json.dumps(run))
    ms = {
        "dense": 40,
        "dense, compiled": 32,
        "packed": 16,
        "dense shallow": 8,
        "packed shallow, compiled": 4,
        "packed shallow": 5,
    }
    rivals.TIMES.write_text(json.dumps({"processor": "Abacus", "rows": [{"name": BASE, "batch": 16, "ms": ms}]}))


def test_time_counts_whole_and_shallow_steps(stored):
    times = {row.name.removeprefix(f"{BASE}-"): rivals.picture_ms(row) for row in rivals.rows(BASE)}
    assert times == {"50-steps": 100, "25-steps": 50, "cached-2": 62.5, "2x4-50-steps": 50, "2x4-cached-5": 20}
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in rivals.table().splitlines()[2:7]]
    assert [row[3] for row in cells] == ["100.0", "62.5", "50.0", "50.0", "20.0"]
    assert "Abacus" in rivals.table()
    assert cells[1][:5] == ["UNet teacher", "50", "1 of 2 steps (DeepCache)", "62.5", "2.50"]


def test_verdicts_compare_at_equal_time(stored):
    verdicts = dict(zip((name for _, name, _ in claims.CLAIMS), claims.verdicts(BASE, Chance(0.05, 20)), strict=True))
    fewer = verdicts["2:4 beats fewer steps of the teacher at equal measured time"]
    assert fewer == claims.Verdict(claims.HOLDS, "2.20 against 3.00 at 50.0 ms a picture")
    cached = verdicts["... and DeepCache on the teacher"]  # which takes 62.5 ms at least
    assert cached.word == claims.OPEN and "no such run" in cached.figures


@pytest.mark.skipif(not kernels.available(), reason="no C++ compiler for the packed kernels")
def test_steps_without_the_deep_blocks_are_timed_on_the_same_output(monkeypatch):
    differences = {}

    @torch.no_grad()
    def plain(models, inputs, compiled):
        for kind, model in models.items():
            whole = models[kind.removesuffix(" shallow")]
            differences[type(model).__name__, kind] = (model(**inputs).sample - whole(**inputs).sample).abs().max().item()
        return models

    monkeypatch.setattr(timing, "ways", plain)
    rows = {row["name"]: row for row in timing.measure_rivals((BASE, "glyphs-uvit"), batch=2, rounds=1)}
    assert set(rows[BASE]["ms"]) == {"dense", "packed", "dense shallow", "packed shallow"} > set(rows["glyphs-uvit"]["ms"])
    assert len(differences) == 6 and max(differences.values()) < 1e-5
