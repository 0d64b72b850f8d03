"""Masks against brute force, torch's own 2:4 conversion and torch's own magnitude pruning."""

import itertools
import math

import pytest
import torch
from torch.sparse import _semi_structured_conversions as torch_conversions

from sparsedm.masking import nm
from sparsedm.masking.nm import NMPattern

PATTERNS = ["1:2", "2:4", "1:4", "3:4", "4:8", "7:8", "15:16", "31:32", "5:64"]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def _weight(kind, shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(len(shape))
    if kind == "normal":
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randint(-2, 3, shape, generator=generator).to(dtype)  # ties everywhere
    if kind == "special":
        pick = torch.randint(0, 8, shape, generator=generator)
        for i, value in enumerate((math.nan, -math.nan, math.inf, -math.inf, -0.0)):
            weight[pick == i] = value
    return weight


def _brute_force(weight, pattern):
    """Sort every group of M entries of axis 1 by (NaN first, -|w|, index) and keep the first N."""
    n, m = pattern.n, pattern.m
    rows = weight.movedim(1, -1)
    keep = torch.zeros(rows.numel() // m, m, dtype=torch.bool)
    for flags, group in zip(keep, rows.reshape(-1, m).tolist()):
        order = sorted(range(m), key=lambda i: (-math.inf, i) if math.isnan(group[i]) else (-abs(group[i]), i))
        nans = [i for i in range(m) if math.isnan(group[i])]  # before infinities, whatever their index
        flags[(nans + [i for i in order if i not in nans])[:n]] = True
    return keep.view(rows.shape).movedim(-1, 1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(5, 128), (2, 64, 3, 2)], ids=["linear", "conv"])
@pytest.mark.parametrize("kind", ["normal", "ties", "special"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("text", PATTERNS)
def test_mask_equals_brute_force(text, dtype, kind, shape, device):
    pattern, weight = NMPattern.parse(text), _weight(kind, shape, dtype)
    expected = _brute_force(weight, pattern)
    mask = nm.mask(weight.to(device), pattern).cpu()
    assert mask.dtype == torch.bool and torch.equal(mask, expected)
    assert (mask.unflatten(1, (-1, pattern.m)).sum(2) == pattern.n).all()


def test_ties_zeros_and_nan_by_hand():
    weight = torch.tensor([[0.0, -0.0, 0.0, 0.0], [1, -2, 2, -2], [3, math.nan, math.inf, 4], [-1, 1, 1, -1]])
    expected = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [1, 1, 0, 0]]).bool()
    assert torch.equal(nm.mask(weight, "2:4"), expected)


def test_conv_groups_run_along_input_channels_at_each_kernel_position():
    weight = torch.zeros(1, 4, 1, 2)
    weight[0, [1, 3], 0, 0] = 1.0
    weight[0, [0, 2], 0, 1] = 1.0
    assert torch.equal(nm.mask(weight, "2:4"), weight.bool())


@pytest.mark.parametrize("weight", [
    _weight("normal", (8, 16, 3, 3)).to(memory_format=torch.channels_last),
    _weight("normal", (16, 8)).t(),
    torch.nn.Parameter(_weight("normal", (8, 16))),
], ids=["channels last", "transposed", "parameter"])  # fmt: skip
def test_mask_does_not_depend_on_memory_layout(weight):
    mask = nm.mask(weight, "2:4")
    assert torch.equal(mask, nm.mask(weight.detach().clone(memory_format=torch.contiguous_format), "2:4"))
    assert not mask.requires_grad


def test_n_equal_m_keeps_everything():
    assert nm.mask(torch.zeros(3, 8), "8:8").all()


@pytest.mark.parametrize("shape, pattern", [((4, 6), "2:4"), ((4, 3, 3, 3), "2:4"), ((8,), "2:4"), ((4, 32), "5:64")])
@pytest.mark.parametrize("function", [nm.mask, nm.verify])
def test_weights_that_cannot_be_grouped_are_refused_by_shape(function, shape, pattern):
    with pytest.raises(ValueError, match=str(shape[0])) as error:
        function(torch.ones(shape), pattern)
    assert str(shape) in str(error.value)


@pytest.mark.parametrize("dtype, pattern", [(torch.float16, "2:4"), (torch.bfloat16, "2:4"), (torch.float32, "1:2")], ids=str)
def test_torch_semi_structured_round_trip_is_lossless(dtype, pattern):
    """torch keeps the first two nonzeros of four (first of two in float32), so only a legal mask survives the round trip."""
    dense = _weight("normal", (64, 128), torch.bfloat16).to(dtype)  # torch moves float32 as halves and alters NaN-like ones

    def round_trip(weight):
        compressed = torch_conversions.sparse_semi_structured_from_dense_cutlass(weight)
        return torch_conversions.sparse_semi_structured_to_dense_cutlass(*compressed)

    weight = dense * nm.mask(dense, pattern)
    assert torch.equal(round_trip(weight), weight)
    assert not torch.equal(round_trip(dense), dense)


def test_magnitude_choice_equals_torch_weight_norm_sparsifier():
    from torch.ao.pruning import WeightNormSparsifier

    model = torch.nn.Sequential(torch.nn.Linear(64, 32))
    expected = nm.mask(model[0].weight, "2:4")
    sparsifier = WeightNormSparsifier(sparsity_level=1.0, sparse_block_shape=(1, 4), zeros_per_block=2)
    sparsifier.prepare(model, [{"tensor_fqn": "0.weight"}])
    sparsifier.step()
    assert torch.equal(model[0].parametrizations.weight[0].mask.bool(), expected)


@pytest.mark.parametrize("shape", [(6, 16), (5, 8, 3, 3)], ids=str)
def test_the_mask_is_that_of_asp(shape):
    """apex ASP, "m4n2_1d": of the six ways to keep 2 of 4 the one with the largest sum of magnitudes."""
    weight = torch.randn(shape)
    ways = torch.tensor([[i in kept for i in range(4)] for kept in itertools.combinations(range(4), 2)])
    last = weight.movedim(1, -1)  # groups of 4 inputs, at each kernel position
    best = (last.reshape(-1, 4).abs() @ ways.float().T).argmax(1)
    assert torch.equal(nm.mask(weight, "2:4"), ways[best].reshape(last.shape).movedim(-1, 1))


@pytest.mark.parametrize("text", PATTERNS)
@pytest.mark.parametrize("shape", [(6, 128), (2, 64, 3, 3)], ids=["linear", "conv"])
def test_verify_counts_the_violating_groups(text, shape):
    pattern, weight = NMPattern.parse(text), _weight("normal", shape)
    groups = weight.numel() // pattern.m
    assert nm.verify(weight, pattern) == groups
    weight = weight * nm.mask(weight, pattern)
    assert nm.verify(weight, pattern) == 0
    weight[0, : pattern.m, ...] = 1.0  # one group per kernel position
    assert nm.verify(weight, pattern) == math.prod(shape[2:])


def test_verify_takes_negative_zero_for_zero_and_nan_for_nonzero():
    assert nm.verify(torch.tensor([[1, -0.0, -0.0, 2]]), "2:4") == 0
    assert nm.verify(torch.tensor([[1, math.nan, 0, 2]]), "2:4") == 1


@pytest.mark.parametrize("text", PATTERNS)
def test_detect_finds_the_pattern_of_a_masked_weight(text):
    weight = _weight("normal", (32, 128))
    assert str(nm.detect(weight * nm.mask(weight, text))) == text


@pytest.mark.parametrize("weight", [
    torch.ones(4, 8), torch.zeros(4, 8), torch.ones(8), torch.ones(4, 3, 3, 3), torch.empty(4, 8, device="meta"),
], ids=["dense", "all zero", "1-d", "3 inputs", "meta"])  # fmt: skip
def test_detect_calls_other_weights_dense(weight):
    assert nm.detect(weight) is None


def test_detect_prefers_the_smallest_m_of_equal_density():
    assert str(nm.detect(torch.tensor([[1, 1, 0, 0, 0, 0, 1, 1.0]]))) == "2:4"
    assert str(nm.detect(torch.tensor([[1, 1, 1, 1, 0, 0, 0, 0.0]]))) == "4:8"


@pytest.mark.parametrize("bad", ["5:4", "2-4", "0:4", "2:128", 24, None, "", "2:4:8", "-1:4", "2.0:4", (2, 4)])
def test_parse_refuses_and_names_what_is_no_pattern(bad):
    with pytest.raises(ValueError) as error:
        NMPattern.parse(bad)
    assert str(bad) in str(error.value) and "2:4" in str(error.value)


@pytest.mark.parametrize("text, n, m", [("2:4", 2, 4), (" 31 : 32 ", 31, 32), ("1:1", 1, 1), ("5:64", 5, 64)])
def test_parse_reads_patterns_and_str_gives_them_back(text, n, m):
    pattern = NMPattern.parse(text)
    assert (pattern.n, pattern.m, pattern.density) == (n, m, n / m)
    assert NMPattern.parse(str(pattern)) == pattern == NMPattern.parse(pattern)
