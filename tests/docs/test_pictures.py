"""The pictures of the pages are made by their script, in a real headless Chromium."""

import importlib.util

import pytest
from browser import NAMES, find_browser
from page_blocks import ROOT
from PIL import Image

from otpo.weighting.registry import WEIGHTINGS

SCRIPT = ROOT / "docs/tools/screenshots.py"


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("screenshots", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.lengthy
@pytest.mark.skipif(find_browser() is None, reason=f"no Chromium on PATH (looked for {', '.join(NAMES)})")
def test_the_script_makes_every_picture(script, model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "BESIDE", script.BESIDE[:3])
    for name in ("align", "sft"):
        (tmp_path / "demo" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "demo" / name).symlink_to(model_folder)
    assert script.main(["--demo", str(tmp_path / "demo"), "--output", str(tmp_path / "made")]) == 0
    made = {path.name: Image.open(path) for path in (tmp_path / "made").iterdir()}
    assert made.keys() == {path.name for path in (ROOT / "docs/pictures").iterdir()}
    for name, picture in made.items():
        assert picture.width == script.WIDTH and picture.height > 100, name
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 20, name


def test_a_demo_that_is_not_there_is_named(script, tmp_path, capsys):
    with pytest.raises(SystemExit):
        script.main(["--demo", str(tmp_path)])
    assert "Run `make demo` first." in capsys.readouterr().err


def test_the_page_says_how_many_weightings_it_shows(script):
    shown = ["otpo", *script.BESIDE]
    assert set(shown) <= set(WEIGHTINGS) and len(set(shown)) == 10
    assert "One pair, ten weightings" in (ROOT / "docs/weightings.md").read_text(encoding="utf-8")
