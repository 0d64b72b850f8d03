"""The Dockerfile, as far as it goes without Docker: what it copies and calls exists, and its stages fit together."""

import fnmatch
import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from sparsedm.demo import serving
from sparsedm.packing.kernels import build

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def stages() -> list[list[tuple[str, str]]]:
    """The instructions of each stage: (RUN, what it runs), ..."""
    lines = [line.split(maxsplit=1) for line in (ROOT / "Dockerfile").read_text().splitlines() if line and line[0] != "#"]
    starts = [i for i, (word, _) in enumerate(lines) if word == "FROM"]
    return [[(word, rest) for word, rest in lines[a:b]] for a, b in zip(starts, [*starts[1:], None])]


def arguments(stage, word: str) -> list[list[str]]:
    return [shlex.split(rest) for found, rest in stage if found == word]


def environment(stage) -> dict[str, str]:
    return dict(pair.split("=", 1) for pairs in arguments(stage, "ENV") for pair in pairs)


def test_what_is_copied_exists_and_reaches_the_build(stages):
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    copies = [paths for stage in stages for paths in arguments(stage, "COPY") if not any("--from" in path for path in paths)]
    sources = [path for *paths, _ in copies for path in paths if not path.startswith("--")]
    assert {"app.py", "sparsedm", "pyproject.toml"} <= set(sources)
    for source in sources:
        assert (ROOT / source).exists() and any(fnmatch.fnmatch(source, glob) for glob in allowed), source


def test_the_commands_exist(stages):
    runs = [command for stage in stages for command in arguments(stage, "RUN")]
    modules = [command[2] for command in runs if command[:2] == ["python", "-m"]]
    assert "sparsedm.packing.kernels.build" in modules and all(map(importlib.util.find_spec, modules))
    pattern = next(re.search(r"grep -E '(.*?)' requirements", rest)[1] for stage in stages for _, rest in stage if "grep" in rest)
    pinned = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if re.search(pattern, line)]
    assert {line.split("==")[0] for line in pinned} == {"torch", "torchvision", "diffusers", "gradio"}


def test_the_compiler_stays_in_the_first_stage_and_its_kernels_go_on(stages):
    first, second = stages
    assert any("g++" in command for command in arguments(first, "RUN"))
    assert not any("apt-get" in command for command in arguments(second, "RUN"))
    made = next(command[3] for command in arguments(first, "RUN") if "sparsedm.packing.kernels.build" in command)
    carried = [paths[-2:] for paths in arguments(second, "COPY") if "--from=build" in paths]
    assert [made, made] in carried and environment(second)[build.PREBUILT] == made
    (venv,) = (command[3] for command in arguments(first, "RUN") if command[1:3] == ["-m", "venv"])
    assert [venv, venv] in carried and environment(second)["PATH"].startswith(f"{venv}/bin:")


def test_the_last_stage_serves_the_demo_as_a_user_where_its_health_is_asked_for(stages):
    last, asked = stages[-1], dict(stages[-1])
    words = [word for word, _ in last]
    assert words.index("USER") < words.index("CMD") and asked["USER"] == "user"
    port = environment(last)["GRADIO_SERVER_PORT"]
    assert environment(last)["GRADIO_SERVER_NAME"] == "0.0.0.0" and asked["EXPOSE"] == port
    assert f":{port}{serving.HEALTH}'" in asked["HEALTHCHECK"]
    assert asked["CMD"] == '["python", "app.py"]'
