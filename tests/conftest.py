"""Small seeded models and a set of glyphs for all tests; no network."""

import os
import shutil

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported

import pytest
import torch
from torch import nn

import sparsedm  # noqa: F401  (repairs torchvision before diffusers is imported)
from sparsedm import data
from sparsedm.models.uvit import UViTModel

torch.set_num_threads(min(2, torch.get_num_threads()))


def _uvit(**changes):
    torch.manual_seed(0)
    config = {"sample_size": 8, "in_channels": 1, "embed_dim": 16, "depth": 4, "num_heads": 2, "num_classes": 5, **changes}
    return UViTModel(**config)


def _unet(**changes):
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    config = {
        "sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (8, 16), "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "norm_num_groups": 4, "attention_head_dim": 8, "num_class_embeds": 5, **changes,
    }  # fmt: skip
    return UNet2DModel(**config)


class Own(nn.Module):
    """A denoiser of somebody's own, without a config: it takes 8x8 pictures of one channel and returns a tensor."""

    def __init__(self):
        super().__init__()
        self.conv_in, self.mid, self.conv_out = nn.Conv2d(1, 8, 3, 1, 1), nn.Conv2d(8, 8, 3, 1, 1), nn.Conv2d(8, 1, 3, 1, 1)

    def forward(self, x, t):
        return self.conv_out(self.mid(self.conv_in(x).relu()).relu())


@pytest.fixture
def own() -> nn.Module:
    """A plain module, 8x8, one channel, no classes, no config."""
    torch.manual_seed(0)
    return Own()


@pytest.fixture(autouse=True)
def _seeded():
    """Every test draws the same numbers, alone or with others."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def make_model():
    """`make_model("uvit" or "unet", **config changes)`: a tiny class-conditional model, the same weights every time."""
    return lambda kind, **changes: {"uvit": _uvit, "unet": _unet}[kind](**changes)


@pytest.fixture(params=["uvit", "unet"])
def model(request, make_model):
    """Both tiny models in turn, 8x8, one channel, classes 0..3 and 4 for none."""
    return make_model(request.param)


@pytest.fixture(scope="session")
def call():
    """`call(model)`: its output for fixed inputs."""

    def run(model):
        noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
        return model(noise, torch.tensor([3, 700]), class_labels=torch.tensor([0, 4])).sample

    return run


@pytest.fixture(scope="session")
def glyphs():
    """4,096 real test glyphs [n, 1, 16, 16] in [-1, 1] and their labels."""
    return data.stack(data.load("glyphs", split="test", n=4096))


@pytest.fixture(scope="session")
def portraits(tmp_path_factory):
    """The folder of a small model with random weights that takes the words for faces."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "portraits"
    size = {"sample_size": 32, "in_channels": 3, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
    sparsedm.save(UViTModel(**size, context_dim=data.faces.DIM, context_tokens=data.faces.TOKENS), folder)
    return folder


@pytest.fixture
def bundled_faces(portraits, monkeypatch):
    """The names of a dense model of faces and of its 2:4 student, which stand in for bundled ones."""
    from sparsedm.demo import models

    for name in [name for name, entry in models.BUNDLED.items() if entry.data == models.FACES]:
        monkeypatch.delitem(models.BUNDLED, name)
        monkeypatch.delitem(models.BASES, name, raising=False)
    base, student = "faces-unet", "faces-unet-2x4-calibrated"
    for name, role in ((base, "teacher"), (student, "2x4-calibrated")):
        title = f"Face UNet, {models.ROLES[role]}"
        monkeypatch.setitem(models.BUNDLED, name, models.Entry(title, portraits, role, base, data=models.FACES))
    monkeypatch.setitem(models.BASES, base, "Face UNet")
    return base, student


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The demo, and where it is served."""
    from sparsedm.demo import page

    os.environ["GRADIO_TEMP_DIR"] = str(tmp_path_factory.mktemp("gradio"))
    demo = page.build()
    url = page.launch(demo, prevent_thread_lock=True, quiet=True)
    yield demo, url
    demo.close()
    del os.environ["GRADIO_TEMP_DIR"]


@pytest.fixture(scope="module")
def url(served):
    """Where the demo is served."""
    return served[1]


@pytest.fixture(scope="module")
def browser():
    """The system's Chromium, driven by Playwright; without one of the two, tests that ask for it are skipped."""
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()
