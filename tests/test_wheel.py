"""The package built and installed as a wheel, away from this repository."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parent.parent


def run(*arguments: str | Path, cwd: Path, **environment: str) -> str:
    command = [sys.executable, "-m", *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_installed_wheel_has_all_it_needs_to_draw_a_word(tmp_path):
    source, site = tmp_path / "source", tmp_path / "site"
    shutil.copytree(ROOT / "sparsedm", source / "sparsedm", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    run("pip", "wheel", source, "--no-deps", "--no-build-isolation", "-q", "-w", tmp_path, cwd=tmp_path)
    run("pip", "install", *tmp_path.glob("*.whl"), "--no-deps", "-q", "--target", site, cwd=tmp_path)
    for path in (ROOT / "sparsedm").rglob("*"):
        if path.suffix in (".py", ".cpp", ".h", ".css"):
            assert (site / "sparsedm" / path.relative_to(ROOT / "sparsedm")).exists(), path
    outside = {"cwd": tmp_path, "PYTHONPATH": str(site)}
    where = run("sparsedm", "generate", "glyphs-uvit-2x4", "word.png", "--word", "AB", "--steps", "2", "--pack", **outside)
    assert "word.png" in where and Image.open(tmp_path / "word.png").size[0] > 32
