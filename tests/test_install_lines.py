"""What the Dockerfile and the README install is what pyproject.toml and constraints.txt know."""

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = set(PROJECT["optional-dependencies"])
RANGES = {Requirement(line).name: Requirement(line).specifier for line in PROJECT["dependencies"]}
PINS = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE))


def instructions(dockerfile: str) -> Iterator[tuple[str, str]]:
    """The word and the rest of each instruction, with an ARG's default in the place of its name."""
    defaults: dict[str, str] = {}
    lines = "\n".join(line for line in dockerfile.splitlines() if not line.startswith("#")).replace("\\\n", " ")
    for line in lines.splitlines():
        if line.strip():
            word, rest = line.split(maxsplit=1)
            if word == "ARG":
                name, value = rest.split("=", 1)
                defaults[name] = value
            for name, value in defaults.items():
                rest = rest.replace(f"${{{name}}}", value)
            assert "$" not in rest, line
            yield word, rest


def stages(dockerfile: str) -> dict[str, list[str]]:
    """The `pip install` lines of each stage, by its name."""
    found: dict[str, list[str]] = {}
    for word, rest in instructions(dockerfile):
        if word == "FROM":
            name = rest.split(" AS ")[1]
            found[name] = []
        elif word == "RUN" and rest.startswith("pip install"):
            found[name].append(rest)
    return found


def install_lines(page: str) -> list[str]:
    """Lines of a page that install something, in blocks or within a sentence."""
    blocks = re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()] + re.findall(r"`([^`\n]+)`", page)
    return [line for line in lines if re.match(r"(uv )?pip install ", line)]


def require_known(line: str) -> None:
    """Fails unless a line's files, extras and versions are those of the repository."""
    words = shlex.split(line.removeprefix("uv "))[2:]
    packages = []
    while words:
        word = words.pop(0)
        if word == "-c":
            assert (ROOT / words.pop(0)).is_file(), line
        elif word == "--index-url":
            assert words.pop(0).startswith("https://"), line
        elif word != "-e":
            packages.append(Requirement(re.sub(r"^\.", "otpo", word)))
    assert packages, line
    for package in packages:
        if package.name == "otpo":
            assert package.extras <= EXTRAS, line
        else:
            assert str(package.specifier) in ("", f"=={PINS[package.name]}"), line


def test_there_is_a_target_for_a_cpu_and_one_for_a_gpu():
    found = stages(DOCKERFILE)
    assert set(found) == {"base", "cpu", "cuda"} and not found["base"]
    for target in ("cpu", "cuda"):
        assert any(" .[" in line.replace('"', "") for line in found[target])
        assert f"`{target}`" in README
    (cpu,) = (line for line in found["cpu"] if "torch" in line)
    assert cpu.endswith(f"/whl/cpu torch=={PINS['torch']}")
    assert not any("--index-url" in line for line in found["cuda"])
    extras = "".join(found["cuda"])
    assert "triton" in extras and "triton" not in "".join(found["cpu"])


def test_what_is_installed_is_known():
    lines = [line for of_stage in stages(DOCKERFILE).values() for line in of_stage]
    told = install_lines(README)
    assert len(lines) == 3 and len(told) >= 3 and any(line.startswith("uv ") for line in told)
    for line in [*lines, *told]:
        require_known(line)


@pytest.mark.parametrize(
    "line",
    [
        "pip install '.[everything]'",
        "uv pip install -c pins.txt .",
        "pip install torch==1.0",
        "pip install --index-url x torch",
    ],
)
def test_what_is_not_known_is_found(line):
    with pytest.raises(AssertionError):
        require_known(line)


def test_python_and_the_libraries_are_those_that_are_required():
    image = re.search(r"^FROM python:(\d+\.\d+)-", DOCKERFILE, re.MULTILINE)
    assert image and SpecifierSet(PROJECT["requires-python"]).contains(f"{image[1]}.0")
    told = re.search(r"needs Python ([\d.]+) or later, torch ([\d.]+), transformers ([\d.]+) and trl ([\d.]+)", README)
    assert told and PROJECT["requires-python"] == f">={told[1]}"
    for name, version in zip(("torch", "transformers", "trl"), told.groups()[1:], strict=True):
        assert {f">={version}"} <= {str(part) for part in RANGES[name]}
        assert RANGES[name].contains(Version(PINS[name]))


def test_extras_are_told():
    sentence = README[README.index("Extras, as in") :].split("\n\n")[0]
    told = set(re.findall(r"`([a-z]+)`", sentence))
    assert {"deepspeed", "eval", "plots", "triton", "wandb", "dev"} <= told
    assert told <= EXTRAS | {"cpu", "cuda"}


@pytest.mark.lengthy
def test_what_is_copied_into_the_image_is_enough(tmp_path):
    """The wheel of the files that the Dockerfile copies holds what the whole repository's does."""
    allowed = set((ROOT / ".dockerignore").read_text(encoding="utf-8").replace("!", "").split())
    copied = [rest.split()[:-1] for word, rest in instructions(DOCKERFILE) if word == "COPY"]
    (tmp_path / "src").mkdir()
    for source in (name for names in copied for name in names):
        assert source in allowed
        copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
        copy(ROOT / source, tmp_path / "src" / source)
    names = []
    for source, out in ((tmp_path / "src", tmp_path / "copied"), (ROOT, tmp_path / "whole")):
        subprocess.run(
            [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, source],
            check=True,
            capture_output=True,
        )
        with zipfile.ZipFile(next(out.glob("*.whl"))) as wheel:
            names.append({name for name in wheel.namelist() if "__pycache__" not in name})
    assert names[0] == names[1] and len(names[0]) > 100
