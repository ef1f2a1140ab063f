"""The mixed-training strategy as data: stages of pretraining, each a weighted mixture of sources, read from YAML.

Compass-v3 (arXiv 2509.09121) trains in four stages: general knowledge, e-commerce and South-East Asian languages,
reasoning at 8K, and long context to 128K in two phases. Its mixtures, token budgets and learning rates are not
published; `examples/mixtures/compass.yaml` has ours.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from transformers import SchedulerType

from moe_backbone.model.config_checks import check_config, one_line_refusals
from moe_backbone.model.configuration_compass import CompassConfig

from .schedule import check_schedule
from .schema import FieldError, build, check_fields, limits

WHOLE = "train"
"""The split of what has no splits: a file, and a single table."""


@dataclass(kw_only=True)
class Source:
    """Documents from one place.

    Attributes:
        path: A .jsonl, .json, .csv or .txt file, compressed (.gz, .bz2, .xz, .zst) or not, a .parquet file, a folder
            written by `save_to_disk`, or a name on the Hub.
        weight: Share of the stage's documents that are drawn from it, relative to the other sources' weights, > 0.
        split: Split to read. A file has `train` alone, of which `train[:10%]` takes a part.
        config: Configuration on the Hub, or of a bundled source, such as its number of documents.
        text_column: Column with the text, or `input_ids` for documents that are tokenized. None for `input_ids` where
            there is such a column, and for `text` elsewhere.
        max_documents: Documents to use, >= 1; None for all.
        shuffle: Whether these are drawn by the run's seed, of a stream within its next 10,000, or are the first ones.
    """

    path: str
    weight: float = field(default=1.0, metadata=limits(above=0))
    split: str = WHOLE
    config: str | int | None = None
    text_column: str | None = None
    max_documents: int | None = field(default=None, metadata=limits(least=1))
    shuffle: bool = False

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(kw_only=True)
class Stage:
    """A stretch of pretraining with its own data, length and learning rate.

    Attributes:
        name: Names its folder: letters, digits and `_ - . +` or spaces inside.
        steps: Steps of the optimizer, >= 1.
        sequence_length: Tokens of a row, >= 2.
        learning_rate: Peak learning rate, >= 0.
        sources: What it is trained on, at least one.
        warmup_steps: Steps until the peak, or their share of all steps if below 1; None for the run's.
        lr_scheduler_type: A schedule of transformers; `cosine` falls to 0, `cosine_with_min_lr` not. None for the
            run's.
        lr_scheduler_kwargs: What the schedule needs beside, such as `{min_lr: 1.0e-5}`; None for the run's.
        rope_parameters: Rotary positions from this stage on, such as YaRN for a longer context; None for the model's.
        per_device_train_batch_size: Rows of a micro-batch, >= 1; None for the run's.
        gradient_accumulation_steps: Micro-batches of a step, >= 1; None for the run's.
    """

    name: str = field(
        metadata=limits(
            form=(r"\w([\w .+-]{0,98}[\w.+-])?", "letters, digits and `_ - . +`, up to 100, since it names a folder")
        )
    )
    steps: int = field(metadata=limits(least=1))
    sequence_length: int = field(metadata=limits(least=2))
    learning_rate: float = field(metadata=limits(least=0))
    sources: list[Source]
    warmup_steps: float | None = field(default=None, metadata=limits(least=0))
    lr_scheduler_type: str | None = field(
        default=None, metadata=limits(choices=[kind.value for kind in SchedulerType])
    )
    lr_scheduler_kwargs: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    per_device_train_batch_size: int | None = field(default=None, metadata=limits(least=1))
    gradient_accumulation_steps: int | None = field(default=None, metadata=limits(least=1))

    def __post_init__(self) -> None:
        check_fields(self)
        if self.warmup_steps is not None and self.warmup_steps > 1 and self.warmup_steps % 1:
            raise FieldError(self, "warmup_steps", f"must be whole, or below 1 for a share, got {self.warmup_steps}.")
        if self.lr_scheduler_type is not None:  # without one, the run's schedule has to take the arguments
            try:
                check_schedule(self.lr_scheduler_type, self.lr_scheduler_kwargs, self.learning_rate)
            except ValueError as error:
                problem = f"can't be used with {self.lr_scheduler_type}: {error}."
                raise FieldError(self, "lr_scheduler_kwargs", problem) from error
        if self.rope_parameters is not None:
            try:
                with one_line_refusals():  # a copy, since the configuration fills in what is left out
                    rope, length = dict(self.rope_parameters), self.sequence_length
                    check_config(CompassConfig(rope_parameters=rope, max_position_embeddings=length))
            except ValueError as error:
                raise FieldError(self, "rope_parameters", f"can't be used: {error}") from error


@dataclass(kw_only=True)
class Mixture:
    """The whole of a pretraining.

    Attributes:
        stages: What follows what, each with a name of its own.
        evaluation: Documents to evaluate on, all of them.
        streaming: Whether the stages' documents are read as they are needed.
    """

    stages: list[Stage]
    evaluation: list[Source] = field(default_factory=list, metadata=limits(empty=True))
    streaming: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        names = [stage.name for stage in self.stages]
        for place, name in enumerate(names):
            if name in names[:place]:
                raise FieldError(
                    self, f"stages[{place}].name", f"is {name!r}, but two stages have the same `name` among {names}."
                )

    def stage(self, name: str) -> Stage:
        """The stage of that name.

        Raises:
            ValueError: There is none.
        """
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise ValueError(f"`stage={name}`: the mixture has {[stage.name for stage in self.stages]}.")


def read_mixture(path: str) -> Mixture:
    """Reads a mixture from YAML.

    Raises:
        ValueError: The file is missing or is no YAML, a name in it is unknown or missing, or a value is out of range;
            the message has the line and the column, or the path of the key.
    """
    try:
        content = _read_yaml(path)
        if not isinstance(content, dict) or not content.get("stages"):
            raise ValueError(f"a mixture is a YAML mapping with a list `stages`, got {content!r:.60}.")
        return build(Mixture, content)
    except ValueError as error:
        raise ValueError(f"`mixture={path}`: {error}") from error


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice in a mapping, of which YAML would take the last."""

    def get_single_node(self) -> yaml.Node | None:
        """The file as it is written, before mappings are merged into others, which may set a key again."""
        node = super().get_single_node()
        _refuse_doubles(node, set())
        return node


def _refuse_doubles(node: Any, seen: set[int]) -> None:
    if id(node) in seen or not isinstance(node, yaml.CollectionNode):
        return
    seen.add(id(node))
    keys = set()
    for entry in node.value:
        key, value = entry if isinstance(node, yaml.MappingNode) else (None, entry)
        if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
            if key.value in keys:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value!r} stands twice", problem_mark=key.start_mark)
            keys.add(key.value)
        _refuse_doubles(value, seen)


def _read_yaml(path: str) -> Any:
    file = Path(path)
    if not file.is_file():
        raise ValueError("it is a folder. Name a YAML file." if file.is_dir() else "there is no such file.")
    try:
        return yaml.load(file.read_text(encoding="utf-8"), _Loader)
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 text ({error.reason} at byte {error.start}).") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ValueError(f"it is not YAML: {place}{error.problem}.") from error
    except yaml.YAMLError as error:
        raise ValueError(f"it is not YAML: {' '.join(str(error).split())}.") from error
    except RecursionError as error:
        raise ValueError("it is nested too deep.") from error
    except OSError as error:
        raise ValueError(f"it can't be read: {error.strerror}.") from error
