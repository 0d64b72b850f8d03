"""Export: what other programs read is the same model, zeros included, and a failure leaves the earlier file."""

import copy
import json
import os
import subprocess
import sys

import onnx as onnx_package
import onnx_ir
import onnxruntime
import pytest
import ranks
import torch
from safetensors.torch import load_file
from torch import nn

import sparsedm
from sparsedm.checkpoints import export, folders
from sparsedm.cli import main
from sparsedm.masking import layers, nm
from sparsedm.packing import kernels, packed

STATES = ["dense", "sparse training", "folded", "packed"]


def in_state(model: nn.Module, state: str) -> nn.Module:
    """A tiny model in one of the four states of a layer's life."""
    if state == "dense":
        return model
    sparsedm.sparsify(model, "2:4")
    if state == "packed":
        if not kernels.available():
            pytest.skip("no C++ compiler for the packed kernels")
        return sparsedm.pack(model, backend="kernel")
    return sparsedm.fold(model) if state == "folded" else model


def snapshot(model: nn.Module) -> tuple:
    """Everything of a model that an export could change."""
    kinds = {name: (type(module), module.training) for name, module in model.named_modules()}
    return kinds, {name: value.clone() for name, value in model.state_dict().items()}


def assert_untouched(model: nn.Module, before: tuple) -> None:
    kinds, weights = snapshot(model)
    assert kinds == before[0] and weights.keys() == before[1].keys()
    assert all(torch.equal(weights[name], value) for name, value in before[1].items())


def run(path, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The file's output from onnxruntime, by the names that the documentation promises."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["out_sample"], {name: value.numpy() for name, value in inputs.items()})[0])


def inputs_for(batch: int, size: int = 8, seed: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "sample": torch.randn(batch, 1, size, size, generator=generator),
        "timestep": torch.randint(1000, (batch,), generator=generator),
        "class_labels": torch.randint(5, (batch,), generator=generator),
    }


def assert_equals_model(path, model: nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        expected = model(**inputs).sample
    assert (run(path, inputs) - expected).abs().max() <= 1e-5 * expected.abs().max()


def initializers(path) -> dict[str, torch.Tensor]:
    proto = onnx_package.load(path)
    return {i.name: torch.from_numpy(onnx_package.numpy_helper.to_array(i).copy()) for i in proto.graph.initializer}


def axes(path) -> dict[str, list]:
    graph = onnx_package.load(path).graph
    return {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in [*graph.input, *graph.output]}


# --- ONNX -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def uvit(make_model):
    """A folded tiny U-ViT."""
    return in_state(make_model("uvit", depth=2), "folded").eval()


@pytest.mark.parametrize("state", STATES[1:])  # a dense one takes text, below
def test_onnx_computes_what_the_model_computes_and_leaves_it_alone(make_model, exporter, state, tmp_path):
    if state == "folded":
        exporter()  # traced this very model
    model = in_state(make_model("uvit", depth=2), state).train(state == "sparse training")
    before = snapshot(model)
    export.onnx(model, tmp_path / "model.onnx", check=False)
    assert_untouched(model, before)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    assert axes(tmp_path / "model.onnx") == {
        "sample": ["batch", 1, 8, 8], "timestep": ["batch"], "class_labels": ["batch"], "out_sample": ["batch", 1, 8, 8],
    }  # fmt: skip
    for batch in (1, 2, 7):
        assert_equals_model(tmp_path / "model.onnx", model.eval(), inputs_for(batch))


@pytest.fixture
def compared(monkeypatch):
    """The pairs of outputs that the export's own check compares."""
    pairs, relative_error = [], export.relative_error
    monkeypatch.setattr(export, "relative_error", lambda *pair: pairs.append(pair) or relative_error(*pair))
    yield pairs
    assert [len(output) for output, _ in pairs] == [1, 2, 5]
    assert all(0 < relative_error(*pair) < 1e-5 for pair in pairs)


def test_a_unet_in_sparse_training_passes_the_check(make_model, compared, tmp_path):
    model = in_state(make_model("unet"), "sparse training")
    export.onnx(model, tmp_path / "model.onnx")
    for batch in (1, 70):  # diffusers' upsampling branches at 64
        assert_equals_model(tmp_path / "model.onnx", model.eval(), inputs_for(batch))
    found, transposed = initializers(tmp_path / "model.onnx"), 0
    for name, layer in layers.nm_layers(model):
        if f"{name}.weight" in found:
            weight = found[f"{name}.weight"]
        else:
            weight, transposed = found[f"{name}.weight.T"].mT, transposed + 1
        assert torch.equal(weight, layer.masked_weight()) and nm.verify(weight, "2:4") == 0
    assert transposed >= 4  # attention multiplies tokens from the left
    content = (tmp_path / "model.onnx").read_bytes()
    assert b".py" not in content  # no traces of where it was made


def test_a_bundled_student_passes_the_check_and_carries_its_noise_schedule(compared, tmp_path):
    model = sparsedm.load("glyphs-uvit-2x4")
    export.onnx(model, tmp_path / "model.onnx")
    assert all(expected.std() > 0.1 for _, expected in compared)
    metadata = onnxruntime.InferenceSession(tmp_path / "model.onnx").get_modelmeta().custom_metadata_map
    assert json.loads(metadata["noise_schedule"]) == dict(model.config.noise_schedule)


def test_fixed_batch(uvit, tmp_path):
    export.onnx(uvit, tmp_path / "model.onnx", batch=1)
    assert axes(tmp_path / "model.onnx")["sample"] == [1, 1, 8, 8]
    assert_equals_model(tmp_path / "model.onnx", uvit, inputs_for(1))


def test_a_layer_that_is_called_twice(uvit, tmp_path):
    uvit.in_blocks[0].mlp.fc1 = uvit.mid_block.mlp.fc1
    export.onnx(uvit, tmp_path / "model.onnx")
    assert_equals_model(tmp_path / "model.onnx", uvit, inputs_for(3))
    onnx_package.checker.check_model(tmp_path / "model.onnx", full_check=True)


def test_text_to_image_models(tmp_path, make_model):
    model = make_model("uvit", depth=2, num_classes=None, context_dim=12, context_tokens=3)
    before = snapshot(model)
    export.onnx(model, tmp_path / "model.onnx")
    assert_untouched(model, before)
    assert axes(tmp_path / "model.onnx")["encoder_hidden_states"] == ["batch", 3, 12]
    for batch in (1, 2, 7):
        inputs = {name: value for name, value in inputs_for(batch).items() if name != "class_labels"}
        assert_equals_model(tmp_path / "model.onnx", model.eval(), {**inputs, "encoder_hidden_states": torch.randn(batch, 3, 12)})


def test_models_that_take_text_of_another_length(tmp_path):
    from diffusers import UNet2DConditionModel

    config = {
        "sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (8,), "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("UpBlock2D",), "norm_num_groups": 4,
        "attention_head_dim": 4, "cross_attention_dim": 12, "mid_block_type": None,
    }  # fmt: skip
    model = sparsedm.fold(sparsedm.sparsify(UNet2DConditionModel(**config).eval(), "2:4"))
    inputs = {"sample": torch.zeros(1, 1, 8, 8), "timestep": torch.tensor(5)}
    with pytest.raises(ValueError, match="UNet2DConditionModel does not take the inputs sample, timestep.*encoder_hidden_states"):
        export.onnx(model, tmp_path / "model.onnx", inputs=inputs)
    inputs["encoder_hidden_states"] = torch.zeros(1, 3, 12)  # fewer tokens than the usual 77
    export.onnx(model, tmp_path / "model.onnx", inputs=inputs)
    assert axes(tmp_path / "model.onnx")["timestep"] == ["batch"]
    drawn = {"sample": torch.randn(4, 1, 8, 8), "timestep": torch.arange(4), "encoder_hidden_states": torch.randn(4, 3, 12)}
    assert_equals_model(tmp_path / "model.onnx", model, drawn)


# --- files, and what must not come out --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def program(make_model):
    """What the exporter makes of `uvit`; to be cloned."""
    model = in_state(make_model("uvit", depth=2), "folded").eval()
    return export.trace(model, inputs_for(2), dynamic=True)


@pytest.fixture
def exporter(program, monkeypatch):
    """`exporter(change)`: from now on the exporter of `uvit` does `change` to its program; without a tracing each time."""

    def install(change=lambda program: None):
        def trace(*args, **kwargs):
            clone = program.clone()
            change(clone)
            return clone

        monkeypatch.setattr(export, "trace", trace)

    return install


def fail_after_writing(program, path, external_data=None):
    for file in filter(None, (path, external_data and path.with_name(external_data))):
        file.write_bytes(b"half")
    raise OSError(28, "No space left on device")


def test_weights_beyond_two_gigabytes_go_to_a_second_file(uvit, exporter, tmp_path, monkeypatch):
    exporter()
    path, other = tmp_path / "model.onnx", tmp_path / "my-model.onnx.0123abcd.data"
    other.write_text("of another model")
    monkeypatch.setattr(export, "ONE_FILE", 1000)
    seen = set()
    for _ in range(2):  # the second export replaces the first and its weights
        export.onnx(uvit, path)
        (data,) = set(tmp_path.iterdir()) - {path, other}
        assert data.stat().st_size > 20_000 > path.stat().st_size - 40_000 and data not in seen
        seen.add(data)
        onnx_package.checker.check_model(path)
        assert_equals_model(path, uvit, inputs_for(3))
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    with monkeypatch.context() as patch, pytest.raises(OSError, match="untouched"):
        patch.setattr(onnx_ir, "save", fail_after_writing)
        export.onnx(uvit, path)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before
    monkeypatch.setattr(export, "ONE_FILE", 2**31)
    export.onnx(uvit, path)
    assert set(tmp_path.iterdir()) == {path, other}


def change_weight(change):
    def changed(program):
        value = program.graph.initializers["mid_block.attn.proj.weight.T"]
        value.const_value = onnx_ir.tensor(change(value.const_value.numpy().copy()), name=value.name)

    return changed


def rename_weight(program):
    program.graph.initializers["mid_block.attn.proj.weight.T"].name = "fused"


def unknown_operator(program):
    next(node for node in program.graph if node.op_type == "Softmax").op_type = "NoSuchOperator"


LOST = r"mid_block\.attn\.proj: \d+ groups of its weight in the ONNX graph are not 2:4"
NOT_ONE = r"mid_block\.attn\.proj: its 2:4 weight \(16, 16\) is no longer one tensor"


@pytest.mark.parametrize(("change", "message"), [
    (change_weight(lambda weight: weight + 1e-6), LOST),
    (change_weight(lambda weight: weight.T.copy()), LOST),  # zeros along the outputs
    (rename_weight, NOT_ONE),
    (change_weight(lambda weight: weight[:8]), NOT_ONE),
    (change_weight(lambda weight: 2 * weight), "output differs from torch's by .* at batch 1"),  # zeros in place
    (unknown_operator, "onnxruntime does not run the exported model: .*NoSuchOperator"),
], ids=["zeros filled", "transposed", "fused", "cut", "scaled", "unknown operator"])  # fmt: skip
def test_a_spoilt_program_is_caught_and_the_earlier_file_survives(uvit, exporter, tmp_path, change, message):
    path = tmp_path / "model.onnx"
    path.write_text("earlier")
    exporter(change)
    with pytest.raises(ValueError, match=message):
        export.onnx(uvit, path)
    assert path.read_text() == "earlier" and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_the_earlier_file(uvit, exporter, tmp_path, monkeypatch):
    path = tmp_path / "model.onnx"
    path.write_text("earlier")
    exporter()
    monkeypatch.setattr(onnx_ir, "save", fail_after_writing)
    with pytest.raises(OSError, match="untouched"):
        export.onnx(uvit, path)
    assert path.read_text() == "earlier" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", export.PACKAGES)
def test_a_missing_package_is_one_error_with_the_command_that_helps(uvit, tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=f"needs {name}: pip install onnx onnxscript onnxruntime"):
        export.onnx(uvit, tmp_path / "model.onnx")


def test_onnxruntime_is_only_needed_for_the_check(uvit, exporter, tmp_path, monkeypatch):
    exporter()
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    export.onnx(uvit, tmp_path / "model.onnx", check=False)
    onnx_package.checker.check_model(tmp_path / "model.onnx", full_check=True)


@pytest.mark.parametrize(("arguments", "message"), [
    ({"dtype": torch.bfloat16}, "float32 or float16, not bfloat16"),
    ({"batch": 0}, "batch must be at least 1"),
    ({"inputs": {"sample": torch.zeros(1, 1, 8, 8)}}, "inputs are sample; a denoiser takes sample, timestep"),
    ({"inputs": {**inputs_for(1), "hidden": torch.zeros(1)}}, "inputs are .*hidden"),
], ids=["bfloat16", "batch", "no timestep", "unknown input"])  # fmt: skip
def test_arguments_that_make_no_sense(uvit, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        export.onnx(uvit, tmp_path / "model.onnx", **arguments)
    assert not list(tmp_path.iterdir())


def test_a_folder_in_the_place_of_the_file(uvit, tmp_path):
    with pytest.raises(ValueError, match="is a folder"):
        export.onnx(uvit, tmp_path)


# --- folders ----------------------------------------------------------------------------------------------------------

STOCK_DIFFUSERS = """
import sys
sys.modules["sparsedm"] = None
try:
    import torchvision
except Exception:  # of another build than torch; diffusers does without
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    sys.modules["torchvision"] = None
import torch
from diffusers import DDIMScheduler, UNet2DModel
model = UNet2DModel.from_pretrained("folder").eval()
with torch.no_grad():
    output = model(**torch.load("inputs.pt")).sample
prediction = DDIMScheduler.from_config(model.config["noise_schedule"]).config.prediction_type
torch.save({"output": output, "prediction": prediction}, "result.pt")
try:
    import sparsedm
except ImportError:
    print("sparsedm cannot be imported")
"""


def test_stock_diffusers_loads_the_folder_without_this_package(tmp_path):
    model = sparsedm.load("glyphs-unet-2x4")
    export.write(model, tmp_path / "folder", "diffusers")
    inputs = inputs_for(2, size=16)
    torch.save(inputs, tmp_path / "inputs.pt")
    command = [sys.executable, "-I", "-c", STOCK_DIFFUSERS]  # isolated: no PYTHONPATH, no current folder
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert "sparsedm cannot be imported" in done.stdout, done.stderr
    result = torch.load(tmp_path / "result.pt")
    with torch.no_grad():
        torch.testing.assert_close(result["output"], model(**inputs).sample, rtol=1e-5, atol=1e-5)
    assert result["prediction"] == model.config.noise_schedule["prediction_type"] == "v_prediction"


@pytest.mark.parametrize(
    ("state", "format"), [*((state, "diffusers") for state in STATES), *((state, "packed") for state in STATES[1:])]
)
def test_folders_of_any_model_are_loaded_as_the_plain_model(make_model, call, format, state, tmp_path):
    model = in_state(make_model("uvit"), state)
    before = snapshot(model)
    for _ in range(2):  # a model folder may be replaced
        export.write(model, tmp_path / "folder", format, "float32")
    assert_untouched(model, before)
    plain = layers.fold(packed.unpack(copy.deepcopy(model))).eval()
    loaded = sparsedm.load(tmp_path / "folder")
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in plain.state_dict().items())
    assert torch.equal(call(loaded), call(plain))
    assert (tmp_path / "folder" / folders.WEIGHTS).exists()


def test_a_dense_model_is_not_written_as_packed(make_model, tmp_path):
    with pytest.raises(ValueError, match="no N:M sparse layer to pack; sparsify"):
        export.write(make_model("uvit"), tmp_path / "folder", "packed")
    assert not list(tmp_path.iterdir())


def test_default_types(make_model, tmp_path):
    model = in_state(make_model("uvit"), "folded")
    export.write(model, tmp_path / "plain", "diffusers")
    export.write(model, tmp_path / "packed", "packed")
    plain, small = (sparsedm.load(tmp_path / name).state_dict() for name in ("plain", "packed"))
    for name, value in model.state_dict().items():
        assert torch.equal(plain[name], value) and torch.equal(small[name], value.half().float())


@pytest.mark.parametrize("format", ["diffusers", "packed"])
def test_a_folder_with_other_things_is_not_replaced(make_model, format, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    for out in (tmp_path, tmp_path / "thesis.txt"):
        with pytest.raises(ValueError, match="is in the way"):
            export.write(in_state(make_model("uvit"), "folded"), out, format)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


# --- the command line -------------------------------------------------------------------------------------------------


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    """`cli(*arguments)`: exit code, standard output and errors of `python -m sparsedm export` in `tmp_path`."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["sparsedm", "export", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return (ended.value.code or 0, *capsys.readouterr())

    return run


def test_the_command_writes_every_format(uvit, exporter, cli, tmp_path):
    sparsedm.save(uvit, tmp_path / "model")
    assert cli("model", "out", "--dtype", "float16") == (0, "out written, as diffusers\n", "")
    assert {value.dtype for value in load_file(tmp_path / "out" / folders.WEIGHTS).values()} == {torch.float16}
    assert cli("model", "small", "--format", "packed") == (0, "small written, as packed\n", "")
    assert sparsedm.load(tmp_path / "small").norm.weight.shape == (16,)
    assert (tmp_path / "small" / folders.WEIGHTS).exists()
    exporter()
    assert cli("model", "m.onnx", "--format", "onnx") == (0, "m.onnx written, as onnx\n", "")
    assert_equals_model(tmp_path / "m.onnx", uvit, inputs_for(2))


def export_quietly(folder, *arguments):
    """What another process does: run the command in a folder, with its standard output in a file."""
    os.chdir(folder)
    os.dup2(os.open("stdout", os.O_WRONLY | os.O_CREAT), 1)
    ranks.command("export", *arguments)


def test_the_command_in_a_process_of_its_own_writes_a_half_precision_file_of_fixed_batch(uvit, tmp_path):
    sparsedm.save(uvit, tmp_path / "model")
    options = ("--format", "onnx", "--batch", "2", "--dtype", "float16")
    told = tmp_path / "told"
    ((code, printed),) = ranks.ended(ranks.start(1, told, export_quietly, tmp_path, "model", "m.onnx", *options), told)
    assert code == 0, printed
    assert (tmp_path / "stdout").read_text() == "m.onnx written, as onnx\n"
    path, inputs = tmp_path / "m.onnx", inputs_for(2)
    assert axes(path)["timestep"] == [2] and axes(path)["sample"] == [2, 1, 8, 8]
    assert {value.dtype for name, value in initializers(path).items() if ".weight" in name} == {torch.float16}
    output = run(path, {**inputs, "sample": inputs["sample"].half()})
    with torch.no_grad():
        expected = uvit(**inputs).sample
    assert output.dtype == torch.float16 and (output - expected).abs().max() < 0.01 * expected.abs().max()


@pytest.mark.parametrize(("arguments", "message"), [
    (("glyphs-unet-2x4", "out", "--format", "tflite"), "error: unknown format 'tflite'; known: diffusers, packed, onnx"),
    (("glyphs-unet-2x4", "out", "--dtype", "int8"), "error: unknown dtype 'int8'; known: float32, float16, bfloat16"),
    (("glyphs-unet-2x4", "out", "--batch", "2"), "error: a fixed batch is for onnx"),
    (("nothing", "out"), "error: unknown model 'nothing'"),
    (("glyph-classifier", "out.onnx", "--format", "onnx"), "error: GlyphClassifier is none of the classes"),
], ids=["format", "dtype", "batch", "model", "no denoiser"])  # fmt: skip
def test_errors_of_the_command_are_one_line(arguments, message, cli, tmp_path):
    code, _, errors = cli(*arguments)
    assert code == 1 and errors.startswith(message) and errors.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_command_says_which_package_is_missing(cli, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    code, _, errors = cli("glyphs-unet-2x4", "out.onnx", "--format", "onnx")
    assert (code, errors) == (1, "error: ONNX export needs onnxscript: pip install onnx onnxscript onnxruntime\n")
