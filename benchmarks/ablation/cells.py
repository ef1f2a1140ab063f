"""What a matrix is: weightings, data and seeds by name, their cells, and what is wrong with one that has none."""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from otpo import OTPOConfig
from otpo.data.demo import KINDS, SPLITS
from otpo.weighting import WEIGHTINGS
from otpo.weighting.registry import weighting_names

METHODS = ("otpo", "tdpo2", "tis")
"""What trains a cell: `OTPOTrainer`, or one of the rivals that are no weighting alone, see `methods.py`."""
_RELEASE, _PAIRWISE = {"weighting": "otpo"}, {"weighting": "otpo", "ot_cost_scale": "pairwise"}
_COSINE = {"weighting": "otpo", "ot_cost": "cosine"}
NAMED: dict[str, dict[str, Any]] = {
    "dpo": {"weighting": "uniform"},
    # The mean over tokens is some |y| times smaller than the sum: SimPO takes beta 2 to 2.5 for it.
    "length": {"weighting": "length", "beta": 2.0},
    "budget": {"weighting": "budget"},
    "sampo": {"weighting": "sampo"},
    "ld": {"weighting": "ld", "ld_alpha": 0.5},
    "otpo": {**_RELEASE, "ot_reg": 1.0},
    "otpo-reg0.1": {**_RELEASE, "ot_reg": 0.1},
    "otpo-reg0.02": {**_RELEASE, "ot_reg": 0.02},
    "otpo-pairwise": {**_PAIRWISE, "ot_reg": 1.0},
    "otpo-pairwise-reg0.1": {**_PAIRWISE, "ot_reg": 0.1},
    "otpo-pairwise-reg0.02": {**_PAIRWISE, "ot_reg": 0.02},
    "otpo-cosine": {**_COSINE, "ot_reg": 1.0},
    "otpo-cosine-reg0.02": {**_COSINE, "ot_reg": 0.02},
    "contrast": {"weighting": "contrast"},
    "contrast-reg1": {"weighting": "contrast", "ot_cost": "euclidean", "ot_reg": 1.0, "hidden_layer": -1},
    "contrast-reg0.1": {"weighting": "contrast", "ot_cost": "euclidean", "ot_reg": 0.1, "hidden_layer": -1},
    "contrast-last": {"weighting": "contrast", "hidden_layer": -1},
    "contrast-half": {"weighting": "contrast", "contrast_mix": 0.5},
    "otpo-diff": {"weighting": "otpo*diff", "ot_reg": 0.1},
    "tdpo2": {"weighting": "uniform", "method": "tdpo2"},
    "tis": {"weighting": "uniform", "method": "tis"},
}
"""Options of `OTPOConfig`, and a `method` of [`METHODS`] where it is not the first, by the name of a weighting."""
_IN_NAMED = {options["weighting"] for options in NAMED.values()}
# Those that read columns of the user's have no cell among the bundled data.
_OF_NO_COLUMN = [name for name, kind in WEIGHTINGS.items() if not any(value.reads for value in kind.values)]
NAMED |= {name: {"weighting": name} for name in _OF_NO_COLUMN if name not in _IN_NAMED}

BUNDLED = ("demo", "demo-longer", *(f"demo-{kind}" for kind in KINDS))
"""Bundled pairs: all, those whose chosen answer is the longer one, those of one kind of mistake."""
_OWN = ("output_dir", "seed", "data_seed", "max_steps")


@dataclass(frozen=True)
class Cell:
    """One training: the name and options of its weighting, its data, its seed."""

    weighting: str
    options: Mapping[str, Any] = field(hash=False)
    data: str
    seed: int

    @property
    def name(self) -> str:
        """A file's name that no other cell has."""
        data = re.sub(r"[^\w.-]+", "-", self.data)
        return f"{self.weighting}__{data}__seed{self.seed}"


@dataclass(frozen=True)
class Matrix:
    """The cells of a comparison and what they share.

    Attributes:
        weightings: Options by name, see [`NAMED`].
        data: Names of [`BUNDLED`], or paths of JSONL files of pairs.
        held_out: What the models are asked: bundled splits ("test": products that no training has seen;
            "test_templates": the same with wordings that none has seen), or paths of JSONL files of pairs.
        seeds: Of model, data order and drawn pairs.
        languages: Of the bundled data.
        pairs: Pairs to train on, >= 1; None for all of a file, or all that are bundled.
        prompts: Held-out prompts of each split, >= 1; beyond the bundled ones, more are drawn.
        answer_tokens: Most tokens of a free answer, >= 1.
        answer_batch: Prompts that are answered at a time, >= 1.
        training: Options of `OTPOConfig` that all cells share, such as `max_steps`.
    """

    weightings: Mapping[str, Mapping[str, Any]]
    data: tuple[str, ...] = ("demo",)
    held_out: tuple[str, ...] = ("test", "test_templates")
    seeds: tuple[int, ...] = (0,)
    languages: tuple[str, ...] = ("en",)
    pairs: int | None = None
    prompts: int = 48
    answer_tokens: int = 64
    answer_batch: int = 32
    training: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("weightings", "data", "held_out", "seeds"):
            values = list(getattr(self, name))
            if not values:
                raise ValueError(f"The matrix has no cells: `{name}` is empty. Give at least one.")
            if len(set(values)) < len(values):
                raise ValueError(f"`{name}` names something twice: {values}.")
        known = {option.name for option in dataclasses.fields(OTPOConfig)}
        for name, options in [*self.weightings.items(), ("training", self.training)]:
            if unknown := [option for option in options if option not in known and option != "method"]:
                raise ValueError(f"{name!r} sets {unknown}, which `OTPOConfig` does not have.")
        for name, options in self.weightings.items():
            if not re.fullmatch(r"[\w.-]+", name):
                raise ValueError(f"{name!r} can't name a file: use letters, digits, '.', '-' and '_'.")
            if options.get("weighting") not in weighting_names():
                raise ValueError(
                    f"{name!r} needs `weighting` among {sorted(WEIGHTINGS)}, got {options.get('weighting')!r}."
                )
            if options.get("method", METHODS[0]) not in METHODS:
                raise ValueError(f"{name!r} has the `method` {options['method']!r}. There are {list(METHODS)}.")
            if own := [option for option in options if option in _OWN]:
                raise ValueError(f"{name!r} sets {own}, which cells share: set `seeds` or `training` of the matrix.")
        if own := [option for option in self.training if option in _OWN and option != "max_steps"]:
            raise ValueError(f"'training' sets {own}, which the matrix sets for each cell.")
        for key, bundled in (("data", BUNDLED), ("held_out", SPLITS[1:])):
            for name in getattr(self, key):
                if name not in bundled and not Path(name).is_file():
                    raise ValueError(f"`{key}` must be among {list(bundled)} or a JSONL file of pairs, got {name!r}.")
        for name in ("pairs", "prompts", "answer_tokens", "answer_batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")

    @property
    def cells(self) -> list[Cell]:
        """All cells, seed by seed, so that a matrix that is stopped early has compared something."""
        return [
            Cell(name, options, data, seed)
            for seed in self.seeds
            for data in self.data
            for name, options in self.weightings.items()
        ]

    @property
    def baseline(self) -> str:
        """The weighting that the others are compared with: `dpo`, or the first."""
        return "dpo" if "dpo" in self.weightings else next(iter(self.weightings))


def weightings_of(given: list[str] | Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Names, or names with options of `OTPOConfig` of their own, as options by name.

    Raises:
        ValueError: A name alone is not in [`NAMED`]; the message lists those that are.
    """
    if isinstance(given, Mapping):
        named = {name: dict(options or NAMED.get(name, {})) for name, options in given.items()}
    else:
        if len(set(given)) < len(given):
            raise ValueError(f"`weightings` names something twice: {given}.")
        named = {name: dict(NAMED.get(name, {})) for name in given}
    if unknown := [name for name, options in named.items() if not options]:
        raise ValueError(f"Unknown weightings {unknown}. There are {sorted(NAMED)}.")
    return named


def read_matrix(path: str | Path, **changes: Any) -> Matrix:
    """Reads a matrix from YAML whose keys are the attributes of [`Matrix`]; `changes` that are not None win.

    Raises:
        ValueError: It isn't a mapping, has a key of its own, or is no matrix; the message names the file.
    """
    values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a mapping with `weightings`, got {type(values).__name__}.")
    values |= {name: value for name, value in changes.items() if value is not None}
    known = [attribute.name for attribute in dataclasses.fields(Matrix)]
    if unknown := [name for name in values if name not in known]:
        raise ValueError(f"{path} has the keys {unknown}; a matrix has {known}.")
    for name in ("data", "held_out", "seeds", "languages"):
        if name in values:
            values[name] = tuple(values[name] or ())
    return Matrix(**{**values, "weightings": weightings_of(values.get("weightings") or [])})
