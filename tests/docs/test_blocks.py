"""Every code block of every page runs, or is read by whoever reads it at a user's."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from page_blocks import PLACEHOLDER, ROOT, Block, blocks, check_command, check_yaml, commands, files

from otpo.data.preferences import require_columns

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
FOLDERS = {
    PLACEHOLDER: "model_folder",
    "HuggingFaceTB/SmolLM2-135M-Instruct": "model_folder",
    "Qwen/Qwen3-0.6B": "model_folder",
    "Qwen/Qwen3-30B-A3B": "moe_folder",
    "path/to/a/moe/model": "moe_folder",
}
"""Models that pages name, and the tiny ones that stand for them here."""
BLOCKS = [block for page in PAGES for block in blocks(page)]
LANGUAGES = {"python", "bash", "yaml", "json", "text", ""}


def name(block: Block) -> str:
    return f"{block.page}:{block.line}"


def of(language: str) -> list[Block]:
    return [block for block in BLOCKS if block.language == language]


@pytest.fixture
def there(tmp_path, monkeypatch, own_process):
    """A folder as the reader's: with the repository's examples in it."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_files(page: str, folder: Path) -> None:
    for file, text in files(block for block in BLOCKS if block.page == page).items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(text, encoding="utf-8")


def with_models(text: str, request) -> str:
    for words, fixture in FOLDERS.items():
        if words in text:
            text = text.replace(words, request.getfixturevalue(fixture))
    return text


def test_pages_have_blocks_of_known_languages():
    assert {block.language for block in BLOCKS} <= LANGUAGES
    assert len(of("python")) > 5 and len(of("bash")) > 10 and len(of("yaml")) > 2


@pytest.mark.lengthy
@pytest.mark.parametrize("page", sorted({block.page for block in of("python")}))
def test_python_runs_in_the_pages_order(page, there, request):
    write_files(page, there)
    session: dict = {}
    for block in of("python"):
        if block.page != page or (block.file and block.file.endswith("judge.py")):
            continue
        code = compile(with_models(block.text, request), name(block), "exec")
        if not block.note.startswith("read only"):
            exec(code, session)  # our own text


@pytest.mark.parametrize("block", of("bash"), ids=name)
def test_commands_are_parsed(block, there, request):
    write_files(block.page, there)
    text = with_models(block.text, request)
    done = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    for command in commands(text):
        check_command(command)


@pytest.mark.parametrize("block", of("text"), ids=name)
def test_commands_in_text_are_parsed(block, there):
    for command in commands(block.text):
        if command.startswith("otpo ") and "usage" not in block.text:
            check_command(command)


@pytest.mark.parametrize("block", of("yaml"), ids=name)
def test_recipes_are_read(block, there):
    check_yaml(block.text, there / "block.yaml")


@pytest.mark.parametrize("block", of("json"), ids=name)
def test_rows_are_rows(block):
    rows = [json.loads(row) for row in block.text.strip().replace("}\n{", "}\0{").split("\0")]
    for row in rows:
        if "chosen" in row:
            require_columns(row, name(block))
        else:
            assert {"text", "messages", "prompt"} & row.keys()


@pytest.mark.lengthy
@pytest.mark.parametrize("block", [block for block in BLOCKS if block.note == "run"], ids=name)
def test_commands_run(block, there, request):
    write_files(block.page, there)
    for command in commands(with_models(block.text, request)):
        assert command.startswith("otpo ")
        done = subprocess.run(
            ["bash", "-c", command.replace("otpo ", f"{sys.executable} -m otpo.cli.main ", 1)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("command", "error"),
    [
        ("otpo align --weightning otpo", ValueError),
        ("otpo align --weighting otop", SystemExit),
        ("otpo plan compass-small --nodes two", SystemExit),
        ("otpo plan compass-v9", SystemExit),
        ("otpo aling", AssertionError),
        ("pip install 'otpo[everything]'", AssertionError),
        ("accelerate launch -m otpo.cli.align --ot_reg 0.1 --ot_regg 1", ValueError),
        ("make coffee", AssertionError),
        ("curl https://example.org", AssertionError),
    ],
)
def test_what_would_fail_at_a_readers_fails_here(command, error, there):
    with pytest.raises(error):
        check_command(command)
