"""The README's code runs as printed: Python blocks in one session, commands of `otpo` in a shell."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
PLACEHOLDER = "path/to/a/chat/model"
FILES = {
    block.split("\n")[0].removeprefix("# "): block
    for language, block in BLOCKS
    if language == "python" and re.match(r"# [\w/]+\.py\n", block)
}
"""Blocks that are files of the user's, by the name that their first line tells."""
COMMANDS = [
    command
    for language, block in BLOCKS
    if language == "bash"
    for command in block.replace("\\\n", " ").strip().splitlines()
]


def test_python_blocks_run_in_order(model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = [block for language, block in BLOCKS if language == "python"]
    assert len(blocks) >= 3
    session: dict = {}
    for block in blocks:
        exec(compile(block.replace(PLACEHOLDER, model_folder), "README.md", "exec"), session)  # our own text
    assert session["trainer"].__class__.__name__ == "LastTokensTrainer"
    session["trainer"].train()


@pytest.mark.lengthy
@pytest.mark.parametrize("command", COMMANDS)
def test_commands_run(command, model_folder, tmp_path):
    words = shlex.split(command.replace(PLACEHOLDER, model_folder))
    if words[0] == "make":  # only that the target is there: `make test` would run this test
        run, cwd = ["make", "--dry-run", *words[1:]], ROOT
    else:
        assert words[0] == "otpo"
        run, cwd = [sys.executable, "-m", "otpo.cli.main", *words[1:]], tmp_path
        for name, content in FILES.items():
            (tmp_path / name).write_text(content, encoding="utf-8")
    plain = {**os.environ, "TRITON_INTERPRET": "0"}  # as a user has it
    done = subprocess.run(run, cwd=cwd, env=plain, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
