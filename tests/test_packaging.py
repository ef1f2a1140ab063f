"""The wheel and the editable install import from any folder, beside Hugging Face's `kernels` or without it."""

import os
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
IMPORTS = "import otpo, moe_backbone, otpo_kernels; print(otpo.__file__, otpo_kernels.__file__)"
# Stands for Hugging Face's package of that name: any attribute that transformers imports from it exists, can be
# called, and makes a decorator that changes nothing.
KERNELS_STUB = """
__version__ = '0.18.2'
ORIGIN = 'hugging face'
def __getattr__(name):
    def accept(self, *args, **kwargs): pass
    def decorate(self, decorated=None, *args, **kwargs): return decorated
    return type(name, (), {'__init__': accept, '__call__': decorate})
"""


def run(*command: str | Path, cwd: Path, **env: str) -> str:
    clean = {key: value for key, value in os.environ.items() if key not in {"PYTHONPATH", "PYTHONSAFEPATH"}}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env={**clean, **env}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def add_kernels_distribution(site: Path) -> None:
    (site / "kernels").mkdir()
    (site / "kernels/__init__.py").write_text(KERNELS_STUB)
    info = site / "kernels-0.18.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.2\n")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    return next(folder.glob("otpo-*.whl"))


@pytest.fixture(params=["wheel", "editable"])
def installed(request, tmp_path) -> tuple[Path, Path]:
    """A fresh environment with otpo in it, and its site-packages; the other packages are this environment's."""
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv/bin/python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    (site / "parent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    target = ROOT if request.param == "editable" else request.getfixturevalue("wheel")
    flag = ["-e"] if request.param == "editable" else []
    run(
        python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--ignore-installed",
        *flag, target, cwd=tmp_path,
    )  # fmt: skip
    return python, site


@pytest.mark.lengthy
def test_wheel_holds_the_three_packages_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {
        "otpo",
        "moe_backbone",
        "otpo_kernels",
    }
    assert {f"{package}/py.typed" for package in ("otpo", "moe_backbone", "otpo_kernels")} <= set(names)
    assert "otpo/data/ecommerce_preferences.jsonl.gz" in names
    assert any(name.endswith("lexicon/th.yaml") for name in names)
    assert any(name.startswith("otpo/cli/accelerate_configs/") for name in names)


@pytest.mark.lengthy
def test_imports_from_any_folder(installed, tmp_path):
    python, site = installed
    for cwd in (tmp_path, ROOT, ROOT / "kernels"):
        for code in (IMPORTS, "import transformers.integrations.hub_kernels"):
            run(python, "-c", code, cwd=cwd)
    assert "usage" in run(python, "-m", "otpo.cli.main", "--help", cwd=tmp_path).lower()

    add_kernels_distribution(site)
    for cwd in (tmp_path, ROOT):
        run(python, "-c", IMPORTS, cwd=cwd)
        origin = "import transformers.integrations.hub_kernels, kernels; print(kernels.ORIGIN)"
        assert run(python, "-c", origin, cwd=cwd).strip() == "hugging face"


def test_ci_installs_what_tests_would_be_skipped_without():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    pinned = {line.partition("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert set(extras["eval"]) <= set(extras["dev"]) and {"lm_eval", "evaluate", "scikit-learn"} <= pinned


def test_nothing_of_ours_is_importable_as_kernels():
    assert not list((ROOT / "kernels").glob("*.py"))


@pytest.mark.lengthy
@pytest.mark.parametrize("heavy", ["torch", "trl", "transformers", "triton", "deepspeed", "datasets"])
def test_import_is_light(heavy):
    code = f"import otpo, otpo.data, sys; sys.exit({heavy!r} in sys.modules)"
    run(sys.executable, "-c", code, cwd=ROOT)


@pytest.mark.lengthy
def test_the_lightness_check_can_fail():
    code = "from otpo import OTPOConfig; import sys; print('torch' in sys.modules)"
    assert run(sys.executable, "-c", code, cwd=ROOT).strip() == "True"


def test_unknown_name_is_an_attribute_error():
    import otpo

    with pytest.raises(AttributeError, match="no attribute 'DPOTrainer'"):
        _ = otpo.DPOTrainer
    assert set(otpo.__all__) <= set(dir(otpo))
    assert all(getattr(otpo, name) for name in otpo.__all__)
