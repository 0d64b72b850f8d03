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


def test_import_is_light():
    code = "import sys, sparsedm; print([m for m in ('gradio', 'diffusers', 'matplotlib', 'torch_fidelity') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
