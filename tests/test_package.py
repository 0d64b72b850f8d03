"""The package's front door."""

import subprocess
import sys

import pytest

import sparsedm


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
    code = "import sys, sparsedm; print([m for m in ('gradio', 'diffusers', 'matplotlib', 'torch_fidelity') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
