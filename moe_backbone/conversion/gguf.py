"""One file in llama.cpp's format, written by llama.cpp's own converter."""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from moe_backbone.model.configuration_compass import CompassConfig

from .targets import QWEN3_NEXT, choose_target
from .unfinished import unfinished_folder

SCRIPT = "convert_hf_to_gguf.py"
_ROPE_KINDS = ("default", "linear", "yarn")
_YARN = {"rope_type", "rope_theta", "factor", "original_max_position_embeddings"}


def find_converter(named: str | None, environ: Mapping[str, str]) -> Path:
    """llama.cpp's converter: a named file or folder of llama.cpp, else that of `$LLAMA_CPP`, else that on the path.

    Args:
        named: By the user, or None.
        environ: Where `LLAMA_CPP` and `PATH` are.

    Raises:
        ValueError: There is none.
    """
    for place in (named, environ.get("LLAMA_CPP")):
        if place is None:
            continue
        path = Path(place).expanduser()
        path = path / SCRIPT if path.is_dir() else path
        if not path.is_file():
            raise ValueError(f"{place}: there is no {SCRIPT}. Name the file, or the folder of llama.cpp's sources.")
        return path
    found = shutil.which(SCRIPT, path=environ.get("PATH"))
    if found is None:
        raise ValueError(
            f"`--format gguf` runs llama.cpp's {SCRIPT}, which is neither on the path nor in `$LLAMA_CPP`. Clone "
            "https://github.com/ggml-org/llama.cpp, install its requirements, and set `--converter` to its folder."
        )
    return Path(found)


def require_same_in_llama_cpp(config: CompassConfig) -> None:
    """Raises a `ValueError` for what llama.cpp computes otherwise, or drops, without a word."""
    target = choose_target(config)
    if target is QWEN3_NEXT:
        raise ValueError(
            f"`num_shared_experts={config.num_shared_experts}` with `--format gguf`: the model becomes a Qwen3-Next "
            "of full attention alone, which llama.cpp's converter does not take. Export it as safetensors."
        )
    if not config.norm_topk_prob and config.num_experts_per_tok < config.num_experts:
        raise ValueError(
            "`norm_topk_prob=False` with `--format gguf`: llama.cpp scales the weights of a token's experts to sum to "
            "one. Export it as safetensors."
        )
    rope = config.rope_parameters or {}
    kind = rope.get("rope_type", "default")
    others = sorted(set(rope) - _YARN)
    if kind not in _ROPE_KINDS or others:
        what = f"`rope_type={kind}`" if kind not in _ROPE_KINDS else f"`{others[0]}` of `rope_parameters`"
        raise ValueError(f"{what} with `--format gguf`: llama.cpp's converter drops it. Export it as safetensors.")


def write_gguf(converter: Path, folder: Path, out: Path, outtype: str) -> None:
    """Runs the converter on a folder that was exported.

    Args:
        converter: The script.
        folder: The folder.
        out: The file to write. It gets its name when the converter is done.
        outtype: The converter's option: `f32`, `f16`, `bf16`, `q8_0` or `auto`.

    Raises:
        ValueError: The converter failed; the message has the last lines that it printed.
    """
    with unfinished_folder(out) as temporary:
        unfinished = temporary / out.name
        command = [str(converter), str(folder), "--outfile", str(unfinished), "--outtype", outtype]
        if converter.suffix == ".py":
            command.insert(0, sys.executable)
        done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ})
        if done.returncode or not unfinished.is_file():
            lines = (done.stderr + done.stdout).strip().splitlines()
            raise ValueError(f"{converter} failed: {' / '.join(lines[-3:]) or f'exit code {done.returncode}'}")
        os.replace(unfinished, out)
