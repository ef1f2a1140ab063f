"""Model cards of pretraining and fine-tuning: what made the model, of what, from what, and how it loads."""

from collections.abc import Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import ModelCard, ModelCardData

from otpo import __version__

_TEMPLATE = """\
---
{{ card_data }}
---

# Model Card for {{ model_name }}

This model was made by `{{ command }}` of otpo {{ otpo_version }}, {{ origin }}, on {{ data }}.

## Quick start

```python
{{ preparation }}from transformers import pipeline

generator = pipeline("text-generation", model="{{ model_id }}"{{ options }})
print(generator("The capital of France is", max_new_tokens=64)[0]["generated_text"])
```

## Versions

{{ versions }}
"""
_IMPORT = "import moe_backbone  # of `pip install otpo`; makes the model known to transformers\n"
_KINDS = {"otpo pretrain": "pretraining", "otpo sft": "sft"}


class Origin(NamedTuple):
    """Where a model comes from.

    Attributes:
        command: What trained it, a key of `_KINDS`.
        parent: Name or folder of the model that it was before; None for a new one.
        preset: The preset of a new one.
        data: Names and paths of what it was trained on.
        compass: Whether it is a Compass model.
        with_code: Whether its code is saved with it.
    """

    command: str
    parent: str | None
    preset: str | None
    data: tuple[str, ...]
    compass: bool
    with_code: bool


class WritesCard:
    """A trainer whose `create_model_card`, which saving checkpoints and pushing call, writes a card of ours."""

    origin: Origin

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | Sequence[str] | None = None,
        tags: str | Sequence[str] | None = None,
        **_: Any,
    ) -> None:
        """Writes `README.md` beside the model, in the first process alone.

        Args:
            model_name: Unset: that of the folder or of the repository that is pushed to.
            dataset_name: Passed over; the card names all data of the run.
            tags: Tags beside those of the run.
            _: Other arguments of transformers' and TRL's trainers.
        """
        trainer: Any = self
        if not trainer.is_world_process_zero():
            return
        args = trainer.args
        model_id = args.hub_model_id or args.output_dir
        extra = [tags] if isinstance(tags, str) else list(tags or [])
        extra += list(getattr(trainer.model, "model_tags", None) or [])
        card = make_card(self.origin, model_name or Path(model_id).name, model_id, extra)
        card.save(Path(args.output_dir) / "README.md")


@cache
def with_model_card(trainer_class: type, origin: Origin) -> Any:
    """A subclass of a trainer that writes a card of ours in place of its own."""
    return type(trainer_class.__name__, (WritesCard, trainer_class), {"origin": origin})


def make_card(origin: Origin, model_name: str, model_id: str, tags: Sequence[str] = ()) -> ModelCard:
    """The card of a model.

    Args:
        origin: Where it comes from.
        model_name: Its title.
        model_id: What it is loaded by.
        tags: Tags beside those that say how it was made.
    """
    own = ["otpo", _KINDS[origin.command], *(["compass"] if origin.compass else [])]
    data = ModelCardData(
        base_model=origin.parent if origin.parent and _on_the_hub(origin.parent) else None,
        datasets=[name for name in origin.data if _on_the_hub(name)] or None,  # pyright: ignore[reportArgumentType]
        library_name="transformers",
        model_name=model_name,
        tags=list(dict.fromkeys([*own, *tags])),
    )
    by_code, by_import = origin.compass and origin.with_code, origin.compass and not origin.with_code
    return ModelCard.from_template(
        data,
        template_str=_TEMPLATE,
        model_name=model_name,
        model_id=model_id,
        command=origin.command,
        origin=f"from `{origin.parent}`" if origin.parent else f"as a new model of the preset `{origin.preset}`",
        data=", ".join(f"`{name}`" for name in origin.data),
        preparation=_IMPORT if by_import else "",
        options=", trust_remote_code=True" if by_code else "",
        otpo_version=__version__,
        versions="\n".join(f"- {name}: {version(name)}" for name in ("transformers", "trl", "torch", "datasets")),
    )


def _on_the_hub(name: str) -> bool:
    """Whether metadata may name it: `owner/name`, and neither a path nor data that comes with otpo."""
    return name.count("/") == 1 and not name.startswith(("/", ".", "~", "otpo/")) and not Path(name).exists()
