"""The plug-in of diffusers: packed folders in `from_pretrained` and `save_pretrained`, and models made sparse while they load."""

import copy
import inspect
import json
import subprocess
import sys

import pytest
import torch
from diffusers import (
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    PipelineQuantizationConfig,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.quantizers import auto
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import sparsedm
from sparsedm.checkpoints import folders
from sparsedm.masking import layers
from sparsedm.packing import kernels, packed, tensors

needs_kernels = pytest.mark.skipif(not kernels.available(), reason="no C++ compiler for the packed kernels")


def draw(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(2, generator=torch.manual_seed(1), num_inference_steps=3, output_type="np").images
    return torch.from_numpy(images)


@pytest.fixture
def unet(make_model):
    """A dense UNet2DModel, 8x8, three channels, without classes."""
    return make_model("unet", num_class_embeds=None, in_channels=3, out_channels=3)


@pytest.fixture
def student(unet):
    """A folded 2:4 model."""
    return sparsedm.fold(sparsedm.sparsify(copy.deepcopy(unet)))


@pytest.fixture
def folder(student, tmp_path):
    """The packed folder of the student."""
    sparsedm.save_packed(student, tmp_path / "packed")
    return tmp_path / "packed"


def assert_equal(model, expected) -> None:
    state, wanted = model.state_dict(), expected.state_dict()
    assert list(state) == list(wanted) and all(torch.equal(value, state[name]) for name, value in wanted.items())


def header(file) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return opened.metadata()


def process(code: str, *arguments) -> str:
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


ALONE = f"""
import sys, sparsedm
assert "torch" not in sys.modules
import torch, diffusers
{inspect.getsource(draw)}
folder, again = sys.argv[1:]
pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
plain = draw(pipeline)
sparsedm.pack(pipeline.unet, backend="kernel")
fast = draw(pipeline)
pipeline.save_pretrained(again)
back = draw(diffusers.DiffusionPipeline.from_pretrained(again))
torch.save([plain, fast, back, sum("Packed" in type(module).__name__ for module in pipeline.unet.modules())], again + "/drawn")
"""


@needs_kernels
def test_a_process_with_sparsedm_and_diffusers_alone_loads_draws_and_saves_a_packed_pipeline(student, tmp_path):
    pipeline = DDPMPipeline(student, DDPMScheduler())
    expected = draw(pipeline)
    pipeline.save_pretrained(tmp_path / "plain")
    sparsedm.pack(student, backend="kernel")
    pipeline.save_pretrained(tmp_path / "packed")
    process(ALONE, tmp_path / "packed", tmp_path / "again")
    plain, fast, back, count = torch.load(tmp_path / "again/drawn")
    assert torch.equal(plain, expected) and torch.equal(back, expected) and expected.std() > 0
    assert count > 10 and not torch.equal(fast, expected)
    torch.testing.assert_close(fast, expected, rtol=0, atol=1e-4)
    files = [tmp_path / name / "unet" / folders.WEIGHTS for name in ("packed", "again")]
    assert files[0].stat().st_size < 0.7 * (tmp_path / "plain/unet" / folders.WEIGHTS).stat().st_size
    first, second = map(load_file, files)
    assert first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def test_without_the_plug_in_the_type_is_unknown_and_the_card_names_the_remedy(folder, monkeypatch):
    for mapping in (auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING):
        monkeypatch.delitem(mapping, "sparsedm")
    with pytest.raises(ValueError, match="Unknown quantization type, got sparsedm"):
        UNet2DModel.from_pretrained(folder)
    assert "import sparsedm" in (folder / folders.CARD).read_text()


def test_the_config_may_be_the_first_that_is_imported():
    code = "import sparsedm; sparsedm.NMConfig; from diffusers.quantizers import auto; print(auto.AUTO_QUANTIZER_MAPPING)"
    assert "NMQuantizer" in process(code)


def test_a_folder_of_either_writer_is_read_by_either_reader(student, folder, tmp_path):
    loaded = UNet2DModel.from_pretrained(folder)
    assert_equal(loaded, student)
    loaded.save_pretrained(tmp_path / "again")
    for path in (folder, tmp_path / "again"):
        assert_equal(sparsedm.load(path), student)
        assert_equal(UNet2DModel.from_pretrained(path), student)
    with torch.no_grad():
        x = torch.randn(1, 3, 8, 8)
        assert torch.equal(loaded(x, 3).sample, student(x, 3).sample)


def test_the_header_lists_the_layers_as_comfyui_reads_them(student, folder):
    told = json.loads(header(folder / folders.WEIGHTS)["_quantization_metadata"])
    assert told["format_version"] == "1.0" and told["layers"].keys() == layers.patterns(student).keys()
    assert all(layer["format"] and layer["pattern"] == "2:4" for layer in told["layers"].values())


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards_and_variants_are_read(student, folder, tmp_path, variant):
    UNet2DModel.from_pretrained(folder).save_pretrained(tmp_path / "shards", max_shard_size="20KB", variant=variant)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert_equal(UNet2DModel.from_pretrained(tmp_path / "shards", variant=variant), student)
    if variant is None:
        assert_equal(sparsedm.load(tmp_path / "shards"), student)


@needs_kernels
def test_a_packed_part_of_a_pipeline_is_saved_as_the_pipeline_is_told(student, tmp_path):
    pipeline = DDPMPipeline(sparsedm.pack(copy.deepcopy(student), backend="kernel"), DDPMScheduler())
    pipeline.save_pretrained(tmp_path, variant="fp16", max_shard_size="20KB")
    assert len(list((tmp_path / "unet").glob("*.fp16*.safetensors"))) > 2
    assert_equal(DiffusionPipeline.from_pretrained(tmp_path, variant="fp16").unet, student)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_dtype_is_the_users(student, folder, dtype):
    loaded = UNet2DModel.from_pretrained(folder, torch_dtype=dtype)
    assert_equal(loaded, copy.deepcopy(student).to(dtype))
    assert_equal(loaded.to(torch.float32), copy.deepcopy(student).to(dtype).float())


@pytest.mark.parametrize("options", [{"device_map": "cpu"}, {"low_cpu_mem_usage": True}, {"disable_mmap": True}])
def test_options_of_loading_that_change_nothing(student, folder, options):
    assert_equal(UNet2DModel.from_pretrained(folder, **options), student)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"low_cpu_mem_usage": False}, "low_cpu_mem_usage"),
        ({"device_map": "auto"}, "UNet2DModel does not support .device_map='auto'"),  # diffusers' own word
        ({"device_map": {"": "disk"}}, "device_map.*disk.*device_map='cpu'"),
        ({"device_map": {"conv_in": "cpu", "": 0}}, "several devices.*device_map='cpu'"),
        ({"torch_dtype": torch.float8_e4m3fn}, "float8_e4m3fn.*take float32"),
    ],
)
def test_options_that_packed_weights_cannot_follow_are_refused(folder, options, message):
    with pytest.raises(ValueError, match=message):
        UNet2DModel.from_pretrained(folder, **options)


def _change(tensors_, name):
    tensors_[name].view(-1)[0] += 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, m, name: _change(t, f"{name}.values"), "conv1.values is damaged.*again"),
        (lambda t, m, name: t.pop(f"{name}.positions"), "conv1 cannot be unpacked.*missing.*again"),
        (
            lambda t, m, name: m.update({tensors.LAYERS: m[tensors.LAYERS].replace(name, "conv_in")}),
            "conv_in is not as in UNet2D",
        ),
        (lambda t, m, name: m.update(version="9"), "version '9'.*upgrade"),
    ],
)
def test_damage_is_refused_by_name(folder, change, message):
    file = folder / folders.WEIGHTS
    weights, metadata = load_file(file), header(file)
    change(weights, metadata, "mid_block.resnets.0.conv1")
    save_file(weights, file, metadata)
    with pytest.raises(ValueError, match=message):
        UNet2DModel.from_pretrained(folder)


def test_pruned_channels_are_left_to_load(unet, tmp_path):
    pruned = sparsedm.fold(sparsedm.sparsify(sparsedm.prune(unet, 0.5, score="random"), "1:2"))
    sparsedm.save_packed(pruned, tmp_path / "pruned")
    with pytest.raises(ValueError, match=r"pruned.*sparsedm\.load"):
        UNet2DModel.from_pretrained(tmp_path / "pruned")
    assert_equal(sparsedm.load(tmp_path / "pruned"), pruned)


def test_what_is_done_to_a_loaded_model_is_what_is_saved(unet, folder, tmp_path):
    loaded = sparsedm.sparsify(UNet2DModel.from_pretrained(folder), "1:4")
    loaded.save_pretrained(tmp_path / "sparser")
    assert set(map(str, layers.patterns(sparsedm.load(tmp_path / "sparser")).values())) == {"1:4"}
    loaded = UNet2DModel.from_pretrained(folder)
    loaded.load_state_dict(unet.state_dict())
    loaded.save_pretrained(tmp_path / "dense")
    assert_equal(UNet2DModel.from_pretrained(tmp_path / "dense"), unet)
    with pytest.raises(ValueError, match="safetensors.*unpack"):
        loaded.save_pretrained(tmp_path / "pickle", safe_serialization=False)


def test_a_plain_folder_of_a_loaded_model_needs_no_plug_in(folder, tmp_path):
    loaded = UNet2DModel.from_pretrained(folder)
    sparsedm.save(loaded, tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / folders.CONFIG).read_text())
    assert_equal(sparsedm.load(tmp_path / "plain"), loaded)


# --- sparse while loading ---------------------------------------------------------------------------------------------------


@pytest.fixture
def dense(unet, tmp_path):
    """The folder of a dense pipeline with a noise schedule of its own."""
    DDPMPipeline(unet, DDPMScheduler(num_train_timesteps=200)).save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def test_magnitude_while_loading_is_sparsify_and_fold(dense, student):
    config = sparsedm.NMConfig("2:4", method="magnitude")
    assert_equal(UNet2DModel.from_pretrained(dense / "unet", quantization_config=config), student)


@pytest.mark.parametrize(
    "options",
    [
        {"variant": "fp16"},
        {"torch_dtype": torch.bfloat16},
        {"device_map": "cpu"},
        {"low_cpu_mem_usage": True},
    ],
    ids=str,
)
def test_dense_shards_become_sparse_while_they_load_with_the_options_of_users(unet, tmp_path, options):
    unet.save_pretrained(tmp_path, max_shard_size="20KB", variant=options.get("variant"))
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    config = sparsedm.NMConfig("2:4", method="magnitude")
    loaded = UNet2DModel.from_pretrained(tmp_path, quantization_config=config, **options)
    assert_equal(loaded, sparsedm.fold(sparsedm.sparsify(unet.to(options.get("torch_dtype", torch.float32)))))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"low_cpu_mem_usage": False}, "low_cpu_mem_usage"),
        ({"device_map": {"conv_in": "cpu", "": 0}}, "several devices.*device_map='cpu'"),
        ({"device_map": "auto"}, "UNet2DModel does not support .device_map='auto'"),
        ({"variant": "fp16"}, "fp16"),
    ],
)
def test_options_that_cannot_be_followed_while_a_model_becomes_sparse_are_refused(dense, options, message):
    config = sparsedm.NMConfig("2:4", method="magnitude")
    with pytest.raises((ValueError, OSError), match=message):
        UNet2DModel.from_pretrained(dense / "unet", quantization_config=config, **options)


@pytest.mark.filterwarnings("ignore:.*calibration tokens")
@pytest.mark.parametrize("method", ["wanda", "obs", "admm"])
def test_calibration_while_loading_is_calibrate_on_the_schedule_of_the_pipeline(dense, tmp_path, method):
    config = sparsedm.NMConfig("2:4", method=method, n=20)
    pipeline = DiffusionPipeline.from_pretrained(
        dense, quantization_config=PipelineQuantizationConfig(quant_mapping={"unet": config})
    )
    expected = sparsedm.load(dense)
    for _ in sparsedm.calibrate(expected, None, "2:4", method, n=20):
        pass
    assert_equal(pipeline.unet, expected)
    pipeline.save_pretrained(tmp_path / "again")
    assert_equal(DiffusionPipeline.from_pretrained(tmp_path / "again").unet, expected)
    told = json.loads((tmp_path / "again/unet" / folders.CONFIG).read_text())["quantization_config"]
    assert told["quant_method"] == "sparsedm" and told.get("method", "admm") == method


@needs_kernels
def test_a_model_is_packed_while_loading_and_saved_packed(dense, student, tmp_path, monkeypatch):
    monkeypatch.setattr(packed, "_too_slow", lambda *args: ("", None))
    monkeypatch.setattr(packed, "_why_slower", lambda *args: "")
    config = sparsedm.NMConfig("2:4", method="magnitude", pack=True)
    loaded = UNet2DModel.from_pretrained(dense / "unet", quantization_config=config)
    assert packed.has_packed(loaded)
    loaded.save_pretrained(tmp_path / "again")
    again = UNet2DModel.from_pretrained(tmp_path / "again")
    assert not packed.has_packed(again)  # whether packing pays is a matter of the machine
    assert_equal(again, student)


def test_what_cannot_be_done_while_loading_is_refused_with_the_remedy(dense, tmp_path):
    with pytest.raises(ValueError, match="pattern '2-4'"):
        sparsedm.NMConfig("2-4")
    with pytest.raises(ValueError, match="method 'best'.*wanda"):
        UNet2DModel.from_pretrained(dense / "unet", quantization_config=sparsedm.NMConfig(method="best"))
    text = UNet2DConditionModel(
        8, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4, attention_head_dim=4, cross_attention_dim=8,
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
    )  # fmt: skip
    text.save_pretrained(tmp_path / "text")
    with pytest.raises(ValueError, match=r"UNet2DConditionModel.*sparsedm\.calibrate\(.*prompts.*magnitude"):
        UNet2DConditionModel.from_pretrained(tmp_path / "text", quantization_config=sparsedm.NMConfig(method="obs", n=4))
