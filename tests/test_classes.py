"""Every denoiser class that diffusers exports, at tiny size, goes the whole way or is refused by name.

`python tests/test_classes.py` prints the table of docs/models.md from what is tested here.
"""

import copy
import re
from pathlib import Path

import diffusers
import pytest
import torch
from classes import OTHER, TINY, exported
from torch import nn

import sparsedm
from sparsedm.checkpoints import folders
from sparsedm.masking import layers
from sparsedm.measure import macs
from sparsedm.models import denoisers
from sparsedm.packing import kernels, packed

PAGE = Path(__file__).parent.parent / "docs" / "models.md"
ROOMS = {
    "autoencoders": "autoencoders", "controlnets": "ControlNets", "condition_embedders": "encoders of conditions",
    "adapter": "adapters", "latent_upscaler": "upscalers",
}  # fmt: skip
MOVES = (
    r"first, last|modulation or embedding|grouped convolution|its forward is never called|class Conv|\d+ inputs, not a multiple"
)


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = exported()[name](**TINY[name].config).eval()
    for parameter in model.parameters():  # some begin as zeros, which hide the layers before, or without any values
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.1)
    return model


def inputs_of(name: str) -> dict | None:
    """The arguments of a call that a dry run can follow."""
    return TINY[name].inputs() if TINY[name].inputs and not TINY[name].flex else None


def first(output) -> torch.Tensor:
    """The first tensor in what a model returns."""
    while not isinstance(output, torch.Tensor):
        output = output[0]
    return output


def run_order(model: nn.Module, inputs: dict) -> dict[str, int]:
    """The layers in the order in which they run last, and the positions that each computes in one call."""
    seen: dict[str, int] = {}

    def note(name: str, layer: nn.Module, output: torch.Tensor) -> None:
        axis = -1 if isinstance(layer, nn.Linear) else 1
        seen[name] = seen.pop(name, 0) + output.numel() // output.shape[axis]

    hooks = [
        layer.register_forward_hook(lambda layer, args, output, name=name: note(name, layer, output))
        for name, layer in layers.weight_layers(model)
    ]
    with torch.no_grad():
        model(**inputs)
    for hook in hooks:
        hook.remove()
    return seen


def row(name: str, student: nn.Module) -> str:
    """The line of the table for a sparse student of this class."""
    sparse, total = (sum(1 for _ in found(student)) for found in (layers.nm_layers, layers.weight_layers))
    called = "refused: flex attention" if TINY[name].flex else "yes" if TINY[name].inputs else "not called"
    trained = "yes" if exported()[name].__name__ in denoisers.FAMILIES else "refused"
    return f"| {name} | {sparse} of {total} | {called} | {trained} |"


def others() -> str:
    """The sentence for the models of diffusers that do not denoise."""
    kinds: dict[str, list[str]] = {}
    for name in sorted(exported().keys() - TINY.keys()):
        kinds.setdefault(kind_of(name), []).append(name)
    return "\n".join(f"- {kind}: {', '.join(names)}" for kind, names in sorted(kinds.items()))


def kind_of(name: str) -> str:
    room = exported()[name].__module__.removeprefix("diffusers.models.").split(".")[0]
    return OTHER.get(name) or ROOMS.get(room) or pytest.fail(f"{name} is neither in TINY nor in OTHER of tests/classes.py")


every_class = pytest.mark.parametrize("name", TINY)


@every_class
def test_a_class_goes_the_whole_way(name, tmp_path):
    model, inputs = make(name), inputs_of(name)
    student = sparsedm.sparsify(copy.deepcopy(model), inputs=inputs)
    sparse = {layer for layer, _ in layers.nm_layers(student)}
    assert row(name, student) in PAGE.read_text().splitlines(), f"run python {Path(__file__).name}"
    assert all(module.dense_reason for layer, module in layers.weight_layers(student) if layer not in sparse)
    if inputs:
        with torch.no_grad():
            expected = first(student(**inputs))
    folded = layers.fold(student)
    assert layers.patterns(folded).keys() >= sparse
    folders.save_packed(folded, tmp_path)
    loaded = folders.load(tmp_path).state_dict()
    assert all(torch.equal(value, loaded[key]) for key, value in folded.state_dict().items())
    fast = sparsedm.pack(copy.deepcopy(folded), backend="kernel") if kernels.available() else folded
    assert not kernels.available() or packed.has_packed(fast)
    if not inputs:
        return
    with torch.no_grad():
        assert torch.equal(first(folded(**inputs)), expected)
        torch.testing.assert_close(first(fast(**inputs)), expected, rtol=1e-3, atol=1e-4)
    counts = macs.count(folded, inputs)
    assert 0 < counts.sparse < counts.dense
    states = list(sparsedm.calibrate(model, lambda: model(**inputs), method="wanda"))
    assert {state.name for state in states} == sparse


def has_its_own_rule(name: str) -> bool:
    families = (denoisers.FAMILIES.get(cls.__name__) for cls in exported()[name].__mro__)
    return any(family and family.dense is not None for family in families)


@pytest.mark.parametrize("name", [name for name in TINY if TINY[name].flex])
def test_flex_attention_is_refused_before_anything_changes(name):
    model, inputs = make(name), TINY[name].inputs()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=f"{name} computes with flex attention.*without inputs="):
        sparsedm.sparsify(model, inputs=inputs)
    assert not layers.is_sparse(model) and all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", [name for name in TINY if inputs_of(name) and not has_its_own_rule(name)])
def test_the_general_rule_leaves_dense_what_runs_first_last_or_once_a_picture(name):
    """Found by a call, where the rule goes by names."""
    model = make(name)
    order = run_order(model, TINY[name].inputs())
    student = sparsedm.sparsify(model)
    sparse = {layer for layer, _ in layers.nm_layers(student)}
    edges = {next(iter(order)), list(order)[-1], *(layer for layer, positions in order.items() if positions == 1)}
    assert not sparse & edges, sparse & edges
    dense = {layer: module.dense_reason for layer, module in layers.weight_layers(student) if layer not in sparse}
    assert all(re.match(MOVES, reason) for reason in dense.values()), dense


def test_weights_of_timesteps_need_one_timestep_a_row():
    model, inputs = make("AnyFlowTransformer3DModel"), TINY["AnyFlowTransformer3DModel"].inputs()  # one a frame
    with pytest.raises(ValueError, match="'obs-diff' need one timestep for each row.*leave"):
        next(sparsedm.calibrate(model, lambda: model(**inputs), weights="obs-diff"))


def test_every_class_of_diffusers_is_in_the_tables():
    """A class that diffusers has added or dropped is named here."""
    assert TINY.keys() <= exported().keys() and OTHER.keys() <= exported().keys() - TINY.keys()
    assert others() in PAGE.read_text(), f"run python {Path(__file__).name}: {others()}"


@pytest.mark.parametrize("name", [name for name in exported() if name not in denoisers.FAMILIES])
def test_what_cannot_be_trained_or_sampled_is_refused_by_name(name):
    with pytest.raises(ValueError, match=f"{name} is none of the classes .*; sample it"):
        denoisers.refuse_unknown(object.__new__(exported()[name]), "sample it in its pipeline")


def table() -> str:
    lines = ["| class | sparse layers | calibrated and called | trained and sampled |", "|---|---|---|---|"]
    for name in TINY:
        lines.append(row(name, sparsedm.sparsify(make(name), inputs=inputs_of(name))))
    return "\n".join(lines)


if __name__ == "__main__":
    print(f"{table()}\n\nModels of diffusers {diffusers.__version__} that do not denoise:\n\n{others()}")
