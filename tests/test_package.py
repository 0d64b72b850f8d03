"""The package's front door: its names, what importing it and asking for help cost, and a torchvision of another build."""

import importlib
import subprocess
import sys

import pytest

import sparsedm
from sparsedm.support import imports

HEAVY = {"torch", "torchvision", "numpy", "diffusers", "accelerate", "matplotlib", "gradio", "torch_fidelity"}


def python(code: str) -> str:
    """What a fresh process prints that runs this code."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", sparsedm.__all__)
def test_every_public_name_is_callable_the_second_time_too(name):
    assert callable(getattr(sparsedm, name)) and callable(getattr(sparsedm, name))


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no attribute 'sparsity'"):
        _ = sparsedm.sparsity


def test_sparsify_knows_the_families_without_another_import():
    """Their time embeddings are sparse by the papers' list, dense by the general rule."""
    code = (
        "import sparsedm, diffusers; model = sparsedm.sparsify(diffusers.UNet2DModel(8, block_out_channels=[32] * 4));"
        "print(type(model.time_embedding.linear_1).__name__, type(model.conv_in).__name__)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "NMLinear Conv2d\n"


def test_import_is_light():
    assert python(f"import sys, sparsedm; print({HEAVY} & set(sys.modules))") == "set()\n"


def test_help_and_refused_options_are_light():
    code = f"""
import sys
from typer.testing import CliRunner
from sparsedm.cli import app
ask = CliRunner().invoke
for name in ("", *(command.callback.__name__ for command in app.registered_commands)):
    shown = ask(app, [*filter(None, (name,)), "--help"])
    assert shown.exit_code == 0 and "Usage" in shown.stdout, shown.output
assert ask(app, ["generate", "glyphs-unet", "x.png", "--n", "0"]).exit_code == 2
sys.argv = ["app.py", "--help"]
try:
    __import__("app").main()
except SystemExit as end:
    assert end.code == 0
print({HEAVY} & set(sys.modules))"""
    assert python(code).splitlines()[-1] == "set()"


def test_info_imports_what_its_model_needs():
    code = """
import sys
from typer.testing import CliRunner
from sparsedm.cli import app
assert CliRunner().invoke(app, ["info", "glyphs-uvit-2x4"]).exit_code == 0
needless = ("matplotlib", "sklearn", "gradio", "torch_fidelity", "torch_pruning", "tensorboard", "wandb", "onnx", "IPython")
print([name for name in needless if name in sys.modules], "diffusers.models.unets.unet_2d" in sys.modules)"""
    assert python(code) == "[] True\n"


@pytest.mark.parametrize("late", [False, True])
def test_one_module_follows_another_that_is_imported_now_or_later(late, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    first, second = f"first_{late}", f"second_{late}"
    (tmp_path / f"{first}.py").write_text("done = True")
    (tmp_path / f"{second}.py").write_text(f"from {first} import done")
    if late:
        importlib.import_module(first)
    imports.follow(first, second)
    assert (second in sys.modules) == late
    importlib.import_module(first)
    assert sys.modules[second].done


# --- a torchvision of another build -----------------------------------------------------------------------------------------

OTHER_BUILD = """
from . import part
import torch
part.tries += 1
torch.library.register_fake("torchvision::nms")(lambda dets, scores, iou_threshold: dets)
whole = True
"""
MATCHED = """
from . import part
import torch
part.tries += 1
library = torch.library.Library("torchvision", "DEF")
library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""
BROKEN = "from . import part\npart.tries += 1\nraise RuntimeError('another fault')"
TRY = """
try:
    import torchvision
    print("imported", torchvision.part.tries, hasattr(torchvision, "whole"), torchvision.__spec__.name)
except RuntimeError as error:
    print(error)
import importlib.metadata, importlib.util
names = [each.name for each in importlib.metadata.distributions()]
print(names.count("torch"), importlib.util.find_spec("torchvision.part").name)
"""


@pytest.mark.parametrize(
    ("source", "told"),
    [
        (OTHER_BUILD, "imported 1 True torchvision"),  # the first try and what it imported are forgotten
        (MATCHED, "imported 1 False torchvision"),  # a second definition would be an error
        (BROKEN, "another fault"),
    ],
)
def test_torchvision_is_repaired_when_it_is_first_imported_if_it_needs_to(source, told, tmp_path):
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(source)
    (tmp_path / "torchvision" / "part.py").write_text("tries = 0")
    first = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import sparsedm; assert 'torch' not in sys.modules"
    shown = python(first + TRY)
    assert shown.splitlines()[0] == told
    if source != BROKEN:
        assert shown.splitlines()[1] == "1 torchvision.part"
