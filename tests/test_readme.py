"""The README's code runs as printed: Python blocks in one session, commands of `otpo` in a shell."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""On the Hub; a random model of a folder takes its place here."""
INSTALLERS = ("pip", "uv")
"""Their lines are read by `tests/test_install_lines.py`."""
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", TEXT, re.DOTALL)
COMMANDS = [
    command
    for language, block in BLOCKS
    if language == "bash"
    for command in block.replace("\\\n", " ").strip().splitlines()
    if command.split()[0] not in INSTALLERS
]


def test_it_is_short():
    assert len(TEXT.splitlines()) < 150


def test_python_blocks_run_in_order(model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = [block for language, block in BLOCKS if language == "python"]
    assert blocks and len(blocks[0].strip().splitlines()) <= 15
    session: dict = {}
    for block in blocks:
        assert MODEL in block
        exec(compile(block.replace(MODEL, model_folder), "README.md", "exec"), session)  # our own text
    assert session["trainer"].state.global_step == 2
    assert (tmp_path / "runs" / "readme" / "model.safetensors").is_file()


def test_links_lead_to_files():
    linked = re.findall(r"\]\(([^)#]+)", TEXT)
    assert len(linked) > 20
    assert not [link for link in linked if "://" not in link and not (ROOT / link).exists()]


@pytest.mark.lengthy
@pytest.mark.parametrize("command", COMMANDS)
def test_commands_run(command, model_folder, tmp_path):
    words = shlex.split(command.replace(MODEL, model_folder))
    if words[0] == "make":  # only that the target is there: `make test` would run this test
        run, cwd = ["make", "--dry-run", *words[1:]], ROOT
    else:
        assert words[0] == "otpo"
        run, cwd = [sys.executable, "-m", "otpo.cli.main", *words[1:]], tmp_path
    plain = {**os.environ, "TRITON_INTERPRET": "0"}  # as a user has it
    done = subprocess.run(run, cwd=cwd, env=plain, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_pictures_are_there_and_small():
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert "docs/assets/pair_weightings.png" in pictures
    for name in pictures:
        assert 1_000 < (ROOT / name).stat().st_size < 200_000
