"""MACs against papers.md 3.3 and torch's own flop counter."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import sparsedm
from sparsedm.checkpoints import folders
from sparsedm.masking.layers import fold, sparsify
from sparsedm.measure import macs
from sparsedm.models import dryrun, papers


@pytest.fixture
def small():
    """U-ViT-S/2 for CIFAR-10 without storage."""
    with torch.device("meta"):
        return papers.build("uvit-s2-cifar10")


def _g(value):
    return round(value / 1e9, 3)


def test_uvit_s2_dense_figures(small):
    counts = macs.count(small)
    assert (_g(counts.dense), _g(counts.dense - counts.attention), _g(counts.attention)) == (12.201, 11.322, 0.879)
    assert counts.dense == counts.sparse == counts.executed == sum(layer.dense for layer in counts.layers) + counts.attention


@pytest.mark.parametrize("include, sparse", [(("*.attn.*", "*.mlp.*"), 6.946), (("*",), 5.662 + 0.879)], ids=["blocks", "all"])
def test_uvit_s2_at_2_4(small, include, sparse):
    """papers.md 1.2: 6.067 G of linear MACs with SparseDM's mask, 5.662 G with skip_linear, and 0.879 G of attention."""
    counts = macs.count(sparsify(small, "2:4", include=include))
    assert _g(counts.sparse) == pytest.approx(sparse, abs=0.001)
    assert (_g(counts.dense), _g(counts.executed)) == (12.201, 12.201)  # no kernel skips zeros yet


def test_per_layer_figures_by_hand(small):
    counts = macs.count(sparsify(small)).by_name
    qkv = counts["mid_block.attn.qkv"]
    assert (qkv.dense, qkv.sparse, str(qkv.pattern)) == (257 * 512 * 3 * 512, 257 * 512 * 3 * 256, "2:4")
    assert counts["patch_embed.proj"].dense == counts["patch_embed.proj"].sparse == 256 * 512 * 3 * 2 * 2
    assert counts["final_layer"].dense == 32 * 32 * 3 * 3 * 9 and counts["final_layer"].pattern is None


@pytest.mark.parametrize("options", [
    ("uvit", {}), ("uvit", {"num_classes": None, "in_channels": 3}), ("unet", {}),
    ("unet", {"num_class_embeds": None, "layers_per_block": 2, "downsample_padding": 0}),
], ids=str)  # fmt: skip
def test_dense_equals_half_of_torch_flop_counter(make_model, options):
    model = make_model(options[0], **options[1])
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**dryrun.example_inputs(model))
    assert 2 * macs.count(model).dense == counter.get_total_flops()


def test_attention_written_out_counts_as_much_as_fused_attention(make_model):
    from diffusers.models.attention_processor import AttnProcessor

    model = make_model("unet")
    fused = macs.count(model).attention
    for module in model.modules():
        if hasattr(module, "set_processor"):
            module.set_processor(AttnProcessor())  # baddbmm, softmax, bmm
    assert macs.count(model).attention == fused == 4 * 2 * 16 * 16 * 16  # 4 layers, 2 products, 16 tokens, 16 channels


def test_grouped_strided_convolution_and_linear_by_hand():
    conv, norm = nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2), nn.BatchNorm1d(10)
    model = nn.Sequential(conv, nn.Flatten(), nn.Linear(8 * 4 * 4, 10), norm)
    counts = macs.count(model.eval(), {"input": torch.zeros(1, 4, 8, 8)})
    assert counts.dense == 8 * 2 * 9 * 16 + 128 * 10 and counts.attention == 0


def _flops(model, inputs):
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**inputs)
    return counter.get_total_flops()


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_transposed_convolutions_count_by_what_they_read(axes):
    kind = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[axes - 1]
    model = nn.Sequential(kind(8, 4, 3, stride=2, groups=2))
    inputs = {"input": torch.zeros(1, 8, *[5] * axes)}
    assert 2 * macs.count(model, inputs).dense == _flops(model, inputs) == 2 * 8 * 2 * 3**axes * 5**axes
    (row,) = sparsedm.report(sparsify(nn.Sequential(*model, nn.Linear(4, 4))), None).rows[:1]
    assert row.state == "dense" and "ConvTranspose" in row.note


def test_diffusers_transposed_convolutions_and_fixed_kernels_count():
    from diffusers import UVit2DModel

    model = UVit2DModel(
        hidden_size=32, cond_embed_dim=32, encoder_hidden_size=32, in_channels=32, block_out_channels=32, num_hidden_layers=1,
        num_attention_heads=2, vocab_size=48, codebook_size=40, block_num_heads=2, sample_size=16, downsample=True, upsample=True,
    )  # fmt: skip
    inputs = {
        "input_ids": torch.zeros(1, 16, 16).long(), "encoder_hidden_states": torch.zeros(1, 7, 32),
        "pooled_text_emb": torch.zeros(1, 32), "micro_conds": torch.zeros(1, 5),
    }  # fmt: skip
    counts = macs.count(model, inputs)
    assert 2 * counts.dense == _flops(model, inputs) and counts.by_name["up_block.upsample.conv"].dense == 8 * 8 * 32 * 32 * 2 * 2


class Awkward(nn.Module):
    """One layer, behind what the meta device cannot do."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.layer, self.norm = kind, nn.Linear(8, 4), nn.BatchNorm1d(8)

    def forward(self, x):
        if self.kind == "list":
            x = x[: x.abs().long().clamp(max=0).sum().item() + 2]
        elif self.kind == "bincount":
            x = x[: len(torch.bincount(torch.ones(2).to(x.device).long()))]
        else:
            with torch.autocast(x.device.type, enabled=False):
                x = x * 1
        return self.layer(self.norm(x))


@pytest.mark.parametrize("kind", ["list", "bincount", "autocast"])
def test_models_that_compute_with_values_are_called_for_real(kind):
    """As Lumina2, HiDream and Mochi."""
    model, inputs = Awkward(kind), {"x": torch.randn(3, 8)}
    before = copy.deepcopy(model.state_dict())
    rows = 3 if kind == "autocast" else 2
    assert macs.count(model, inputs).dense == rows * 8 * 4 and dryrun.input_shapes(model, inputs) == {"layer": (rows, 8)}
    assert model.training and all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    fast = sparsedm.pack(sparsedm.sparsify(model, inputs=inputs), inputs=inputs)
    assert macs.count(fast, inputs).dense == rows * 8 * 4


def test_layers_that_are_given_their_input_by_name_count():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Conv2d(8, 4, 3)

        def forward(self, x):
            return self.layer(input=x)

    inputs = {"x": torch.zeros(1, 8, 5, 5)}
    assert macs.count(Net(), inputs).dense == 9 * 4 * 8 * 9 and dryrun.input_shapes(Net(), inputs) == {"layer": (1, 8, 5, 5)}


def test_inputs_that_a_model_does_not_take_raise_its_own_error():
    with pytest.raises(TypeError, match="wrong"):
        macs.count(Awkward("list"), {"wrong": torch.zeros(1, 8)})


def test_a_layer_used_twice_counts_twice():
    layer = nn.Linear(8, 8)
    assert macs.count(nn.Sequential(layer, layer), {"input": torch.zeros(1, 8)}).dense == 2 * 64


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "3:4", "7:8", "5:64", "2:6"])
def test_folded_and_training_students_count_the_same(make_model, pattern):
    model = sparsify(make_model("uvit", embed_dim=192, num_heads=3), pattern)
    training = macs.count(model)
    folded = macs.count(fold(model))
    assert training == folded and training.sparse < training.dense


def test_count_does_not_touch_the_model(model, call):
    sparsify(model)
    call(model).sum().backward()
    model.train()
    before = copy.deepcopy(model)
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    macs.count(model)
    assert all(module.training and not module._forward_hooks for module in model.modules())
    assert [type(m) for m in model.modules()] == [type(m) for m in before.modules()]
    for (name, new), old in zip(model.named_parameters(), before.parameters()):
        assert new.requires_grad and torch.equal(new, old) and torch.equal(new.grad, grads[name]), name


def test_counts_are_per_image_and_guidance_needs_two_calls(make_model):
    model = make_model("unet")
    assert dryrun.example_inputs(model, batch=3)["sample"].shape == (3, 1, 8, 8)
    assert (macs.Macs.calls(50), macs.Macs.calls(50, guidance=1.0)) == (50, 100)


def test_a_model_without_input_shape_asks_for_inputs():
    with pytest.raises(ValueError, match="Linear.*inputs="):
        macs.count(nn.Linear(8, 8))


def test_bundled_students_save_close_to_half_of_the_linear_macs():
    for name in (n for n in folders.bundled() if n.endswith("-2x4")):
        counts = macs.count(folders.load(name))
        assert 0.45 < (counts.dense - counts.sparse) / (counts.dense - counts.attention) < 0.5, name
