"""GitHub's workflows are valid by their linters, pinned, and give each job no more than it needs."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from page_blocks import ROOT

WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def lint(*paths: Path) -> tuple[int, str]:
    """The worse exit code of the schema's check and of zizmor, and what they said."""
    files = [str(path) for path in paths]
    schema = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows", *files]
    zizmor = [str(Path(sys.executable).with_name("zizmor")), "--offline", "--persona", "pedantic", *files]
    done = [subprocess.run(words, capture_output=True, text=True, check=False) for words in (schema, zizmor)]
    return max(each.returncode for each in done), "".join(each.stdout + each.stderr for each in done)


@pytest.mark.lengthy
def test_linters_find_nothing():
    assert [path.name for path in WORKFLOWS] == ["pages.yml", "publish.yml"]
    code, said = lint(*WORKFLOWS)
    assert code == 0, said


@pytest.mark.lengthy
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("runs-on: ubuntu-24.04", "runs_on: ubuntu-24.04"),
        ("@11bd71901bbe5b1630ceea73d27597364c9af683 # v4.2.2", "@v4"),
        ("persist-credentials: false", "fetch-depth: 1"),
    ],
)
def test_linters_find_a_mistake(old, new, tmp_path):
    broken = tmp_path / "pages.yml"
    text = WORKFLOWS[0].read_text(encoding="utf-8")
    assert old in text
    broken.write_text(text.replace(old, new), encoding="utf-8")
    assert lint(broken)[0] != 0


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_actions_are_pinned_and_permissions_are_each_jobs_own(path):
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert content["permissions"] == {}
    for name, job in content["jobs"].items():
        assert set(job["permissions"]) <= {"contents", "id-token", "pages"} and job["timeout-minutes"] <= 15
        assert job["permissions"].get("contents", "read") == "read"
        assert ("id-token" in job["permissions"]) is (name != "build")
        for step in job["steps"]:
            assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", step.get("uses", f"a/b@{'0' * 40}"))
    assert "secrets." not in path.read_text(encoding="utf-8")


def test_the_extra_is_pinned_as_the_tests_environment_is():
    """`docs` and `dev` name the same versions, and constraints.txt too."""
    pinned = dict(
        line.lower().split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    )
    extras = PROJECT["optional-dependencies"]
    for text in extras["docs"]:
        requirement = Requirement(text)
        assert pinned[requirement.name] in requirement.specifier and text in extras["dev"]
        assert "==" in text or requirement.name == "ruff"  # which formats signatures, and lints
