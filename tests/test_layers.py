"""The life of a layer: sparsify, the SR-STE gradient, densify, fold, save, report."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import sparsedm
from sparsedm.checkpoints import folders
from sparsedm.diffusion import make_scheduler
from sparsedm.masking import layers, nm
from sparsedm.masking.layers import densify, fold, folded, mask_change, masks, nm_layers, set_pattern, sparsify, weight_layers
from sparsedm.training import checkpoint

KINDS = {
    "linear": (lambda: nn.Linear(16, 5), F.linear, (3, 16)),
    "conv": (lambda: nn.Conv2d(8, 5, 3), F.conv2d, (3, 8, 6, 6)),
}


def _differences(a, b):
    """Keys of two state dicts (or models) whose tensors are not equal bit for bit."""
    a, b = (x.state_dict() if isinstance(x, nn.Module) else x for x in (a, b))
    return {k for k in a.keys() | b.keys() if k not in a or k not in b or not torch.equal(a[k], b[k])}


def _snapshot(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def _step(model, call, optimizer=None):
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), 1e-2)
    call(model).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


# --- the SR-STE gradient ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["2:4", "1:8"])
@pytest.mark.parametrize("options, decay", [({}, 2e-4), *(({"decay": d}, d) for d in (0, 2e-4, 0.1))], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_is_upstream_plus_decay_times_pruned_weight(kind, options, decay, pattern):
    torch.manual_seed(0)
    make, function, shape = KINDS[kind]
    layer = make().double()
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone().requires_grad_()
    layer.weight.data[0] = weight[0] = 0.5  # ties: kept and pruned entries of equal size
    sparsify(nn.Sequential(layer), pattern, **options)
    mask = nm.mask(weight, pattern)
    leaf = (weight * mask).requires_grad_()
    x, y = (torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_() for _ in "xy")
    out, expected = layer(x), function(y, leaf, bias)
    assert torch.equal(out, expected)
    out.pow(3).sum().backward()  # the upstream gradient depends on the forward
    expected.pow(3).sum().backward()
    torch.testing.assert_close(layer.weight.grad, leaf.grad + decay * torch.where(mask, 0, weight), rtol=1e-12, atol=1e-12)
    assert torch.equal(layer.bias.grad, bias.grad) and torch.equal(x.grad, y.grad)
    assert leaf.grad[~mask].abs().max() > 0  # straight through to pruned entries


@pytest.mark.parametrize("kind", KINDS)
def test_backward_is_the_closed_form_of_nm_sparsity(kind):
    """SR-STE as its authors' code computes it: dL/dw of the product by hand, plus decay * w where the M - N smallest are."""
    decay, (make, _, shape) = 0.1, KINDS[kind]
    layer, x = make().double(), torch.randn(shape, dtype=torch.float64)
    sparsify(nn.Sequential(layer), "2:4", decay=decay)
    y = layer(x)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    last = layer.weight.detach().movedim(1, -1)  # the input axis last: groups are runs of 4
    smallest = last.reshape(-1, 4).abs().argsort()[:, :2]
    pruned = torch.zeros(len(smallest), 4, dtype=torch.bool).scatter_(1, smallest, True).reshape(last.shape).movedim(-1, 1)
    if kind == "linear":
        product = upstream.T @ x
    else:
        columns = F.unfold(x, 3)  # [B, in * 9, pixels]
        product = torch.einsum("bop,bip->oi", upstream.flatten(2), columns).view(layer.weight.shape)
    torch.testing.assert_close(layer.weight.grad, product + decay * pruned * layer.weight.detach())


@pytest.mark.parametrize("kind", KINDS)
def test_decoupled_decay_leaves_the_gradient_plain_and_shrinks_only_pruned_weights(kind):
    make, _, shape = KINDS[kind]
    plain = make()
    decoupled = copy.deepcopy(plain)
    sparsify(nn.Sequential(plain), decay=0)
    model = sparsify(nn.Sequential(decoupled), decay=0.1, decay_mode="decoupled")
    x = torch.randn(shape)
    for layer in (plain, decoupled):
        layer(x).square().sum().backward()
    assert torch.equal(plain.weight.grad, decoupled.weight.grad)
    before, mask = decoupled.weight.detach().clone(), decoupled.mask()
    layers.decay_pruned(model, lr=0.5)
    torch.testing.assert_close(decoupled.weight[~mask], before[~mask] * (1 - 0.5 * 0.1))
    assert torch.equal(decoupled.weight[mask], before[mask])


def test_decay_pruned_does_not_touch_layers_with_decay_in_the_gradient():
    model = sparsify(nn.Sequential(nn.Linear(8, 8)), decay=0.1)
    before = _snapshot(model)
    layers.decay_pruned(model, lr=1.0)
    assert not _differences(before, model)


def test_mask_follows_the_weights_in_every_forward():
    layer = nn.Linear(4, 1, bias=False)
    sparsify(nn.Sequential(layer))
    for row in ([4.0, 3, 2, 1], [1.0, 2, 3, 4]):
        layer.weight.data[0] = torch.tensor(row)
        assert layer(torch.ones(4)).item() == 7
    assert layer.eval()(torch.ones(4)).item() == 7


# --- sparsify, densify, fold ------------------------------------------------------------------------------------------


def test_sparsify_keeps_parameters_keys_and_optimiser(model, call):
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    _step(model, call, optimizer)
    parameters, before = dict(model.named_parameters()), _snapshot(model)
    assert sparsify(model) is model
    assert all(parameters[name] is p for name, p in model.named_parameters())
    assert not _differences(before, model)
    _step(model, call, optimizer)
    name, layer = next(nm_layers(model))
    assert not torch.equal(before[f"{name}.weight"], layer.weight)
    assert optimizer.state[layer.weight]["step"] == 2
    model.load_state_dict(before, strict=True)


def test_forward_equals_a_dense_model_with_masked_weights(model, call):
    by_hand = copy.deepcopy(model)
    sparsify(model)
    assert next(nm_layers(model), None)
    for name, _ in nm_layers(model):
        layer = by_hand.get_submodule(name)
        layer.weight.data *= nm.mask(layer.weight, "2:4")
    assert torch.equal(call(model), call(by_hand))


@pytest.mark.parametrize("pattern", ["2:4", "1:2", "7:8"])
def test_fold_keeps_outputs_bit_for_bit_and_weights_pass_verification(model, call, pattern):
    sparsify(model, pattern)
    _step(model, call)
    names, expected, keys = [n for n, _ in nm_layers(model)], call(model), set(model.state_dict())
    assert fold(model) is model
    assert torch.equal(call(model), expected)
    assert set(model.state_dict()) == keys and not layers.is_sparse(model)
    for layer in map(model.get_submodule, names):
        assert type(layer) in (nn.Linear, nn.Conv2d) and not hasattr(layer, "pattern")
        assert nm.verify(layer.weight, pattern) == 0 and layer.weight.count_nonzero() > 0


@pytest.mark.parametrize("shape", [(16, 32), (8, 32)], ids=["two groups", "one group"])
def test_masked_weight_has_the_layout_of_a_folded_one(shape):
    model = sparsify(nn.Sequential(nn.Linear(*shape)), "4:8")
    x = torch.randn(3, shape[0], generator=torch.Generator().manual_seed(0))
    expected, stride = model(x), model[0].masked_weight().stride()
    assert torch.equal(fold(model)(x), expected)
    assert stride == model[0].weight.stride()


def test_densify_restores_class_weights_and_outputs(model, call):
    before, expected, classes = _snapshot(model), call(model), [type(m) for m in model.modules()]
    sparsify(model)
    assert not torch.equal(call(model), expected)
    assert densify(model) is model
    assert not _differences(before, model) and torch.equal(call(model), expected)
    assert [type(m) for m in model.modules()] == classes and "save_pretrained" not in vars(model)


def test_folded_is_a_copy(model, call):
    sparsify(model)
    before = _snapshot(model)
    copied = folded(model)
    assert not _differences(before, model) and next(nm_layers(model), None)
    assert torch.equal(call(copied), call(model)) and not layers.is_sparse(copied)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("make", [lambda **o: nn.Linear(8, 4, **o), lambda **o: nn.Conv2d(8, 4, 1, **o)], ids=["linear", "conv"])
def test_bias_stays_as_it_was(make, bias):
    model = nn.Sequential(make(bias=bias))
    before = model[0].bias
    sparsify(model)
    assert model[0].bias is before and (before is not None) == bias and ("0.bias" in model.state_dict()) == bias


class _Operations(TorchDispatchMode):
    """Names of what torch runs."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad])
@pytest.mark.parametrize("frozen", [False, True])
def test_torch_multiplies_by_masked_and_folded_weights_in_the_same_way(context, frozen):
    """Batches that are not contiguous become one product or many, by whether the weight requires a gradient."""
    model, x = sparsify(nn.Sequential(nn.Linear(16, 8))).requires_grad_(not frozen), torch.randn(2, 16, 5).mT
    runs = []
    for each in (model, folded(model)):
        with context(), _Operations() as operations:
            output = each(x)
        runs.append(([name for name in operations.names if "mm" in name], output))
    assert runs[0][0] == runs[1][0] != [] and torch.equal(runs[0][1], runs[1][1])


@pytest.mark.parametrize("frozen", [False, True])
def test_in_inference_mode_torch_decides_alike_too(frozen):
    """There operations are not seen; what decides is whether the weight's transpose requires a gradient."""
    model = sparsify(nn.Sequential(nn.Linear(16, 8))).requires_grad_(not frozen)
    with torch.inference_mode():
        assert model[0].masked_weight().t().requires_grad == model[0].weight.t().requires_grad == (not frozen)


def test_autocast_keeps_no_casts_of_masked_weights():
    """It would keep those of every forward until it ends."""
    model, x = sparsify(nn.Sequential(nn.Linear(16, 8, bias=False))), torch.randn(2, 16).bfloat16()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        weight = model[0].masked_weight()
        with _Operations() as operations:
            F.linear(x, weight), F.linear(x, weight)
    assert operations.names.count("_to_copy") == 2


# --- layers whose forward is not all that uses their weight ---------------------------------------------------------------


class Functional(nn.Module):
    """y = plain(x) + x @ read.weight' (+ both's, whose weight is also used once more)."""

    def __init__(self, both: bool = False):
        super().__init__()
        self.plain, self.read, self.both = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8) if both else None

    def forward(self, x):
        y = self.plain(x.to(self.plain.weight)) + F.linear(x, self.read.weight)
        return y if self.both is None else y + self.both(x) + x @ self.both.weight.data.T


def test_fold_leaves_a_layer_dense_whose_weight_was_only_read():
    model, x = Functional(), torch.randn(3, 8)
    sparsedm.sparsify(model)  # its class tells no inputs: nothing is known until it is called
    assert "whether the model calls every one" in sparsedm.report(model).summary()
    before, expected = model.read.weight.detach().clone(), model(x)
    notes = {row.name: (row.state, row.note) for row in sparsedm.report(model).rows}
    assert notes["plain"] == ("sparse-training", "") and notes["read"] == ("dense", layers.NEVER_CALLED)
    assert set(layers.patterns(model)) == {"plain"}
    for each in (copy.deepcopy(model), model):
        assert torch.equal(fold(each)(x), expected)
        assert torch.equal(each.read.weight, before) and each.read.dense_reason == layers.NEVER_CALLED
        assert nm.verify(each.plain.weight, "2:4") == 0


def test_decoupled_decay_leaves_a_layer_alone_whose_weight_was_only_read():
    model = sparsify(Functional(), decay=0.5, decay_mode="decoupled")
    model(torch.randn(3, 8))
    before = _snapshot(model)
    layers.decay_pruned(model, lr=0.5)
    assert _differences(before, model) == {"plain.weight"}


def test_calling_a_part_of_the_model_tells_nothing_about_the_rest():
    model = sparsify(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
    model[0](torch.randn(3, 8))
    assert all(nm.verify(layer.weight, "2:4") == 0 for layer in fold(model))


def test_with_inputs_such_layers_are_never_made_sparse():
    model, x = Functional(both=True), torch.randn(3, 8)
    weights = _snapshot(model)
    sparsedm.sparsify(model, inputs={"x": x})
    assert [name for name, _ in nm_layers(model)] == ["plain"] and not _differences(weights, model)
    notes = {row.name: row.note for row in sparsedm.report(model, {"x": x}).rows}
    assert "never called" in notes["read"] and "outside of its forward" in notes["both"]
    expected = model(x)
    assert torch.equal(fold(model)(x), expected)


def test_a_model_that_only_reads_its_weights_is_refused():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(8, 8)

        def forward(self, x):
            return F.linear(x, self.lin.weight)

    with pytest.raises(ValueError, match="no layer of Net takes 2:4.*lin: .*never called"):
        sparsedm.sparsify(Net(), inputs={"x": torch.zeros(1, 8)})


def test_the_dry_run_of_a_diffusers_model_finds_attention_that_reads_its_weights():
    from diffusers import HunyuanDiT2DModel

    model = HunyuanDiT2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, patch_size=2, hidden_size=16, num_layers=2, sample_size=8,
        text_len=4, text_len_t5=4, cross_attention_dim=16, cross_attention_dim_t5=16, pooled_projection_dim=16,
    ).eval()  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(1, 4, 8, 8), "timestep": torch.tensor([3.0]), "encoder_hidden_states": torch.randn(1, 4, 16),
        "text_embedding_mask": torch.ones(1, 4), "encoder_hidden_states_t5": torch.randn(1, 4, 16),
        "text_embedding_mask_t5": torch.ones(1, 4), "image_meta_size": torch.ones(1, 6), "style": torch.zeros(1).long(),
        "image_rotary_emb": (torch.ones(16, 8), torch.zeros(16, 8)),
    }  # fmt: skip
    sparsedm.sparsify(model, inputs=inputs, exclude=())
    dense = {name for name, layer in weight_layers(model) if getattr(layer, "dense_reason", "") == layers.NEVER_CALLED}
    assert dense == {f"time_extra_emb.pooler.{kind}_proj" for kind in "qkvc"}
    with torch.no_grad():
        expected = model(**inputs).sample
        assert torch.equal(fold(model)(**inputs).sample, expected)


def test_a_weight_of_two_modules_stays_dense():
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)), torch.randn(3, 8)
    model[1].weight = model[0].weight
    sparsify(model, exclude=["1"])
    assert [name for name, _ in nm_layers(model)] == ["2"] and model[0].dense_reason == "its weight is used by 0 and 1"
    expected = model(x)
    assert torch.equal(fold(model)(x), expected)


def test_the_dry_run_leaves_model_and_random_numbers_alone(model):
    model.register_forward_pre_hook(lambda module, args: torch.rand(1))  # as a forward that draws noise
    state = torch.get_rng_state()
    sparsedm.sparsify(model)
    assert torch.equal(torch.get_rng_state(), state) and model.training
    assert all("forward" not in vars(module) for module in model.modules()) and not layers.never_called(model)


@pytest.mark.parametrize("kind", KINDS)
def test_sparse_layers_take_their_input_by_name(kind):
    make, _, shape = KINDS[kind]
    layer, x = make(), torch.randn(shape)
    sparsify(nn.Sequential(layer))
    assert torch.equal(layer(input=x), layer(x))


# --- which layers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inputs", [{"num_classes": 5}, {"num_classes": None}, {"num_classes": None, "context_dim": 16}], ids=str)
def test_uvit_default_is_block_linears_and_skip_linear(make_model, inputs):
    model = sparsify(make_model("uvit", **inputs))
    blocks = ["in_blocks.0", "in_blocks.1", "mid_block", "out_blocks.0", "out_blocks.1"]
    expected = {f"{b}.{name}" for b in blocks for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
    expected |= {f"out_blocks.{i}.skip_linear" for i in range(2)}
    assert {name for name, _ in nm_layers(model)} == expected


@pytest.mark.parametrize("channels", [1, 4])
def test_unet_default_is_everything_but_the_first_and_last_convolution(make_model, channels):
    model = sparsify(make_model("unet", in_channels=channels, out_channels=channels))
    every = {n for n, m in model.named_modules() if hasattr(m, "weight") and m.weight.dim() in (2, 4) and "class_emb" not in n}
    assert {name for name, _ in nm_layers(model)} == every - {"conv_in", "conv_out"}
    assert model.conv_out.dense_reason == "excluded by rule conv_out"


def test_a_subclass_has_the_defaults_of_its_parent(make_model):
    for kind in ("unet", "uvit"):
        model, mine = make_model(kind, in_channels=4), make_model(kind, in_channels=4)
        mine.__class__ = type("Mine", (type("Ours", (type(model),), {}),), {})
        sparsify(model), sparsify(mine)
        assert [name for name, _ in nm_layers(mine)] == [name for name, _ in nm_layers(model)]
        notes = ([row.note for row in sparsedm.report(each).rows] for each in (fold(model), fold(mine)))
        assert next(notes) == next(notes)
    config = checkpoint.TrainConfig(steps=1, optimizer="muon")
    groups = ([len(o.param_groups[0]["params"]) for o in checkpoint.make_optimizers(each, config)] for each in (model, mine))
    assert next(groups) == next(groups)


def test_include_exclude_and_overrides(make_model):
    model = sparsify(
        make_model("uvit"), "2:4", include=("in_blocks.*", "mid_block.*"), exclude=("*.qkv",),
        overrides={"mid_block.mlp.*": "7:8", "*.fc1": "1:4"},
    )  # fmt: skip
    found = {name: str(layer.pattern) for name, layer in nm_layers(model)}
    assert found == {
        **{f"in_blocks.{i}.{n}": p for i in range(2) for n, p in (("attn.proj", "2:4"), ("mlp.fc1", "1:4"), ("mlp.fc2", "2:4"))},
        "mid_block.attn.proj": "2:4", "mid_block.mlp.fc1": "7:8", "mid_block.mlp.fc2": "7:8",
    }  # fmt: skip


def test_every_dense_layer_carries_its_reason():
    model = nn.ModuleDict({
        "fits": nn.Linear(8, 8), "odd": nn.Linear(6, 4), "grouped": nn.Conv2d(8, 8, 3, groups=2), "barred": nn.Linear(8, 8),
        "other": nn.Linear(8, 8), "attention": nn.MultiheadAttention(8, 2), "wide": nn.Linear(8, 8),
    })  # fmt: skip
    sparsify(model, include=["[!o]*", "odd"], exclude=["barred"], overrides={"wide": "8:16"})
    assert [name for name, _ in nm_layers(model)] == ["fits"]
    assert {name: layer.dense_reason for name, layer in weight_layers(model) if name != "fits"} == {
        "odd": "6 inputs, not a multiple of 4",
        "grouped": "grouped convolution (2 groups)",
        "barred": "excluded by rule barred",
        "other": "not included",
        "attention.out_proj": "class NonDynamicallyQuantizableLinear is not plain Linear or Conv2d",
        "wide": "8 inputs, not a multiple of 16",
    }
    assert {row.name: row.note for row in sparsedm.report(model).rows}["odd"] == "6 inputs, not a multiple of 4"


@pytest.mark.parametrize("options, message", [
    ({"include": ["nothing.*"]}, "'nothing.*' matches no layer"),
    ({"exclude": ["nothing"]}, "'nothing' matches no layer"),
    ({"overrides": {"nothing": "2:4"}}, "'nothing' matches no layer"),
    ({"overrides": {"mid_block.*": "5:4"}}, "5:4"),
    ({"overrides": {"mid_block.*": "4:4"}}, "4:4 keeps every weight; take N < M"),
    ({"pattern": "2-4"}, "'2-4'"),
    ({"pattern": "5:64"}, "takes 5:64.*16 inputs, not a multiple of 64"),
    ({"decay": -1}, "decay"),
    ({"decay_mode": "both"}, "'both' is none of gradient, decoupled"),
])  # fmt: skip
def test_bad_arguments_are_named_and_change_nothing(make_model, options, message):
    model = make_model("uvit", mlp_ratio=2)  # 16 or 32 inputs
    with pytest.raises(ValueError, match=message):
        sparsify(model, **options)
    assert not layers.is_sparse(model) and "save_pretrained" not in vars(model)


@pytest.mark.parametrize("model", [nn.Sequential(nn.ReLU()), nn.Sequential(nn.Linear(6, 4)), nn.Linear(3, 8)], ids=str)
def test_a_model_in_which_nothing_fits_is_refused(model):
    with pytest.raises(ValueError, match="no layer of (Sequential|Linear) takes 2:4"):
        sparsify(model)


def test_sparsify_again_obeys_the_new_rules():
    model = sparsify(nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8)), "2:4")
    sparsify(model, "8:16", exclude=())
    assert {name: str(layer.pattern) for name, layer in nm_layers(model)} == {"1": "8:16"}


# --- patterns and masks -----------------------------------------------------------------------------------------------


def test_set_pattern_changes_all_layers_or_none(make_model, call):
    model = sparsify(make_model("uvit"), "2:4")
    before = _snapshot(model)
    set_pattern(model, "7:8")
    assert {str(layer.pattern) for _, layer in nm_layers(model)} == {"7:8"} and not _differences(before, model)
    model.mid_block.mlp.fc2.pattern = nm.NMPattern(1, 2)
    with pytest.raises(ValueError, match="in_blocks.0.attn.qkv has 16 inputs, not a multiple of 64"):
        set_pattern(model, "5:64")
    with pytest.raises(ValueError, match="4:4 keeps every weight"):
        set_pattern(model, "4:4")
    assert {str(layer.pattern) for _, layer in nm_layers(model)} == {"7:8", "1:2"}


def test_mask_change_is_the_share_of_masked_weights_that_flipped():
    model = sparsify(nn.Sequential(nn.Linear(8, 1), nn.Linear(4, 2)))
    model[0].weight.data[0] = torch.tensor([4.0, 3, 2, 1, 4, 3, 2, 1])
    before = masks(model)
    assert list(before) == ["0", "1"] and mask_change(before, masks(model)) == 0
    model[0].weight.data[0, :4] = torch.tensor([4.0, 1, 2, 3])  # entries 1 and 3 change places
    assert mask_change(before, masks(model)) == 2 / 16


# --- saving -----------------------------------------------------------------------------------------------------------


def _assert_folder_is_folded(model, loaded):
    assert not _differences(loaded, folded(model))
    assert all(type(layer) in (nn.Linear, nn.Conv2d) for _, layer in weight_layers(loaded))
    assert all(nm.verify(loaded.get_submodule(name).weight, layer.pattern) == 0 for name, layer in nm_layers(model))


def test_save_pretrained_of_a_training_model_writes_the_folded_weights(model, call, tmp_path):
    before = _snapshot(sparsify(model))
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    _assert_folder_is_folded(model, loaded)
    assert torch.equal(call(loaded), call(model.eval()))
    assert not _differences(before, model) and next(nm_layers(model), None)
    _step(model, call)
    assert _differences(before, model)


def test_copy_of_a_sparse_model_saves_its_own_weights(model, call, tmp_path):
    copied = copy.deepcopy(sparsify(model))
    _step(copied, call)
    copied.save_pretrained(tmp_path)
    _assert_folder_is_folded(copied, type(model).from_pretrained(tmp_path))
    assert _differences(folded(copied), folded(model))


def test_save_pretrained_of_a_training_model_outlives_unpack_and_pickling(model, tmp_path):
    sparsedm.unpack(sparsify(model)).save_pretrained(tmp_path / "folder")
    _assert_folder_is_folded(model, type(model).from_pretrained(tmp_path / "folder"))
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    again.save_pretrained(tmp_path / "again")
    _assert_folder_is_folded(again, type(model).from_pretrained(tmp_path / "again"))


def test_save_pretrained_after_fold_and_densify_is_diffusers_own(model, tmp_path):
    dense = _snapshot(model)
    densify(sparsify(model)).save_pretrained(tmp_path / "dense")
    assert not _differences(type(model).from_pretrained(tmp_path / "dense"), dense)
    fold(sparsify(model)).save_pretrained(tmp_path / "folded")
    assert not _differences(type(model).from_pretrained(tmp_path / "folded"), model)


def test_saving_a_pipeline_with_a_training_model_writes_the_folded_weights(make_model, tmp_path):
    from diffusers import DDPMPipeline, DDPMScheduler

    model = sparsify(make_model("unet"))
    DDPMPipeline(model, DDPMScheduler()).save_pretrained(tmp_path)
    _assert_folder_is_folded(model, type(model).from_pretrained(tmp_path / "unet"))


def test_zoo_save_of_a_training_model_writes_the_folded_weights(model, tmp_path):
    before = _snapshot(sparsify(model))
    folders.save(model, tmp_path / "out", dtype=torch.float32)
    _assert_folder_is_folded(model, folders.load(tmp_path / "out"))
    assert not _differences(before, model) and next(nm_layers(model), None)


def test_saving_an_inner_model_that_was_sparsified_through_its_wrapper_is_folded(make_model, tmp_path):
    inner = make_model("unet")
    sparsify(nn.ModuleDict({"unet": inner}), exclude=["unet.conv_in", "unet.conv_out"])
    inner.save_pretrained(tmp_path)
    _assert_folder_is_folded(inner, type(inner).from_pretrained(tmp_path))


@pytest.mark.parametrize("name", ["glyphs-uvit", "glyphs-unet"])
def test_noise_schedule_survives_save_pretrained(name, tmp_path):
    model = fold(sparsify(folders.load(name)))
    model.save_pretrained(tmp_path)
    before, after = (make_scheduler("ddim", m) for m in (model, folders.load(tmp_path)))
    assert after.config.prediction_type == before.config.prediction_type == "v_prediction"
    assert torch.equal(after.betas, before.betas)


# --- report -----------------------------------------------------------------------------------------------------------


def test_report_tells_state_pattern_share_and_totals(make_model):
    model = make_model("uvit")
    dense = sparsedm.report(model)
    assert {row.state for row in dense.rows} == {"dense"} and dense.sparse_macs == dense.dense_macs
    for state in ("sparse-training", "folded"):
        model = sparsify(model) if state == "sparse-training" else fold(model)
        table = sparsedm.report(model)
        assert [row.name for row in table.rows] == [name for name, _ in weight_layers(model)]
        rows = {row.name: row for row in table.rows}
        assert (rows["mid_block.attn.qkv"].state, rows["mid_block.attn.qkv"].pattern) == (state, "2:4")
        assert rows["mid_block.attn.qkv"].shape == (48, 16)
        assert rows["mid_block.attn.qkv"].mac_share == pytest.approx(18 * 16 * 48 / dense.dense_macs)  # 2 + 16 tokens
        assert (rows["decoder_pred"].state, rows["decoder_pred"].pattern) == ("dense", "")
        assert rows["decoder_pred"].note == "excluded by rule decoder_pred"
        saved = sum(row.mac_share / 2 for row in table.rows if row.pattern)
        assert table.sparse_macs == pytest.approx((1 - saved) * table.dense_macs)
        lines = str(table).splitlines()
        assert len(lines) == len(table.rows) + 2 and lines[-1].startswith(f"22 of {len(table.rows)} layers are N:M sparse")
        assert re.search(rf"mid_block.attn.qkv +48x16 +2:4 +{state} +\d", str(table))
        assert table._repr_html_().count("<tr>") == len(table.rows) + 1


def test_report_of_a_model_that_tells_no_input_shape_has_no_macs_unless_inputs_are_given():
    class Toy(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 4)

        def forward(self, x):
            return self.layer(x)

    model = sparsify(Toy())
    assert sparsedm.report(model).rows[0].mac_share is None and sparsedm.report(model).dense_macs is None
    table = sparsedm.report(model, {"x": torch.zeros(1, 8)})
    assert (table.dense_macs, table.sparse_macs, table.rows[0].mac_share) == (32, 16, 1.0)


def test_report_of_a_model_from_a_file_says_why_layers_are_dense():
    notes = {row.name: row.note for row in sparsedm.report(folders.load("glyphs-uvit-2x4")).rows}
    assert notes["decoder_pred"] == "excluded by rule decoder_pred" and notes["mid_block.mlp.fc1"] == ""
    assert not any(row.note for row in sparsedm.report(folders.load("glyphs-uvit")).rows)


def test_frozen_masks_stay_while_others_follow_the_weights():
    frozen, free = (sparsify(nn.Sequential(nn.Linear(16, 8)), frozen=value) for value in (True, False))
    for model in (frozen, free):
        before = masks(model)["0"].clone()
        keys = set(model.state_dict())
        with torch.no_grad():
            model[0].weight.copy_(model[0].weight.flip(1))
        assert torch.equal(masks(model)["0"], before) == (model is frozen)
        x = torch.randn(3, 16)
        expected = nn.functional.linear(x, model[0].weight * masks(model)["0"], model[0].bias)
        torch.testing.assert_close(model(x), expected)
        torch.testing.assert_close(fold(copy.deepcopy(model))(x), expected)
        assert keys == {"0.weight", "0.bias"}
    set_pattern(frozen, "1:4")
    assert masks(frozen)["0"].float().mean() == 0.25 and torch.equal(masks(frozen)["0"], nm.mask(frozen[0].weight, "1:4"))


@pytest.mark.parametrize("scale", [0.25, 1024.0])
def test_the_decay_survives_a_scaled_loss(scale):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 4))
    plain, scaled = (layers.sparsify(copy.deepcopy(model), "2:4", decay=0.5) for _ in range(2))
    x = torch.randn(3, 8)
    plain(x).square().sum().backward()
    layers.set_loss_scale(scaled, scale)
    (scaled(x).square().sum() * scale).backward()
    torch.testing.assert_close(scaled[0].weight.grad / scale, plain[0].weight.grad)
    assert "loss_scale" not in vars(layers.densify(scaled)[0])


def test_compiled_gradients_are_the_same():
    torch.manual_seed(0)
    plain, decayed = nn.Sequential(nn.Linear(8, 12)), nn.Sequential(nn.Linear(12, 4))
    eager = nn.Sequential(layers.sparsify(plain, "2:4", decay=0.0), layers.sparsify(decayed, "2:4", decay=0.5))
    compiled, x = copy.deepcopy(eager), torch.randn(3, 8)
    eager(x).square().sum().backward()
    scalar = {"cpp.simdlen": 1}  # torch's vectors are not tested here, and their headers take a compiler longest
    torch.compile(compiled, options=scalar)(x).square().sum().backward()
    for ours, expected in zip(compiled.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, expected.grad)


# --- other estimators -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("pattern", "row", "expected"), [
    ("2:4", [4.0, -3, 2, 1], [2.0, -1, 0, 0]),  # the second smallest is 2
    ("1:4", [4.0, -3, 2, 1], [1.0, 0, 0, 0]),
    ("3:4", [4.0, -3, 2, -1], [3.0, -2, 1, 0]),
    ("2:4", [1.0, 1, -1, 1], [0.0, 0, 0, 0]),  # ties
])  # fmt: skip
def test_soft_threshold_is_the_formula(pattern, row, expected):
    assert nm.soft_threshold(torch.tensor([row]), pattern).tolist() == [expected]


@pytest.mark.parametrize("kind", KINDS)
def test_s_ste_computes_and_differentiates_by_its_closed_form(kind):
    """S-STE: beta S(w) forward, beta = <w, S(w)> / <S(w), S(w)> fixed at the start; the gradient goes straight through."""
    make, function, shape = KINDS[kind]
    layer, x = make().double(), torch.randn(shape, dtype=torch.float64)
    model = sparsify(nn.Sequential(layer), estimator="s-ste")
    weight = layer.weight.detach().clone()
    groups = weight.movedim(1, -1).reshape(-1, 4)
    threshold = groups.abs().sort(1).values[:, 1:2]
    shrunk = (groups.sign() * (groups.abs() - threshold).clamp(min=0)).reshape(weight.movedim(1, -1).shape).movedim(-1, 1)
    beta = (weight * shrunk).sum() / (shrunk * shrunk).sum()
    leaf = (beta * shrunk).clone().requires_grad_()
    out, expected = layer(x), function(x, leaf, layer.bias)
    torch.testing.assert_close(out, expected)
    out.pow(3).sum().backward()
    expected.pow(3).sum().backward()
    torch.testing.assert_close(layer.weight.grad, leaf.grad)
    with torch.no_grad():
        layer.weight.mul_(2)  # beta stays
    torch.testing.assert_close(layer.masked_weight(), 2 * beta * shrunk)
    folded = layers.folded(model)
    assert torch.equal(folded[0].weight, layer.sparse_weight()) and nm.verify(folded[0].weight, "2:4") == 0


def test_s_ste_is_continuous_where_a_mask_flips():
    rows = {"sr-ste": [], "s-ste": []}
    for estimator, outputs in rows.items():
        layer = nn.Linear(4, 1, bias=False)
        with torch.no_grad():
            layer.weight.copy_(torch.tensor([[3.0, 2, 1.999, 1]]))
        sparsify(nn.Sequential(layer), estimator=estimator)
        outputs.append(layer.sparse_weight())
        with torch.no_grad():
            layer.weight[0, 1] = 1.998
        outputs.append(layer.sparse_weight())
    jumps = {estimator: (b - a).abs().max().item() for estimator, (a, b) in rows.items()}
    assert jumps["sr-ste"] > 1.9 and jumps["s-ste"] < 0.01


@pytest.mark.parametrize(("options", "message"), [
    ({"estimator": "x"}, "none of sr-ste, s-ste"),
    ({"estimator": "s-ste", "decay": 0.1}, "S-STE has no decay"),
    ({"estimator": "s-ste", "frozen": True}, "S-STE has no frozen masks"),
])  # fmt: skip
def test_what_an_estimator_has_not_is_refused(options, message):
    model = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(ValueError, match=message):
        sparsify(model, **options)
    assert type(model[0]) is nn.Linear


def test_s_ste_keeps_its_pattern():
    model = sparsify(nn.Sequential(nn.Linear(8, 8)), estimator="s-ste")
    layers.set_pattern(model, "2:4")
    with pytest.raises(ValueError, match="0 is trained with S-STE.*keep 2:4"):
        layers.set_pattern(model, "1:4")
    assert layers.densify(sparsify(model))[0].__dict__.get("soft_scale") is None
