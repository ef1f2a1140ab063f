"""What an entry of the weightings' registry is: a function and all that is said of it elsewhere; without torch."""

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from otpo.registry import Option, Registered

from .token_values import TokenValues

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from .batch import Weighting


@dataclass(frozen=True)
class WeightingKind(Registered):
    """A token weighting.

    Its function takes a [`PairBatch`] and the keywords of its options and returns weights or [`TokenWeights`]. Its
    `help` says what a token weighs.

    Attributes:
        options: The fields of `OTPOConfig` that it takes, and which of its keywords each is for.
        bundle: Makes of an `OTPOConfig` one object that the function takes as its keyword `options`, in place of a
            keyword for each option that says `bundled`.
        values: Numbers of tokens that it looks at and that are made of the data before training.
        needs_reference: Whether it looks at the reference's log-probabilities.
        looks: What it looks at, in plain words, where its help does not say so.
        defaults: Its own defaults of options that others share, by the field of `OTPOConfig`: of those of its
            `options` that say `own_defaults`.

    Raises:
        ValueError: `defaults` has a field that is no such option, or a value that the option's check refuses.
    """

    options: tuple[Option, ...] = ()
    bundle: "Callable[[Any], Any] | None" = None
    values: tuple[TokenValues, ...] = ()
    needs_reference: bool = False
    looks: str = ""
    defaults: "Mapping[str, Any]" = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        own = {option.field: option for option in self.options}
        for name, value in self.defaults.items():
            said = f"`defaults={{{name!r}: {value!r}}}` of a weighting"
            if name not in own:
                raise ValueError(
                    f"{said} is of no option that it takes; its `options` are {sorted(own)}. Add the option of "
                    f"`registered_options()[{name!r}]` to them where a weighting has it, or leave the default out."
                )
            if not own[name].own_defaults:
                able = sorted(field for field, option in own.items() if option.own_defaults)
                raise ValueError(
                    f"{said} would be ignored: `{name}` has one default for all weightings. Those with defaults of "
                    f"their own are {able}. Leave it out, or declare an `Option` of another name."
                )
            own[name].check(name, value)

    def __call__(self, args: Any) -> "Weighting":
        """The weighting with its options set from an `OTPOConfig`."""
        own = [option for option in self.options if option.keyword and not option.bundled]
        keywords: dict[str, Any] = {str(option.keyword): getattr(args, option.field) for option in own}
        if self.bundle is not None:
            keywords["options"] = self.bundle(args)
        return partial(self.load(), **keywords) if keywords else self.load()
