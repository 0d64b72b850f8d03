"""Diff-Pruning: the scores against brute force, the published sizes, and pruned models that reload bit for bit."""

import copy
import json

import pytest
import torch
from diffusers import ConfigMixin, ModelMixin, UNet2DConditionModel, UNet2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention_processor import AttnProcessor
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import nn

import sparsedm
from sparsedm import data, diffusion
from sparsedm.checkpoints import folders
from sparsedm.masking import layers, nm
from sparsedm.measure import macs
from sparsedm.models import dryrun
from sparsedm.models.uvit import Attention
from sparsedm.pruning import diffpruning, structure

MODELS = ("glyphs-uvit", "glyphs-unet")


def scored(name: str, timesteps: int = 3) -> nn.Module:
    """A bundled model with gradients from a few timesteps."""
    model = folders.load(name)
    images, labels = data.stack(data.load("glyphs", n=4))
    for _, _state in zip(range(timesteps), diffpruning.importance(model, images, labels, threshold=0)):
        pass
    return model


def call(model: nn.Module) -> torch.Tensor:
    inputs = dryrun.example_inputs(model, 2)
    generator = torch.Generator().manual_seed(0)
    inputs["sample"] = torch.randn(inputs["sample"].shape, generator=generator).to(model.dtype)
    with torch.no_grad():
        return model(**inputs).sample


# --- importance over timesteps ---------------------------------------------------------------------------------------------


def test_gradients_are_the_sum_over_the_timesteps_used():
    model = folders.load("glyphs-unet")
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
    model = folders.load("glyphs-uvit")
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
                folders.load("glyphs-uvit"), torch.zeros(1, 1, 16, 16), torch.zeros(1, dtype=torch.long), threshold=threshold
            )
        )


def test_a_gradient_that_is_not_finite_is_reported_after_an_early_stop():
    model = folders.load("glyphs-uvit")
    model.norm.weight.register_hook(lambda gradient: gradient * torch.inf)
    images, labels = data.stack(data.load("glyphs", n=2))
    with pytest.raises(FloatingPointError, match=r"gradient of norm\.weight"):
        list(diffpruning.importance(model, images, labels, threshold=0.5))


def test_a_loss_that_is_not_finite_names_the_timestep():
    model = folders.load("glyphs-uvit")
    with pytest.raises(FloatingPointError, match="timestep 0 is nan"):
        next(diffpruning.importance(model, torch.full((1, 1, 16, 16), torch.nan), torch.zeros(1, dtype=torch.long)))


# --- scores ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", ["squared", "absolute"])
def test_scores_are_those_of_zeroing_each_channels_weights(name, kind):
    """Every weight that touches a channel counts once, squared or not, those of norms never squared."""
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
    """Two linear layers that predict the noise of a 1x1 picture: small enough to try every weight."""

    @register_to_config
    def __init__(self, sample_size: int = 1, in_channels: int = 4, hidden: int = 8):
        super().__init__()
        self.one, self.two = nn.Linear(in_channels, hidden, bias=False), nn.Linear(hidden, in_channels, bias=False)

    def forward(self, sample, timestep):
        hidden = torch.relu(self.one(sample.flatten(1))) * (0.5 + timestep[:, None] / 2000)
        return UNet2DOutput(sample=self.two(hidden).view(sample.shape))


def by_brute_force(model: nn.Module, images: torch.Tensor, noise: torch.Tensor, timesteps: int) -> dict[str, torch.Tensor]:
    """The scores of a toy's channels without gradients: what a small step of each weight towards zero does to the loss.

    The first-order effect of removing the weight is that of the step, scaled up.
    """
    abar = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64).mul(-1).add(1).cumprod(0)[:timesteps, None, None]
    x, e = images.flatten(1)[None], noise.flatten(1)[None]
    noisy = (abar.sqrt() * x + (1 - abar).sqrt() * e).flatten(0, 1)[..., None, None]
    at, target = torch.arange(timesteps).repeat_interleave(len(images)), e.expand(timesteps, -1, -1).flatten(0, 1)

    def loss() -> float:
        """Summed over the timesteps and the picture, mean over the batch."""
        return ((target - model(noisy, at).sample.flatten(1)) ** 2).sum().item() / len(images)

    effect, step = {}, 1e-4
    for name, weight in model.named_parameters():
        effect[name] = torch.empty_like(weight)
        for i in range(weight.numel()):
            kept, losses = weight.view(-1)[i].item(), []
            for share in (1 + step, 1 - step):
                weight.view(-1)[i] = kept * share
                losses.append(loss())
            weight.view(-1)[i] = kept
            effect[name].view(-1)[i] = (losses[0] - losses[1]) / (2 * step)
    outputs, inputs = effect["one.weight"], effect["two.weight"].T  # of the hidden channels
    return {
        "squared": outputs.square().sum(1) + inputs.square().sum(1), "absolute": outputs.abs().sum(1) + inputs.abs().sum(1)
    }  # fmt: skip


def test_scores_and_ranking_are_those_of_removing_every_weight_by_brute_force():
    """One batch, one noise, all timesteps before the loss falls below the threshold; a wrong choice of any ranks otherwise."""
    torch.manual_seed(0)
    model, eye = Toy().double(), torch.eye(4)
    with torch.no_grad():  # nearly the identity: noisy pictures are nearly the noise, so the loss falls with t
        model.one.weight.copy_(torch.cat([eye, -eye]) + 0.2 * torch.randn(8, 4))
        model.two.weight.copy_(torch.cat([eye, -eye], 1) + 0.2 * torch.randn(4, 8))
    images = torch.rand(16, 4, 1, 1, dtype=torch.float64)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(7)).double()
    states = list(diffpruning.importance(model, images, torch.arange(16), threshold=0.3, seed=7))  # it takes no labels
    used = sum(state.used for state in states)
    assert 100 < used < 900
    index = torch.arange(8)
    group = structure.Group(8, (structure.Member("one", "out", index, index), structure.Member("two", "in", index, index)))
    with torch.no_grad():
        right = by_brute_force(model, images, noise, used)
        wrong = {"all timesteps": (images, noise, 1000), "one": (images, noise, 1), "noise": (images, noise.flip(0), used)}
        wrong = {name: by_brute_force(model, *arguments) for name, arguments in wrong.items()}
    for kind in ("squared", "absolute"):
        found = diffpruning.scores(model, group, kind).double()
        torch.testing.assert_close(found, right[kind], rtol=1e-3, atol=0)
        assert found.argsort().tolist() == right[kind].argsort().tolist()
        assert all(found.argsort().tolist() != other[kind].argsort().tolist() for other in wrong.values())


def test_scores_without_gradients_and_unknown_ones_are_refused():
    model = folders.load("glyphs-uvit")
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
    pruned = diffpruning.prune(folders.load("glyphs-unet"), 0.5, score="magnitude")
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
    model = folders.load("glyphs-uvit")
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
    assert [m.num_heads for m in pruned.modules() if isinstance(m, Attention)] == [3] * 7
    torch.testing.assert_close(call(pruned), call(model), rtol=1e-4, atol=1e-5)


def without_statistics(norm, x, *args):
    """A GroupNorm that only scales and shifts: to it a channel of zeros is as if it were not there."""
    return (
        x * norm.weight[:, None, None] + norm.bias[:, None, None]
        if x.dim() == 4
        else x * norm.weight[:, None] + norm.bias[:, None]
    )


def text_unet() -> nn.Module:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=16, in_channels=3, out_channels=3, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=data.faces.DIM, attention_head_dim=2,
    ).eval()  # fmt: skip


def test_a_gate_goes_with_its_value():
    """The first layer of a text UNet's MLPs gives values, then as many gates (GEGLU)."""
    model, kept = text_unet(), []
    for group in structure.groups(model, dryrun.example_inputs(model)):
        if group.name.endswith("ff.net.0.proj"):
            first, units = model.get_submodule(group.name), torch.arange(group.channels)
            assert group.channels == first.out_features // 2
            with torch.no_grad():
                first.weight[units[::2]], first.bias[units[::2]] = 0, 0  # the values of every second unit
            kept.append((group, units[1::2]))
    assert kept
    before, narrow = call(model), structure.apply(model, structure.record(model, kept))
    torch.testing.assert_close(call(narrow), before)


def test_a_text_unet_is_scored_with_its_texts_pruned_and_reloaded(tmp_path):
    model, faces = text_unet(), data.load("faces", n=4, size=16)
    images, texts = data.stack(faces)
    for _, state in zip(range(2), diffpruning.importance(model, images, texts, threshold=0)):
        assert state.used
    with pytest.raises(ValueError, match="needs encoder_hidden_states; give a dict"):
        next(diffpruning.importance(model, images, torch.zeros(4)))
    narrow = diffpruning.prune(model, 0.5, round_to=4)
    assert macs.count(narrow).dense < 0.5 * macs.count(model).dense
    folders.save(narrow, tmp_path / "narrow")
    assert torch.equal(call(folders.load(tmp_path / "narrow")), call(narrow))


@torch.no_grad()
def test_what_reads_a_removed_channel_loses_its_weights_across_skips_and_attention(monkeypatch):
    """A UNet whose doomed channels are zero wherever they are made gives what the pruned one gives."""
    model = folders.load("glyphs-unet").double()
    pruned = diffpruning.prune(model, 0.4, score="random")
    for name, axes in pruned.config.pruning.items():
        layer = model.get_submodule(name)
        if "out" not in axes:
            continue
        width = layer.embedding_dim if isinstance(layer, nn.Embedding) else len(layer.weight)
        gone = torch.ones(width, dtype=torch.bool)
        gone[structure.channels(axes["out"], len(gone))] = False
        if isinstance(layer, nn.Embedding):
            layer.weight[:, gone] = 0
            continue
        layer.weight[gone] = 0
        if layer.bias is not None:
            layer.bias[gone] = 0
    for name, attention in pruned.named_modules():
        if isinstance(attention, structure.DiffusersAttention):  # its scale is that of its width
            dense = model.get_submodule(name)
            for part in (attention.to_q.weight, attention.to_q.bias):
                part.mul_((attention.inner_dim / dense.inner_dim) ** 0.5)
    monkeypatch.setattr(nn.GroupNorm, "forward", without_statistics)
    expected = call(model)
    torch.testing.assert_close(call(pruned), expected, rtol=0, atol=1e-9 * expected.abs().max().item())


# --- records ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_a_pruned_model_reloads_bit_for_bit_and_goes_through_the_rest_of_the_package(name, tmp_path):
    pruned = diffpruning.prune(folders.load(name), 0.4, score="magnitude", round_to=4)
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
    sparsedm.save_packed(student, tmp_path / "packed")
    assert torch.equal(call(sparsedm.load(tmp_path / "packed")), call(student))


def test_a_record_that_leaves_less_than_a_channel_a_head_is_refused_and_changes_nothing(make_model):
    model = make_model("unet", attention_head_dim=4)
    before = copy.deepcopy(model)
    record = {f"mid_block.attentions.0.{name}": {"out": "0"} for name in ("to_q", "to_k")}
    with pytest.raises(ValueError, match="UNet2DModel does not run with what is left of it"):
        structure.apply(model, record)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))


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
    pruned = diffpruning.prune(folders.load("glyphs-uvit"), 0.5, score="magnitude")
    record = json.loads(json.dumps(pruned.config.pruning))
    change(record)
    model = folders.load("glyphs-uvit")
    expected = call(model)
    with pytest.raises(ValueError, match=message):
        structure.apply(model, record)
    assert torch.equal(call(model), expected)
    sparsedm.save(pruned, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"pruning": record}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        sparsedm.load(tmp_path)


BLOCK, ATTENTION = "down_blocks.1.resnets.0", "down_blocks.1.attentions.0"


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("glyphs-unet", lambda r: r[f"{BLOCK}.conv1"].update(out="0-3")),
        ("glyphs-unet", lambda r: r.pop(f"{BLOCK}.conv1")),
        ("glyphs-unet", lambda r: r[f"{ATTENTION}.to_q"].update(out="0-4")),
        ("glyphs-unet", lambda r: r[f"{BLOCK}.norm2"].update(out="0-4")),
        ("glyphs-uvit", lambda r: r["mid_block.mlp.fc2"].pop("in")),
    ],
)
def test_records_whose_layers_do_not_go_together_are_refused_and_change_nothing(name, change, tmp_path):
    pruned = diffpruning.prune(folders.load(name), 0.5, score="magnitude")
    record = json.loads(json.dumps(pruned.config.pruning))
    change(record)
    model = folders.load(name)
    expected = call(model)
    with pytest.raises(ValueError, match="does not run with what is left of it"):
        structure.apply(model, record)
    assert torch.equal(call(model), expected)
    structure.apply(model, pruned.config.pruning)  # the right one still fits


@pytest.mark.parametrize("ratio", [0, 1, -0.5, 1.5])
def test_bad_ratios_are_refused(ratio):
    with pytest.raises(ValueError, match="ratio"):
        diffpruning.prune(folders.load("glyphs-uvit"), ratio, score="random")


def test_pruned_packed_and_training_models_are_refused():
    pruned = diffpruning.prune(folders.load("glyphs-uvit"), 0.5, score="random")
    with pytest.raises(ValueError, match="pruned already"):
        diffpruning.prune(pruned, 0.5, score="random")
    student = folders.load("glyphs-uvit-2x4")
    for other in (sparsedm.sparsify(folders.load("glyphs-uvit"), "2:4", frozen=True), sparsedm.pack(student, backend="kernel")):
        with pytest.raises(ValueError, match="in sparse training or packed; prune the dense one"):
            diffpruning.prune(other, 0.5, score="random")


class Broken(UNet2DModel):
    def forward(self, *args, **kwargs):
        raise RuntimeError("out of order")


def test_models_that_cannot_be_traced_are_refused_and_untouched():
    small = {"block_out_channels": (32, 64), "norm_num_groups": 8, "layers_per_block": 1, "sample_size": 8}
    broken = Broken(down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, **small)
    broken.train()
    before = {key: value.clone() for key, value in broken.state_dict().items()}
    with pytest.raises(ValueError, match="cannot trace Broken: out of order"):
        diffpruning.prune(broken, 0.3, score="magnitude")
    assert all(module.training and not module._forward_hooks for module in broken.modules())
    assert all(torch.equal(value, before[key]) for key, value in broken.state_dict().items())
    assert not getattr(broken.config, "pruning", None)
    for model in (Toy(), nn.Sequential(nn.Linear(4, 4))):
        with pytest.raises(ValueError, match=f"knows U-ViT.*{type(model).__name__} is neither"):
            diffpruning.prune(model, 0.5, score="random", inputs={"x": torch.zeros(1)})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_any_precision_are_scored(dtype):
    model = scored("glyphs-uvit").to(dtype)
    for parameter in model.parameters():
        parameter.grad = parameter.grad.to(dtype)
    for score in ("squared", "absolute", "magnitude"):
        assert diffpruning.prune(model, 0.5, score=score).dtype == dtype


@pytest.mark.parametrize("round_to", [0, -4])
def test_rounding_to_nothing_is_refused(round_to):
    with pytest.raises(ValueError, match=f"round_to {round_to} is not a positive number"):
        diffpruning.prune(folders.load("glyphs-uvit"), 0.5, score="random", round_to=round_to)


def test_a_module_of_ones_own_without_a_config_is_pruned(own):
    images, inputs = torch.randn(4, 1, 8, 8), {"x": torch.zeros(1, 1, 8, 8), "t": torch.zeros(1)}
    assert len(list(diffpruning.importance(own, images, threshold=0.9))) > 0
    pruned = diffpruning.prune(own, 0.5, inputs=inputs)
    assert pruned.mid.weight.shape == (4, 4, 3, 3) and pruned(**inputs).shape == (1, 1, 8, 8)
