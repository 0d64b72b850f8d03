"""U-ViT against papers.md 3.1 (forward, written out again here) and 3.2 (names and shapes)."""

import itertools
import math

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler

from sparsedm.models import papers
from sparsedm.models.uvit import UViTModel, timestep_embedding


def _official_shapes(dim, depth, patch, channels, tokens, mlp_ratio=4, classes=None, text=None, conv=True, qkv_bias=False):
    """papers.md 3.2, line by line."""
    hidden = mlp_ratio * dim
    shapes = {"pos_embed": (1, tokens, dim)}
    shapes |= {"patch_embed.proj.weight": (dim, channels, patch, patch), "patch_embed.proj.bias": (dim,)}
    if classes:
        shapes["label_emb.weight"] = (classes, dim)
    if text:
        shapes |= {"context_embed.weight": (dim, text), "context_embed.bias": (dim,)}
    half = range(depth // 2)
    for block in [*(f"in_blocks.{i}" for i in half), "mid_block", *(f"out_blocks.{i}" for i in half)]:
        shapes |= {f"{block}.norm{i}.{part}": (dim,) for i in (1, 2) for part in ("weight", "bias")}
        shapes |= {f"{block}.attn.qkv.weight": (3 * dim, dim)}  # no bias
        shapes |= {f"{block}.attn.proj.weight": (dim, dim), f"{block}.attn.proj.bias": (dim,)}
        shapes |= {f"{block}.mlp.fc1.weight": (hidden, dim), f"{block}.mlp.fc1.bias": (hidden,)}
        shapes |= {f"{block}.mlp.fc2.weight": (dim, hidden), f"{block}.mlp.fc2.bias": (dim,)}
        if qkv_bias:
            shapes[f"{block}.attn.qkv.bias"] = (3 * dim,)
        if block.startswith("out"):
            shapes |= {f"{block}.skip_linear.weight": (dim, 2 * dim), f"{block}.skip_linear.bias": (dim,)}
    shapes |= {"norm.weight": (dim,), "norm.bias": (dim,)}
    shapes |= {"decoder_pred.weight": (patch**2 * channels, dim), "decoder_pred.bias": (patch**2 * channels,)}
    if conv:
        shapes |= {"final_layer.weight": (channels, channels, 3, 3), "final_layer.bias": (channels,)}
    return shapes


@pytest.mark.parametrize("name, expected, parameters", [
    ("uvit-s2-cifar10", _official_shapes(512, 12, 2, 3, 257), 44.255),
    ("uvit-m4-imagenet64", _official_shapes(768, 16, 4, 3, 258, classes=1001), 130.94),
    ("uvit-h2-imagenet256", _official_shapes(1152, 28, 2, 4, 258, classes=1001, conv=False), 500.83),
    ("uvit-h4-imagenet512", _official_shapes(1152, 28, 4, 4, 258, classes=1001, conv=False), 500.94),
    ("uvit-s2-deep-coco", _official_shapes(512, 16, 2, 4, 334, text=768), 58.35),
])  # fmt: skip
def test_names_shapes_and_count_are_the_official_ones(name, expected, parameters):
    with torch.device("meta"):
        model = papers.build(name)
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == expected
    assert sum(map(math.prod, expected.values())) / 1e6 == pytest.approx(parameters, abs=0.005)


def test_a_state_dict_with_the_official_names_loads_strictly_and_an_extra_qkv_bias_does_not():
    shapes = _official_shapes(16, 4, 2, 3, 17)
    model = UViTModel(sample_size=8, embed_dim=16, depth=4, num_heads=2)
    weights = {name: torch.randn(shape) for name, shape in shapes.items()}
    model.load_state_dict(weights, strict=True)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    with pytest.raises(RuntimeError, match="mid_block.attn.qkv.bias"):
        model.load_state_dict({**weights, "mid_block.attn.qkv.bias": torch.zeros(48)}, strict=True)
    biased = UViTModel(sample_size=8, embed_dim=16, depth=4, num_heads=2, qkv_bias=True)
    assert biased.state_dict().keys() == _official_shapes(16, 4, 2, 3, 17, qkv_bias=True).keys()


# --- the forward, once more, from its description ----------------------------------------------------------------------


def _reference(weights, x, t, *, patch, heads, depth, label=None, text=None):
    """U-ViT of one picture [C, H, W] with NumPy alone, from papers.md 3.1."""
    w = {name: value.numpy() for name, value in weights.items()}
    channels, size, _ = x.shape
    side, dim = size // patch, w["norm.weight"].shape[0]
    erf = np.vectorize(math.erf)

    def linear(name, v):
        return v @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)

    def norm(name, v):
        v = v - v.mean(-1, keepdims=True)
        return v / np.sqrt((v**2).mean(-1, keepdims=True) + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]

    def attention(name, v):
        qkv, out, d = linear(f"{name}.qkv", v), [], dim // heads
        for head in range(heads):
            q, k, u = (qkv[:, i * dim + head * d : i * dim + (head + 1) * d] for i in range(3))
            weight = np.exp(q @ k.T * d**-0.5)
            out.append(weight / weight.sum(-1, keepdims=True) @ u)
        return linear(f"{name}.proj", np.concatenate(out, -1))

    def block(name, v):
        v = v + attention(f"{name}.attn", norm(f"{name}.norm1", v))
        hidden = linear(f"{name}.mlp.fc1", norm(f"{name}.norm2", v))
        return v + linear(f"{name}.mlp.fc2", hidden * 0.5 * (1 + erf(hidden / math.sqrt(2))))

    angles = [t * math.exp(-math.log(10000) * i / (dim // 2)) for i in range(dim // 2)]
    tokens = [] if label is None else [w["label_emb.weight"][label]]
    tokens.append(np.array([*map(math.cos, angles), *map(math.sin, angles)]))
    tokens += [] if text is None else list(linear("context_embed", text))
    extras = len(tokens)
    for i, j in itertools.product(range(side), repeat=2):
        cut = x[:, i * patch : (i + 1) * patch, j * patch : (j + 1) * patch]
        tokens.append((w["patch_embed.proj.weight"] * cut).sum((1, 2, 3)) + w["patch_embed.proj.bias"])
    v = np.stack(tokens) + w["pos_embed"][0]
    skips = []
    for i in range(depth // 2):
        v = block(f"in_blocks.{i}", v)
        skips.append(v)
    v = block("mid_block", v)
    for i in range(depth // 2):
        v = block(f"out_blocks.{i}", linear(f"out_blocks.{i}.skip_linear", np.concatenate([v, skips.pop()], -1)))
    v = linear("decoder_pred", norm("norm", v))[extras:]
    image = np.zeros_like(x)
    for i, j, a, b, c in itertools.product(range(side), range(side), range(patch), range(patch), range(channels)):
        image[c, i * patch + a, j * patch + b] = v[i * side + j, (a * patch + b) * channels + c]  # channel fastest
    if "final_layer.weight" not in w:
        return image
    padded = np.pad(image, ((0, 0), (1, 1), (1, 1)))
    kernel, result = w["final_layer.weight"], np.zeros_like(image)
    for i, j in itertools.product(range(3), repeat=2):
        result += np.einsum("oc,chw->ohw", kernel[:, :, i, j], padded[:, i : i + size, j : j + size])
    return result + w["final_layer.bias"][:, None, None]


@pytest.mark.parametrize("options", [{}, {"num_classes": 5}, {"context_dim": 6, "context_tokens": 3}, {"conv": False}], ids=str)
def test_forward_equals_an_independent_implementation(options):
    model = UViTModel(sample_size=6, embed_dim=16, depth=6, num_heads=2, mlp_ratio=3, **options).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.4
    x = torch.randn(2, 3, 6, 6, generator=generator, dtype=torch.float64)
    t, labels, text = torch.tensor([7, 2]), torch.tensor([4, 1]), torch.randn(2, 3, 6, generator=generator, dtype=torch.float64)
    inputs = {"class_labels": labels} if "num_classes" in options else {}
    inputs |= {"encoder_hidden_states": text} if "context_dim" in options else {}
    out = model(x, t, **inputs).sample.detach()
    for i in range(2):
        extra = {"label": int(labels[i]) if "class_labels" in inputs else None}
        extra["text"] = text[i].numpy() if "encoder_hidden_states" in inputs else None
        expected = _reference(model.state_dict(), x[i].numpy(), int(t[i]), patch=2, heads=2, depth=6, **extra)
        np.testing.assert_allclose(out[i].numpy(), expected, rtol=1e-4, atol=1e-5)  # the time embedding is float32


def test_timestep_embedding_is_cosines_then_sines():
    t, dim = [0, 1, 250.5, 999], 16
    expected = [[f(s * 10000 ** (-i / 8)) for f in (math.cos, math.sin) for i in range(8)] for s in t]
    torch.testing.assert_close(timestep_embedding(torch.tensor(t), dim), torch.tensor(expected), rtol=0, atol=1e-4)


def test_timestep_may_be_a_number_a_0d_tensor_or_one_per_picture(make_model):
    model, x, labels = make_model("uvit"), torch.randn(3, 1, 8, 8), torch.tensor([0, 1, 2])
    expected = model(x, torch.tensor([9, 9, 9]), labels).sample
    for t in (9, 9.0, torch.tensor(9), torch.tensor([9])):
        assert torch.equal(model(x, t, labels).sample, expected)
    mixed = model(x, torch.tensor([9, 500, 9]), labels).sample
    different = (mixed - expected).flatten(1).abs().amax(1) > 1e-4
    assert different.tolist() == [False, True, False]


def test_return_dict_false_gives_a_tuple(make_model):
    model, x, labels = make_model("uvit"), torch.randn(1, 1, 8, 8), torch.tensor([0])
    (out,) = model(x, 0, labels, return_dict=False)
    assert torch.equal(out, model(x, 0, labels).sample)


LABELS, TEXT = {"class_labels": torch.tensor([0])}, {"encoder_hidden_states": torch.zeros(1, 77, 6)}


@pytest.mark.parametrize("options, inputs, message", [
    ({"num_classes": 5}, {}, "needs class_labels"),
    ({"num_classes": None}, LABELS, "takes no class_labels"),
    ({"num_classes": 5}, LABELS | TEXT, "takes no encoder_hidden_states"),
    ({"num_classes": None, "context_dim": 6}, {}, "needs encoder_hidden_states"),
])  # fmt: skip
def test_missing_or_superfluous_condition_is_an_error(make_model, options, inputs, message):
    with pytest.raises(ValueError, match=message):
        make_model("uvit", **options)(torch.zeros(1, 1, 8, 8), 0, **inputs)


@pytest.mark.parametrize("options, message", [
    ({"sample_size": 9}, "9.*patch_size 2"), ({"embed_dim": 15}, "15"), ({"num_heads": 3}, "num_heads 3"),
    ({"context_dim": 8}, "not both"),
])  # fmt: skip
def test_sizes_that_do_not_divide_are_an_error(make_model, options, message):
    with pytest.raises(ValueError, match=message):
        make_model("uvit", **options)


@pytest.mark.parametrize("options", [{}, {"num_classes": None, "conv": False}, {"num_classes": None, "context_dim": 6}], ids=str)
def test_save_pretrained_and_from_pretrained_round_trip(make_model, options, tmp_path):
    model = make_model("uvit", **options)
    model.save_pretrained(tmp_path)
    loaded = UViTModel.from_pretrained(tmp_path)
    assert {k: v for k, v in loaded.config.items() if k[0] != "_"} == {k: v for k, v in model.config.items() if k[0] != "_"}
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())


def test_initial_weights_are_truncated_normal_with_std_002_and_zero_biases():
    torch.manual_seed(0)
    model = UViTModel(embed_dim=64, depth=2, num_heads=2)
    linears = (model.mid_block.attn.qkv, model.out_blocks[0].skip_linear, model.decoder_pred)
    for weight in (model.pos_embed, *(linear.weight for linear in linears)):
        assert weight.std().item() == pytest.approx(0.02, rel=0.1) and abs(weight.mean().item()) < 2e-3
    assert not model.mid_block.mlp.fc1.bias.any()


def test_works_in_a_diffusers_pipeline(make_model):
    model = make_model("uvit", in_channels=3, num_classes=None)
    pipeline = DDPMPipeline(model, DDPMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(batch_size=2, num_inference_steps=2, output_type="np", generator=torch.Generator().manual_seed(0)).images
    assert images.shape == (2, 8, 8, 3) and np.isfinite(images).all() and images.std() > 0


def test_gradient_checkpointing_recomputes_the_blocks():
    model = UViTModel(sample_size=8, in_channels=1, embed_dim=16, depth=2, num_heads=2).train()
    model.enable_gradient_checkpointing()
    calls = []
    model.mid_block.register_forward_pre_hook(lambda *args: calls.append(1))
    model(torch.randn(2, 1, 8, 8), 3).sample.square().mean().backward()
    assert len(calls) == 2 and all(p.grad is not None for p in model.parameters())
