"""`otpo env`: what a run would find on this machine, to be pasted into an issue."""

import argparse
import json
import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from rich.console import Console

from otpo import __version__

PACKAGES = (
    "torch",
    "transformers",
    "trl",
    "accelerate",
    "datasets",
    "peft",
    "triton",
    "deepspeed",
    "lm_eval",
    "compressed-tensors",
    "POT",
    "wandb",
    "matplotlib",
)
_CACHES = {
    "HF_HOME": "~/.cache/huggingface",
    "HF_HUB_CACHE": "$HF_HOME/hub",
    "HF_DATASETS_CACHE": "$HF_HOME/datasets",
    "TRITON_CACHE_DIR": "~/.triton/cache",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the report, as text or with `--json` as JSON, and returns 0."""
    parser = argparse.ArgumentParser(
        prog="otpo env", description="Print versions, devices and folders, to be pasted into an issue."
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    report = collect()
    text = json.dumps(report, indent=2) if parser.parse_args(argv).json else render(report)
    Console(soft_wrap=True).print(text, highlight=False, markup=False)
    return 0


def collect() -> dict[str, Any]:
    """Versions, accelerators, supported ranges and cache folders, as JSON values."""
    versions = {name: installed_version(name) for name in PACKAGES}
    try:
        ranges: dict[str, str] | None = check_ranges(requires("otpo") or [], versions)
    except PackageNotFoundError:
        ranges = None
    return {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "otpo": __version__,
        "packages": versions,
        "ranges": ranges,
        "accelerators": _accelerators(),
        "folders": _folders(),
    }


def installed_version(name: str) -> str | None:
    """Version of a distribution from its metadata; None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def check_ranges(requirements: Sequence[str], versions: Mapping[str, str | None]) -> dict[str, str]:
    """Whether the installed versions are in the ranges that otpo supports.

    Args:
        requirements: Requirement lines of the package's metadata.
        versions: Installed versions by name, None where not installed; names that are not in it are left out.

    Returns:
        For each package that a line names, its range and `"met"`, `"not met"` or `"not installed"`.
    """
    by_name = {name.lower(): found for name, found in versions.items()}
    checked = {}
    for line in requirements:
        requirement = Requirement(line)
        name = requirement.name.lower()
        if name not in by_name or not requirement.specifier:
            continue
        found = by_name[name]
        met = found is not None and requirement.specifier.contains(found, prereleases=True)
        state = "not installed" if found is None else "met" if met else "not met"
        # The `dev` extra names some packages again with a range of its own; the strictest answer stays.
        if checked.get(name, "").endswith(": not met"):
            continue
        checked[name] = f"{requirement.specifier}: {state}"
    return checked


def render(report: Mapping[str, Any]) -> str:
    """The report as lines of text."""
    ranges = report["ranges"]
    lines = [f"{name}: {report[name]}" for name in ("platform", "python", "otpo")]
    for name, found in report["packages"].items():
        supported = (ranges or {}).get(name.lower())
        lines.append(f"{name}: {found or 'not installed'}" + (f" ({supported})" if supported and found else ""))
    if ranges is None:
        lines.append("supported ranges: unknown, otpo runs from a folder; install it with `pip install -e .`")
    lines += [f"{name}: {value}" for name, value in report["accelerators"].items() if name != "devices"]
    devices = report["accelerators"]["devices"]
    lines += [f"device {place}: {device}" for place, device in enumerate(devices)] or ["devices: CPU only"]
    lines += [f"{name}: {folder}" for name, folder in report["folders"].items()]
    return "\n".join(lines)


def _accelerators() -> dict[str, Any]:
    try:
        import torch
    except ImportError:
        return {"devices": []}
    found: dict[str, Any] = {"CUDA": torch.version.cuda, "ROCm": torch.version.hip}
    found = {name: value for name, value in found.items() if value is not None}
    devices = []
    if torch.cuda.is_available():
        for place in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(place)
            devices.append(f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    elif torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator()
        devices = [str(kind)] * torch.accelerator.device_count()
    return {**found, "devices": devices}


def _folders() -> dict[str, str]:
    """Cache folders and accelerate's default configuration, the home folder written as `~`."""
    folders: dict[str, str] = {}
    for name, default in _CACHES.items():
        path = os.environ.get(name) or default.replace("$HF_HOME", folders.get("HF_HOME", ""))
        folders[name] = str(Path(path).expanduser())
    config = Path(folders["HF_HOME"]) / "accelerate" / "default_config.yaml"
    home = str(Path.home())
    short = {name: path.replace(home, "~", 1) if path.startswith(home) else path for name, path in folders.items()}
    return {**short, "accelerate config": str(config).replace(home, "~", 1) if config.is_file() else "none"}
