"""Diff-Pruning: the scores against brute force, the published sizes, and pruned models that reload bit for bit."""

import copy
import json

import pytest
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention_processor import AttnProcessor
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import nn

import sparsedm
from sparsedm import data, diffpruning, diffusion, dryrun, layers, macs, nm, structure
from sparsedm.models import zoo

MODELS = ("glyphs-uvit", "glyphs-unet")


def scored(name: str, timesteps: int = 3) -> nn.Module:
    """A bundled model with gradients from a few timesteps."""
    model = zoo.load(name)
    images, labels = data.stack(data.load("glyphs", n=4))
    for _, _state in zip(range(timesteps), diffpruning.importance(model, images, labels, threshold=0)):
        pass
    return model


def call(model: nn.Module) -> torch.Tensor:
    inputs = dryrun.example_inputs(model, 2)
    generator = torch.Generator().manual_seed(0)
    inputs["sample"] = torch.randn(inputs["sample"].shape, generator=generator)
    with torch.no_grad():
        return model(**inputs).sample


# --- importance over timesteps ---------------------------------------------------------------------------------------------


def test_gradients_are_the_sum_over_the_timesteps_used():
    model = zoo.load("glyphs-unet")
    images, labels = data.stack(data.load("glyphs", n=2))
    states = []
    for state in diffpruning.importance(model, images, labels, threshold=0, seed=5):
        states.append(state)
        if state.timestep == 2:
            break
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    scheduler = diffusion.make_scheduler("ddpm", model)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(5))
    for t, state in enumerate(states):
        at = torch.tensor([t, t])
        noisy = scheduler.add_noise(images, noise, at)
        velocity = model(noisy, at, class_labels=labels).sample
        abar = scheduler.alphas_cumprod[t]
        loss = ((noise - abar.sqrt() * velocity - (1 - abar).sqrt() * noisy) ** 2).sum() / 2
        assert loss.item() == pytest.approx(state.loss, rel=1e-4)
        loss.backward()
    largest = max(gradient.abs().max().item() for gradient in found.values())
    for name, p in model.named_parameters():
        torch.testing.assert_close(found[name], p.grad, rtol=1e-3, atol=1e-5 * largest)


def test_it_stops_at_the_first_small_loss_without_using_it():
    model = zoo.load("glyphs-uvit")
    images, labels = data.stack(data.load("glyphs", n=2))
    states = list(diffpruning.importance(model, images, labels, threshold=0.5))
    losses = [state.loss for state in states]
    assert [state.used for state in states] == [True] * (len(states) - 1) + [False] and len(states) < states[0].timesteps
    assert losses[-1] < 0.5 * max(losses) and all(loss >= 0.5 * max(losses[: i + 1]) for i, loss in enumerate(losses[:-1]))


@pytest.mark.parametrize("threshold", [-0.1, 1, 2])
def test_bad_thresholds_are_refused(threshold):
    with pytest.raises(ValueError, match="threshold"):
        next(
            diffpruning.importance(
                zoo.load("glyphs-uvit"), torch.zeros(1, 1, 16, 16), torch.zeros(1, dtype=torch.long), threshold=threshold
            )
        )


def test_a_gradient_that_is_not_finite_is_reported_after_an_early_stop():
    model = zoo.load("glyphs-uvit")
    model.norm.weight.register_hook(lambda gradient: gradient * torch.inf)
    images, labels = data.stack(data.load("glyphs", n=2))
    with pytest.raises(FloatingPointError, match=r"gradient of norm\.weight"):
        list(diffpruning.importance(model, images, labels, threshold=0.5))


def test_a_loss_that_is_not_finite_names_the_timestep():
    model = zoo.load("glyphs-uvit")
    with pytest.raises(FloatingPointError, match="timestep 0 is nan"):
        next(diffpruning.importance(model, torch.full((1, 1, 16, 16), torch.nan), torch.zeros(1, dtype=torch.long)))


# --- scores ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", ["squared", "absolute"])
def test_scores_are_those_of_zeroing_each_channels_weights(name, kind):
    """Brute force: for every channel the weights that would go, found by cutting it out and looking which are missing."""
    model = scored(name)
    for group in structure.groups(model, dryrun.example_inputs(model))[:6]:
        found = diffpruning.scores(model, group, kind)
        for channel in {0, group.channels // 2, group.channels - 1}:
            expected = 0.0
            for member in group.members:
                layer = model.get_submodule(member.layer)
                if isinstance(layer, nn.Embedding):
                    continue
                axis = 1 if member.axis == "in" else 0
                for i in member.index[member.root == channel].tolist():
                    w, g = layer.weight.select(axis, i), layer.weight.grad.select(axis, i)
                    square = kind == "squared" and not isinstance(layer, nn.GroupNorm)
                    expected += ((w * g) ** 2 if square else (w * g).abs()).sum().item()
            assert found[channel].item() == pytest.approx(expected, rel=1e-4, abs=1e-12)


class Toy(ModelMixin, ConfigMixin):
    """Two linear layers that predict the noise of a 1x1 picture: small enough to try every removal."""

    @register_to_config
    def __init__(self, sample_size: int = 1, in_channels: int = 4, hidden: int = 8):
        super().__init__()
        self.one, self.two = nn.Linear(in_channels, hidden, bias=False), nn.Linear(hidden, in_channels, bias=False)

    def forward(self, sample, timestep):
        y = self.two(torch.relu(self.one(sample.flatten(1))))
        return UNet2DOutput(sample=y.view(sample.shape))


def test_the_ranking_agrees_with_removing_each_channel_in_turn():
    """First-order Taylor, |sum w * g| per channel, is the change of the loss for small weights; so is its ranking."""
    torch.manual_seed(0)
    model = Toy()
    with torch.no_grad():
        model.one.weight.uniform_(0.5, 1.5)
        model.two.weight.uniform_(0.5, 1.5).mul_(torch.logspace(-8, -1, 8))  # channels of very different weight
        model.two.weight.copy_(model.two.weight[:, torch.randperm(8)])
    images = torch.rand(16, 4, 1, 1)
    states = list(diffpruning.importance(model, images, torch.arange(16), threshold=0.5))  # it takes no labels
    steps = [state.timestep for state in states if state.used]
    index = torch.arange(8)
    group = structure.Group(8, (structure.Member("one", "out", index, index), structure.Member("two", "in", index, index)))
    ranking = diffpruning.scores(model, group, "absolute").argsort()
    scheduler = diffusion.make_scheduler("ddpm", model)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))

    def loss(candidate) -> float:
        total = 0.0
        for t in steps:
            at = torch.full((16,), t)
            noisy = scheduler.add_noise(images, noise, at)
            total += (noise - candidate(noisy, at).sample).square().flatten(1).sum(1).mean().item()
        return total

    changes = []
    with torch.no_grad():
        for channel in range(8):
            candidate = copy.deepcopy(model)
            candidate.two.weight[:, channel] = 0
            changes.append(abs(loss(candidate) - loss(model)))
    assert ranking.tolist() == torch.tensor(changes).argsort().tolist()


def test_scores_without_gradients_and_unknown_ones_are_refused():
    model = zoo.load("glyphs-uvit")
    group = structure.groups(model, {})[0]
    with pytest.raises(ValueError, match=r"attn\.qkv has no gradient"):
        diffpruning.scores(model, group)
    with pytest.raises(ValueError, match="unknown score 'best'"):
        diffpruning.scores(model, group, "best")


# --- pruning ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounded", [False, True])
def test_the_cifar10_unet_gets_the_published_size(rounded):
    model = sparsedm.build("ddpm-cifar10")
    pruned = diffpruning.prune(model, 0.3, score="magnitude", round_to=4 if rounded else 1)
    parameters, count = sum(p.numel() for p in pruned.parameters()), macs.count(pruned)
    if rounded:
        axes = [runs for axes in pruned.config.pruning.values() for runs in axes.values()]
        assert all(len(structure.channels(runs, 10_000)) % 4 == 0 for runs in axes)
        sparse = layers.sparsify(copy.deepcopy(pruned), "2:4")
        assert {row.name for row in sparsedm.report(sparse).rows if row.state == "dense"} == {"conv_in", "conv_out"}
    else:
        assert parameters == pytest.approx(19.85e6, rel=0.01)
        assert count.dense - count.attention == pytest.approx(3.39e9, rel=0.01)
    assert call(pruned).shape == (2, 3, 32, 32) and sum(p.numel() for p in model.parameters()) > 35e6


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("score", diffpruning.SCORES)
def test_pruned_models_run_and_lose_what_they_should(name, score):
    model = scored(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    pruned = diffpruning.prune(model, 0.5, score=score, round_to=4)
    assert call(pruned).shape == call(model).shape
    assert macs.count(pruned).dense < (0.4 if "unet" in name else 0.55) * macs.count(model).dense
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())  # untouched
    assert not getattr(model.config, "pruning", None)


@torch.no_grad()
def test_pruned_attention_scales_by_its_new_width():
    pruned = diffpruning.prune(zoo.load("glyphs-unet"), 0.5, score="magnitude")
    expected = call(pruned)
    for module in pruned.modules():
        if isinstance(module, structure.DiffusersAttention):
            module.set_processor(AttnProcessor())  # which reads the scale from the module
    torch.testing.assert_close(call(pruned), expected, rtol=1e-4, atol=1e-5)


def test_what_stays_are_the_best_channels_of_every_part():
    group = structure.Group(8, (structure.Member("a", "out", torch.arange(8), torch.arange(8)),), parts=2)
    scores = torch.tensor([1.0, 4, 3, 2, 50, 10, 30, 20])
    assert structure.keep(group, scores, 0.5).tolist() == [1, 2, 4, 6]
    assert structure.keep(group, scores, 0.3).tolist() == [1, 2, 3, 4, 6, 7]  # 3 of 8, rounded down to 1 of each 4
    assert structure.keep(group, scores, 0.5, round_to=8).tolist() == list(range(8))
    with pytest.raises(ValueError, match="leaves a without channels"):
        structure.keep(group, scores, 0.99)
    with pytest.raises(ValueError, match="importance of a is not finite"):
        structure.keep(group, scores * torch.nan, 0.5)


def test_zero_channels_can_go_without_changing_the_output():
    """A channel whose weights are zero everywhere is the first to go, and nothing is lost with it."""
    model = zoo.load("glyphs-uvit")
    with torch.no_grad():
        for block in (*model.in_blocks, model.mid_block, *model.out_blocks):
            block.mlp.fc2.weight[:, ::2] = 0
            block.mlp.fc1.weight[::2] = 0
            width = block.attn.proj.in_features // block.attn.num_heads
            block.attn.proj.weight[:, width : 2 * width] = 0
            block.attn.qkv.weight.view(3, block.attn.num_heads, width, -1)[:, 1] = 0
    kept = []
    for group in structure.groups(model, {}):
        scores = diffpruning.scores(model, group, "magnitude")
        kept.append((group, structure.keep(group, scores, 0.25 if group.channels == 4 else 0.5)))
    pruned = structure.apply(copy.deepcopy(model), structure.record(model, kept))
    assert [m.num_heads for m in pruned.modules() if isinstance(m, structure.Attention)] == [3] * 7
    torch.testing.assert_close(call(pruned), call(model), rtol=1e-4, atol=1e-5)


# --- records ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_a_pruned_model_reloads_bit_for_bit_and_goes_through_the_rest_of_the_package(name, tmp_path):
    pruned = diffpruning.prune(zoo.load(name), 0.4, score="magnitude", round_to=4)
    sparsedm.save(pruned, tmp_path / "ours")
    pruned.save_pretrained(tmp_path / "diffusers")
    for folder in ("ours", "diffusers"):
        back = sparsedm.load(tmp_path / folder)
        assert type(back) is type(pruned) and back.config.pruning == pruned.config.pruning
        assert back.state_dict().keys() == pruned.state_dict().keys()
        assert all(torch.equal(value, back.state_dict()[key]) for key, value in pruned.state_dict().items())
        assert torch.equal(call(back), call(pruned))
    student = layers.fold(sparsedm.sparsify(back, "2:4"))
    assert any(nm.detect(m.weight) for m in student.modules() if isinstance(m, nn.Linear))
    sparsedm.save_packed(student, tmp_path / "packed", dtype=None)
    assert torch.equal(call(sparsedm.load(tmp_path / "packed")), call(student))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(nothing={"out": "0"}), "names nothing"),
        (lambda r: r["mid_block.mlp.fc1"].update(out="0,10000"), r"does not fit mid_block\.mlp\.fc1: '10000'.*below 512"),
        (lambda r: r["mid_block.mlp.fc1"].update(out="-1,3"), "does not fit"),
        (lambda r: r["mid_block.mlp.fc1"].update(out="3,2"), "does not fit.*'2' does not grow"),
        (lambda r: r["mid_block.mlp.fc1"].update(out="0-3,3"), "does not fit"),
        (lambda r: r["mid_block.mlp.fc1"].update(out="5-3"), "does not fit"),
        (lambda r: r["mid_block.mlp.fc1"].update(out="0-999999999"), "does not fit"),
        (lambda r: r["mid_block.mlp.fc1"].update(out=""), "does not fit"),
        (lambda r: r["mid_block.mlp.fc1"].update(sideways="1"), "does not fit"),
        (lambda r: r["mid_block.mlp.fc1"].update(out=[0, 1]), "does not fit"),
        (lambda r: r.update({"mid_block.mlp.fc1": "1"}), "does not fit"),
        (lambda r: r.update({"mid_block.norm1": {"in": "0"}}), "does not fit"),
        (lambda r: r["mid_block.attn.qkv"].pop("out"), "heads are not whole"),
        (lambda r: r["mid_block.attn.qkv"].update(out="0-4"), "heads are not whole"),
        (lambda r: r["mid_block.attn.proj"].update({"in": "0-1"}), "heads are not whole"),
    ],
)
def test_records_that_do_not_fit_are_refused_and_change_nothing(change, message, tmp_path):
    pruned = diffpruning.prune(zoo.load("glyphs-uvit"), 0.5, score="magnitude")
    record = json.loads(json.dumps(pruned.config.pruning))
    change(record)
    model = zoo.load("glyphs-uvit")
    expected = call(model)
    with pytest.raises(ValueError, match=message):
        structure.apply(model, record)
    assert torch.equal(call(model), expected)
    sparsedm.save(pruned, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"pruning": record}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        sparsedm.load(tmp_path)


@pytest.mark.parametrize("ratio", [0, 1, -0.5, 1.5])
def test_bad_ratios_are_refused(ratio):
    with pytest.raises(ValueError, match="ratio"):
        diffpruning.prune(zoo.load("glyphs-uvit"), ratio, score="random")


def test_pruning_twice_and_untraceable_models_are_refused():
    pruned = diffpruning.prune(zoo.load("glyphs-uvit"), 0.5, score="random")
    with pytest.raises(ValueError, match="pruned already"):
        diffpruning.prune(pruned, 0.5, score="random")
    with pytest.raises(ValueError, match="cannot trace Toy"):
        diffpruning.prune(Toy(), 0.5, score="random")
