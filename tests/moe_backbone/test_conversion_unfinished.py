"""Folders of what is not finished: gone with their run, and those of killed runs with the next one."""

import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from moe_backbone.conversion import unfinished
from moe_backbone.conversion.folders import new_folder
from moe_backbone.conversion.unfinished import remove_left_over, unfinished_folder

pytest.importorskip("fcntl", reason="there are no such locks on Windows")
# The module by its path: a process without torch starts in no time.
RUN = """
import runpy, sys, time
from pathlib import Path
with runpy.run_path(sys.argv[1])["unfinished_folder"](Path(sys.argv[2])) as folder:
    (folder / "folder").mkdir()
    (folder / "folder" / "weights").write_text("half")
    print(folder, flush=True)
    time.sleep(600)
"""


@contextmanager
def running(out):
    """A process that writes there, and its folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, unfinished.__file__, str(out)], stdout=subprocess.PIPE, text=True
    )
    try:
        yield process, Path(process.stdout.readline().strip())
    finally:
        process.kill()
        process.communicate()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_folder_of_a_killed_run_goes_with_the_next_and_that_of_a_live_one_stays(tmp_path):
    out = tmp_path / "model"
    with running(out) as (_, alive):
        with running(out) as (killed, left):
            assert remove_left_over(out) == [] and (left / "folder" / "weights").is_file()
            killed.send_signal(signal.SIGKILL)
            killed.wait()
        assert names(tmp_path) == sorted([alive.name, left.name])
        with new_folder(out) as folder:  # as `otpo export`, `import` and `quantize` write
            assert left.name not in names(tmp_path) and (alive / "folder" / "weights").is_file()
            (folder / "weights").touch()
            # A run within a run, as of `otpo quantize`, leaves the outer one's.
            with unfinished_folder(out):
                assert len(names(tmp_path)) == 3
        assert names(tmp_path) == sorted([alive.name, "model"]) and names(out) == ["weights"]
    assert remove_left_over(out) == [alive] and names(tmp_path) == ["model"]


@pytest.mark.parametrize("owner", [None, b"", b"another-host"])
def test_what_cannot_be_judged_stays(tmp_path, owner):
    folder = tmp_path / ".model-abcd_123"
    folder.mkdir()
    if owner is not None:
        (folder / ".owner").write_bytes(owner)
    assert remove_left_over(tmp_path / "model") == [] and folder.is_dir()


@pytest.mark.parametrize(
    "name", [".model-fp8-abcd_123", ".model-abcd_1234", ".model-", "model-abcd_123", ".m-abcd_123"]
)
def test_folders_of_other_names_stay(tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / ".owner").write_text(socket.gethostname())
    assert remove_left_over(tmp_path / "model") == [] and (tmp_path / name).is_dir()


def test_without_locks_folders_go_with_their_run_and_none_is_judged(tmp_path, monkeypatch):
    monkeypatch.setattr(unfinished, "fcntl", None)
    with unfinished_folder(tmp_path / "model") as folder:
        (folder / "file").touch()
        (folder / "link").symlink_to(tmp_path)
        assert (folder / ".owner").read_bytes() == b""
        assert remove_left_over(tmp_path / "model") == []
    assert not list(tmp_path.iterdir())


def test_an_error_leaves_nothing(tmp_path):
    with pytest.raises(KeyError), unfinished_folder(tmp_path / "model") as folder:
        (folder / "folder").mkdir()
        raise KeyError
    assert not list(tmp_path.iterdir())
