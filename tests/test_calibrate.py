"""One-shot sparsity with calibration: the methods against brute force, and the generator that goes through a model."""

import copy
import functools
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset

import sparsedm
from sparsedm.masking import layers, nm, obs
from sparsedm.training.calibrate import METHODS

PATTERNS = ("2:4", "1:4", "3:4", "4:8", "1:2", "4:4")


def problem(d: int = 24, out: int = 5, tokens: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [out, d] and inputs [tokens, d] whose columns hang together, in float64."""
    mix = torch.randn(d, d, dtype=torch.float64) / d**0.5 + torch.eye(d, dtype=torch.float64)
    return torch.randn(out, d, dtype=torch.float64), torch.randn(tokens, d, dtype=torch.float64) @ mix + 0.3


def moments(x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor | None = None) -> obs.Moments:
    found = obs.Moments(x.shape[1], y.shape[1])
    found.add(x, y, weight)
    return found


# --- one layer ---------------------------------------------------------------------------------------------------------


def brute_force(weight: torch.Tensor, hessian: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """Sequential OBS as in a textbook: after each column the Hessian of those that remain is inverted anew."""
    w, d = weight.clone(), weight.shape[1]
    inverses = [torch.linalg.inv(hessian[j:, j:]) for j in range(d)]
    for row in w:
        for j in range(d):
            if j % m == 0:
                saliency = [(row[i] ** 2 / inverses[i][0, 0]).item() for i in range(j, j + m)]
                dropped = [j + i for i in sorted(range(m), key=saliency.__getitem__)[: m - n]]
            if j in dropped:
                row[j:] -= row[j] / inverses[j][0, 0] * inverses[j][0]
                row[j] = 0
    return w


@pytest.mark.parametrize("d", [24, 160])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_sequential_obs_equals_brute_force(pattern, d):
    weight, x = problem(d, tokens=3 * d)
    hessian = x.T @ x
    expected = brute_force(weight, hessian, *map(int, pattern.split(":")))
    found = obs.sequential(weight, hessian, pattern)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(found == 0, expected == 0) and nm.verify(found, pattern) == 0


@pytest.mark.parametrize("pattern", PATTERNS)
def test_wanda_keeps_the_largest_products_of_weight_and_input_norm(pattern):
    (weight, x), (n, m) = problem(), map(int, pattern.split(":"))
    found = obs.wanda(weight, moments(x, x @ weight.T), pattern)
    for i, j in itertools.product(range(5), range(0, 24, m)):
        score = [abs(weight[i, k].item()) * x[:, k].norm().item() for k in range(j, j + m)]
        kept = sorted(range(m), key=score.__getitem__)[m - n :]
        assert found[i, j : j + m].tolist() == [weight[i, j + k].item() if k in kept else 0 for k in range(m)]


@pytest.mark.parametrize("options", [
    {}, {"stride": 2}, {"dilation": (1, 2)}, {"padding": (2, 1), "padding_mode": "circular"}, {"padding": "same"},
    {"kernel_size": (1, 1)}, {"kernel_size": (2, 3), "padding": 1, "padding_mode": "reflect"},
], ids=str)  # fmt: skip
def test_a_convolution_is_the_unfolded_linear_problem(options):
    layer = nn.Conv2d(8, 6, **{"kernel_size": (3, 3)} | options).double()
    x = torch.randn(3, 8, 7, 9, dtype=torch.float64)
    unfolded, weight = obs.tokens(layer, x), obs.columns(layer.weight)
    expected = obs.outputs(layer, layer(x))
    torch.testing.assert_close(unfolded @ weight.T, expected, rtol=1e-12, atol=1e-12)
    chosen = torch.tensor([5, 0, 5, 11])
    assert torch.equal(obs.tokens(layer, x, chosen), unfolded[chosen])
    assert torch.equal(obs.from_columns(weight, layer.weight.shape), layer.weight)
    assert torch.equal(obs.columns(nm.mask(layer.weight, "2:4")), nm.mask(weight, "2:4"))  # the same groups


def test_weighted_moments_give_the_error_of_a_weight_and_of_the_bias_that_follows():
    weight, x = problem()
    y, alpha = x @ torch.randn(24, 5, dtype=torch.float64) + 1, torch.rand(200, dtype=torch.float64)
    found = obs.Moments(24, 5)
    for part in (slice(0, 50), slice(50, 200)):
        found.add(x[part], y[part], alpha[part])
    total = (alpha[:, None] * y.square()).sum()
    for shift in (0.0, found.shift(weight)):
        expected = (alpha[:, None] * (y - x @ weight.T - shift).square()).sum() / total
        assert found.error(weight, shift) == pytest.approx(expected.item(), rel=1e-4)
    best = (alpha[:, None] * (y - x @ weight.T)).sum(0) / alpha.sum()
    torch.testing.assert_close(found.shift(weight), best, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("centred", [False, True])
def test_the_optimum_is_the_least_squares_weight(centred):
    weight, x = problem()
    y = x @ weight.T + torch.randn(200, 5, dtype=torch.float64)
    found = moments(x, y)
    design = torch.cat([x, torch.ones(200, 1, dtype=torch.float64)], 1) if centred else x
    expected = torch.linalg.lstsq(design, y).solution.T[:, :24]
    hessian, target = obs.quadratic(found, torch.zeros_like(weight), 0.0, centred)
    torch.testing.assert_close(target, expected, rtol=1e-3, atol=1e-3)
    other = target + 0.1 * torch.randn_like(target)
    raised = (((other - target) @ hessian) * (other - target)).sum() / found.square
    at = [found.error(w, found.shift(w) if centred else 0.0) for w in (target, other)]
    assert at[1] - at[0] == pytest.approx(raised.item(), rel=1e-3)


def test_the_layers_own_outputs_leave_the_weight_as_the_optimum():
    weight, x = problem()
    _, target = obs.quadratic(moments(x, x @ weight.T), weight, 0.1)
    torch.testing.assert_close(target, weight, rtol=1e-4, atol=1e-4)


def test_refit_equals_least_squares_on_the_kept_columns():
    weight, x = problem()
    sparse = nm.masked(weight, nm.mask(weight, "2:4"))
    found = obs.refit(sparse, weight, x.T @ x, 60)
    for row, kept, before in zip(found, sparse != 0, weight, strict=True):
        expected = torch.linalg.lstsq(x[:, kept], x @ before).solution
        torch.testing.assert_close(row[kept], expected, rtol=1e-6, atol=1e-6)
        assert not row[~kept].any()


def test_admm_comes_close_to_the_best_of_all_masks():
    weight, x = problem(d=8, out=40)
    hessian = x.T @ x
    groups = [c for c in itertools.product([0, 1], repeat=4) if sum(c) == 2]
    masks = torch.tensor([a + b for a in groups for b in groups], dtype=torch.bool)  # [36, 8]
    error = lambda w: (((w - weight) @ hessian) * (w - weight)).sum(1)  # noqa: E731
    fitted = [error(obs.refit(weight * mask, weight, hessian)) for mask in masks]
    best = torch.stack(fitted).min(0).values
    found = error(obs.refit(obs.admm(weight, hessian, "2:4"), weight, hessian))
    sequential = error(obs.refit(obs.sequential(weight, hessian, "2:4"), weight, hessian))
    assert (found >= best - 1e-9).all() and found.sum() < 1.3 * best.sum() and found.sum() < sequential.sum()


def test_timestep_weights_are_those_of_obs_diff():
    t = torch.tensor([981, 1, 501, 981])
    found = [0.8 + 0.4 * math.log(1 + i) / math.log(3) for i in (2, 0, 1, 2)]
    assert obs.timestep_weights(t).tolist() == pytest.approx(found) and max(found) == pytest.approx(1.2)
    assert obs.timestep_weights(torch.zeros(2)).tolist() == pytest.approx([0.8, 0.8])


@pytest.mark.parametrize(("x", "reason"), [(torch.zeros(9, 4), "singular"), (torch.full((9, 4), 1e30), "not finite")])
def test_moments_without_a_minimum_say_so(x, reason):
    with pytest.raises(obs.Unsolvable, match=reason):
        obs.quadratic(moments(x, torch.ones(9, 2)), torch.ones(2, 4))


# --- a whole model -----------------------------------------------------------------------------------------------------

SMALL = {"n": 64, "batch_size": 32, "packages": 3}


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(model: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def output_error(model: nn.Module, teacher: nn.Module) -> float:
    x, t = torch.randn(64, 1, 8, 8), torch.randint(1000, (64,))
    labels = torch.arange(64) % 5
    with torch.no_grad():
        a, b = (m.eval()(x, t, class_labels=labels).sample for m in (model, teacher))
    return F.mse_loss(a, b).item()


class Tokens(Dataset):
    """Noise of the tiny models' size with their four classes."""

    classes = tuple("abcd")

    def __len__(self):
        return 40

    def __getitem__(self, index):
        return torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(index)), index % 4


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("source", [Tokens(), None], ids=["data", "trajectories"])
def test_every_chosen_layer_ends_sparse_and_the_update_beats_magnitude(model, source, method):
    chosen = {name for name, _ in layers.nm_layers(layers.sparsify(copy.deepcopy(model)))}
    teacher, magnitude = copy.deepcopy(model), layers.fold(layers.sparsify(copy.deepcopy(model)))
    extra = {"steps": 6} if source is None else {}
    states = list(sparsedm.calibrate(model, source, method=method, **SMALL, **extra))
    assert {s.name for s in states} == chosen == set(layers.patterns(model)) and states[-1].layer == len(chosen)
    assert {str(p) for p in layers.patterns(model).values()} == {"2:4"} and not list(layers.nm_layers(model))
    assert all(s.after == s.before if method == "magnitude" else s.after >= 0 for s in states)
    if method in ("obs", "admm"):
        assert sum(s.after for s in states) < 0.7 * sum(s.before for s in states)
        assert output_error(model, teacher) < output_error(magnitude, teacher)


def test_rules_patterns_and_reasons_are_those_of_sparsify(make_model):
    model = make_model("unet")
    options = {"pattern": "1:4", "exclude": ("conv_in", "*time*"), "overrides": {"*.to_q": "2:4", "*conv1": "4:8"}}
    expected = layers.sparsify(copy.deepcopy(model), **options)
    list(sparsedm.calibrate(model, Tokens(), **SMALL, **options))
    for name, layer in layers.weight_layers(expected):
        own = model.get_submodule(name)
        assert own.dense_reason == getattr(layer, "dense_reason", "")
        assert own.dense_reason or nm.verify(own.weight, layer.pattern) == 0


def test_the_same_seed_gives_the_same_weights_and_leaves_the_random_stream_alone(make_model):
    first, second, third = (make_model("unet") for _ in range(3))
    torch.manual_seed(5)
    list(sparsedm.calibrate(first, Tokens(), tokens=500, **SMALL))
    drawn = torch.rand(1)
    list(sparsedm.calibrate(second, Tokens(), tokens=500, **SMALL))
    list(sparsedm.calibrate(third, Tokens(), tokens=500, seed=1, **SMALL))
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(1))
    assert same(first, second.state_dict()) and not same(first, third.state_dict())


def test_packages_are_as_many_as_memory_asks_for_and_see_what_was_pruned(make_model):
    def run(**options):
        model = make_model("uvit")
        return [round(s.before, 6) for s in sparsedm.calibrate(model, Tokens(), **SMALL | options)]

    one, small, each = run(packages=1), run(packages=1, max_memory=1), run(packages=99)
    assert one != each and small == each


def test_half_precision_is_computed_in_float32_and_stored_back(make_model):
    half, full = make_model("unet").bfloat16(), make_model("unet").bfloat16().float()
    for model in (half, full):
        list(sparsedm.calibrate(model, Tokens(), **SMALL))
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert same(full.bfloat16(), half.state_dict())


def test_a_function_that_runs_the_model_gives_the_inputs(make_model):
    model, seen = make_model("uvit"), []
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(args), with_kwargs=True)

    def run():
        for t in (900, 100):
            model(torch.randn(40, 1, 8, 8), torch.tensor(t), class_labels=torch.arange(40) % 4)

    states = list(sparsedm.calibrate(model, run, weights="obs-diff"))
    assert len(seen) > 2 and sum(s.after for s in states) < sum(s.before for s in states)


@pytest.mark.parametrize("steps", [0, 1, 7])
def test_a_stop_in_the_middle_leaves_the_model_as_it_was(model, steps):
    model.train()
    before, classes = state(model), [type(m) for m in model.modules()]
    states = sparsedm.calibrate(model, Tokens(), **SMALL)
    for _ in range(steps):
        next(states)
    states.close()
    assert same(model, before) and classes == [type(m) for m in model.modules()]
    assert (
        model.training and all(p.requires_grad for p in model.parameters()) and not any(m._forward_hooks for m in model.modules())
    )


def test_what_is_not_finite_is_named_and_nothing_changes(make_model):
    model = make_model("uvit")
    model.in_blocks[1].mlp.fc1.weight.data[0, 0] = math.nan
    before = model.mid_block.mlp.fc1.weight.clone()
    with pytest.raises(FloatingPointError, match=r"in_blocks\.1\.mlp\.fc1 has weights that are not finite; nothing is changed"):
        next(sparsedm.calibrate(model, Tokens(), **SMALL))
    model = make_model("uvit")
    model.in_blocks[1].norm2.weight.data[0] = math.inf
    before = state(model)
    with pytest.raises(FloatingPointError, match=r"inputs of in_blocks\.1\.mlp\.fc1 are not finite .*; nothing is changed"):
        list(sparsedm.calibrate(model, Tokens(), **SMALL))
    assert same(model, before)


def test_a_singular_layer_and_one_that_does_not_run_say_so_in_the_report(make_model):
    model = make_model("uvit")
    model.mid_block.norm2.weight.data.zero_()
    model.spare = nn.Linear(16, 16)
    spare = model.spare.weight.clone()
    states = {s.name: s for s in sparsedm.calibrate(model, Tokens(), **SMALL)}
    notes = {row.name: row.note for row in sparsedm.report(model).rows}
    assert notes["mid_block.mlp.fc1"] == states["mid_block.mlp.fc1"].fallback != ""
    assert "Wanda" in notes["mid_block.mlp.fc1"] and "singular" in notes["mid_block.mlp.fc1"]
    assert "never called" in notes["spare"] and not notes["mid_block.attn.qkv"]
    assert torch.equal(model.spare.weight, spare) and nm.verify(model.mid_block.mlp.fc1.weight, "2:4") == 0
    assert "spare" not in states and {s.layers for s in states.values()} == {len(states)}


class Reads(nn.Module):
    """Calls `lin` with a keyword, reads the weight of `read`, and does both with `both`."""

    def __init__(self):
        super().__init__()
        self.lin, self.read, self.both = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: torch.Tensor, timestep: torch.Tensor | None = None) -> torch.Tensor:
        return F.linear(self.lin(input=x), self.read.weight) + F.linear(self.both(x), self.both.weight)


def lin_of(reads: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value for name, value in state(reads).items() if name.startswith("lin.")}


def test_layers_whose_weight_is_read_outside_of_their_forward_stay_dense(make_model):
    model = make_model("uvit")
    model.mid_block.mlp = Reads()
    reads = copy.deepcopy(model.mid_block.mlp)
    states = {s.name for s in sparsedm.calibrate(model, Tokens(), **SMALL)}
    notes = {row.name.removeprefix("mid_block.mlp."): row.note for row in sparsedm.report(model).rows}
    assert "never called" in notes["read"] and "outside of its forward" in notes["both"] and not notes["lin"]
    assert "mid_block.mlp.lin" in states and not {"mid_block.mlp.read", "mid_block.mlp.both"} & states
    assert same(model.mid_block.mlp, state(reads) | lin_of(model.mid_block.mlp))


class One(nn.Module):
    """A model of one layer."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor, timestep: torch.Tensor | None = None) -> torch.Tensor:
        return self.layer(x)


@pytest.mark.parametrize("method", METHODS)
def test_a_calibrated_convolution_is_the_calibrated_linear_layer_of_its_patches(method):
    x, conv = torch.randn(40, 8, 6, 6), nn.Conv2d(8, 6, 3, padding=1)
    patches = F.unfold(x, 3, padding=1).unflatten(1, (8, 9)).permute(0, 3, 2, 1).flatten(2)  # [B, tokens, 9 * 8]
    linear = nn.Linear(72, 6)
    linear.load_state_dict({"weight": conv.weight.detach().permute(0, 2, 3, 1).flatten(1), "bias": conv.bias.detach()})
    for model, given in ((pictures := One(conv), x), (rows := One(linear), patches)):
        list(sparsedm.calibrate(model, functools.partial(model, given, torch.zeros(40)), method=method))
    found = pictures.layer.weight.permute(0, 2, 3, 1).flatten(1)
    torch.testing.assert_close(found, rows.layer.weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pictures.layer.bias, rows.layer.bias, rtol=1e-4, atol=1e-5)
    assert nm.verify(pictures.layer.weight, "2:4") == 0 == nm.verify(rows.layer.weight, "2:4")


def test_a_layer_that_does_not_run_stays_dense_in_a_model_whose_inputs_are_unknown():
    model, x = Reads(), torch.randn(64, 16)
    before = state(model)
    states = list(sparsedm.calibrate(model, lambda: model(x, torch.zeros(64)), exclude=["both"]))
    assert [s.name for s in states] == ["lin"] and nm.verify(model.lin.weight, "2:4") == 0
    assert same(model, before | lin_of(model))
    notes = {row.name: row.note for row in sparsedm.report(model, {"x": x}).rows}
    assert "did not run in calibration" in notes["read"] and not notes["lin"]
    with pytest.raises(ValueError, match=r"no chosen layer ran .*read.*choose others"):
        next(sparsedm.calibrate(model, lambda: model(x, torch.zeros(64)), include=["read"]))


def test_fewer_tokens_than_inputs_warn_with_the_number_that_would_do(make_model):
    with pytest.warns(UserWarning, match=r"time_embedding\.linear_2 has fewer .* tokens than inputs at n=8; n=32 would do"):
        list(sparsedm.calibrate(make_model("unet"), Tokens(), n=8))


class TooMany(Tokens):
    classes = tuple("abcdefgh")


@pytest.mark.parametrize(("arguments", "options", "message"), [
    ((Tokens(),), {"method": "best"}, "method 'best' is none of magnitude, wanda"),
    ((Tokens(),), {"weights": "later"}, "weights 'later' is none of uniform, obs-diff"),
    ((Tokens(),), {"n": 0}, "n must be at least 1, it is 0"),
    ((Tokens(),), {"steps": 5}, "steps is for calibration without data"),
    ((Tokens(),), {"exclude": ("nothing.*",)}, "'nothing.*' matches no layer"),
    ((TooMany(),), {}, "UViTModel has 4 classes and a label for none, the data set 8"),
    ((None,), {"class_labels": torch.tensor([9])}, "classes of this model are 0 to 3"),
    ((lambda: None,), {}, "did not call the UViTModel"),
    (("glyph",), {}, "unknown data set 'glyph'"),
])  # fmt: skip
def test_refusals_name_the_remedy_and_change_nothing(make_model, arguments, options, message):
    model = make_model("uvit")
    before = state(model)
    with pytest.raises(ValueError, match=message):
        list(sparsedm.calibrate(model, *arguments, **options))
    assert same(model, before)


def test_a_model_in_sparse_training_is_refused(make_model):
    with pytest.raises(ValueError, match="in sparse training; calibrate the dense one"):
        next(sparsedm.calibrate(layers.sparsify(make_model("uvit")), Tokens()))


def test_a_layer_that_runs_and_is_read_elsewhere_stays_dense_in_a_model_whose_inputs_are_unknown():
    model, x = Reads(), torch.randn(64, 16)
    before = state(model)
    states = list(sparsedm.calibrate(model, lambda: model(x, torch.zeros(64))))
    assert [s.name for s in states] == ["lin"] and same(model, before | lin_of(model))
    assert "outside of its forward" in model.both.dense_reason
