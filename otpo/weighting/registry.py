"""The weightings by name; a new one is a function and an entry here.

An entry carries all that is said of a weighting elsewhere. `OTPOConfig` takes its choices, its checks and the line
that describes a weighting from here; `--help` and the parser of `otpo explain` take their texts, docs/weightings.md
its table.
An option that `DPOConfig` lacks needs one line in `OTPOConfig` besides, `name: type = registered_option("name")`,
because type checkers read the fields of a dataclass off the body of its class.
"""

from dataclasses import field
from functools import partial
from typing import TYPE_CHECKING, Any

from otpo.lazy import load
from otpo.registry import Option, above_zero_to_one, finite, never, zero_to_one, zero_to_one_or_none
from otpo.transport.options import TRANSPORT_OPTIONS, TransportOptions

from .kind import WeightingKind
from .token_values import GIVEN, UNMATCHED, TokenValues

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from .batch import Weighting


_HIDDEN_LAYER = Option(
    "hidden_layer",
    float,
    -1,
    "Hidden states that the weights are made of: 0 for the embeddings, l for the output of the l-th layer, negative "
    "from the end; -1 for the last, after the final norm; between 0 and 1, that share of the model's depth.",
    check=finite,  # whether the model has that layer is known when there is a model
    shown=lambda args: args.hidden_layer != -1,
    own_defaults=True,
    shared=True,  # a weighting of the user's own gets these states too
)

WEIGHTINGS: dict[str, WeightingKind] = {
    "otpo": WeightingKind(
        "otpo.weighting.optimal_transport:by_transport",
        help="marginal of the transport plan, with the sum `min(|y_c|, |y_r|)`",
        source="arXiv 2505.18720",
        looks="looks at what both responses share",
        options=(*TRANSPORT_OPTIONS, _HIDDEN_LAYER),
        bundle=TransportOptions.of,
    ),
    "contrast": WeightingKind(
        "otpo.weighting.optimal_transport:contrast",
        help="mass that the transport plan destroys, what the other response has nothing near to; with the sum "
        "`min(|y_c|, |y_r|)`",
        source="ours",
        looks="looks at what one response has and the other has not, by the same plan",
        options=(
            Option(
                "contrast_mix",
                float,
                1.0,
                "Share of the destroyed mass in the weights of 'contrast', in [0, 1]; the rest is that of 'budget'.",
                keyword="mix",
                check=zero_to_one,
            ),
            *TRANSPORT_OPTIONS,
            _HIDDEN_LAYER,
        ),
        bundle=TransportOptions.of,
        # One setting for all models, chosen on one half of the pairs and reported on the other: docs/ablations.md.
        defaults={"ot_cost": "cosine", "ot_reg": 0.1, "hidden_layer": 0.8},
    ),
    "uniform": WeightingKind(
        "otpo.weighting.methods:uniform",
        help="1, which is DPO, with padded rows to the last bit",
        source="arXiv 2305.18290",
    ),
    "budget": WeightingKind(
        "otpo.weighting.methods:budget",
        help="`min(|y_c|, |y_r|) / |y|`: OTPO's length control without transport",
        source="arXiv 2505.18720, its ablation",
    ),
    "length": WeightingKind("otpo.weighting.methods:length", help="`1 / |y|`", source="arXiv 2405.14734"),
    "sampo": WeightingKind(
        "otpo.weighting.methods:sampo",
        help="1 on a seeded random subset of the longer response, else 0",
        source="arXiv 2406.10957",
        options=(Option("seed", int, 42, "Seed of the subset of 'sampo'.", keyword="seed", shown=never, shared=True),),
    ),
    "ld": WeightingKind(
        "otpo.weighting.methods:ld",
        help="1, and `ld_alpha` past the shorter response's length",
        source="arXiv 2409.06411",
        options=(
            Option(
                "ld_alpha",
                float,
                None,
                "Weight past the shorter response's length with 'ld', in [0, 1].",
                keyword="alpha",
                check=zero_to_one_or_none,
                needed="Set it within [0, 1]; the LD-DPO paper finds 0.5 best for Llama-3-8B-Instruct.",
                shared=True,  # TRL's own loss takes it beside the other weightings
            ),
        ),
    ),
    "d2po": WeightingKind(
        "otpo.weighting.methods:d2po",
        help="`d2po_gamma` to the power of the position",
        source="arXiv 2502.14340",
        options=(
            Option(
                "d2po_gamma",
                float,
                0.98,
                "Weight of a token over that of the one before it with 'd2po', in (0, 1].",
                keyword="gamma",
                check=above_zero_to_one,
            ),
        ),
    ),
    "confpo": WeightingKind(
        "otpo.weighting.methods:confpo",
        help="1 where the policy is less sure of the token than of the response's tokens on average, else 0",
        source="arXiv 2506.08712",
        looks="looks at what the policy is unsure of",
    ),
    "surprisal": WeightingKind(
        "otpo.weighting.methods:surprisal",
        help="`-log pi_ref` of the token, with the sum `min(|y_c|, |y_r|)`",
        source="ours",
        looks="looks at what the reference did not expect",
        needs_reference=True,
    ),
    "diff": WeightingKind(
        "otpo.weighting.methods:diff",
        help="1 where an alignment finds no such token in the other response, else `diff_base`; with the sum "
        "`min(|y_c|, |y_r|)`",
        source="arXiv 2312.00849",
        looks="looks at the tokens that one response has and the other has not, without a model",
        options=(
            Option(
                "diff_base",
                float,
                0.2,
                "Weight of a token that both responses have over that of one that they have not with 'diff', in "
                "[0, 1].",
                keyword="base",
                check=zero_to_one,
            ),
        ),
        values=(UNMATCHED,),
    ),
    "columns": WeightingKind(
        "otpo.weighting.methods:columns",
        help="what the dataset's columns `chosen_weights` and `rejected_weights` say, for each token or for spans of "
        "characters",
        source="ours",
        values=(GIVEN,),
    ),
}
JOINT = "*"
"""Stands between the names of weightings that are multiplied with each other."""


class WeightingNames(list[str]):
    """The names of weightings, as the choices of an option, which products of them are too."""

    def __contains__(self, name: object) -> bool:
        """Whether it is a name, or names joined by `*`."""
        return isinstance(name, str) and all(super(WeightingNames, self).__contains__(each) for each in split(name))


def weighting_names() -> WeightingNames:
    """The names of all weightings, sorted; a product of them is among them."""
    return WeightingNames(sorted(WEIGHTINGS))


def split(weighting: str) -> list[str]:
    """The names that a weighting's name is joined of."""
    return weighting.split(JOINT)


def kinds_of(weighting: str) -> "list[WeightingKind]":
    """The entries of a weighting's name, several where it is a product.

    Raises:
        KeyError: There is no such weighting.
    """
    return [WEIGHTINGS[name] for name in split(weighting)]


def looks_at(weighting: str) -> str | None:
    """What the tokens of a weighting are weighed by, to be read; None where the name is not of the registry."""
    if any(name not in WEIGHTINGS for name in split(weighting)):
        return None
    told = [f"{kind.looks}: {kind.help}" if kind.looks else kind.help for kind in kinds_of(weighting)]
    return "; times ".join(f"{text} ({kind.source})" for text, kind in zip(told, kinds_of(weighting), strict=True))


def make_weighting(args: Any) -> "Weighting":
    """The weighting of an `OTPOConfig` with its options set."""
    factors = [kind(args) for kind in kinds_of(args.weighting)]
    return factors[0] if len(factors) == 1 else partial(load("otpo.weighting.methods:product"), factors=factors)


def values_of(weighting: str) -> tuple[TokenValues, ...]:
    """The numbers of tokens that a weighting looks at and that are made of the data, each once."""
    return tuple(dict.fromkeys(value for kind in kinds_of(weighting) for value in kind.values))


def registered_options() -> dict[str, Option]:
    """The options of all weightings, by the field's name."""
    return {option.field: option for kind in WEIGHTINGS.values() for option in kind.options}


def registered_option(name: str) -> Any:
    """The field of `OTPOConfig` for an option that is declared in an entry.

    Raises:
        KeyError: No entry has such an option.
    """
    option = registered_options()[name]
    default = None if option.own_defaults else option.default
    return field(default=default, metadata={"help": f"{option.help}{default_note(option)}"})


def own_defaults(option: str) -> dict[str, Any]:
    """The defaults of an option that weightings have of their own, by the weighting."""
    return {name: kind.defaults[option] for name, kind in WEIGHTINGS.items() if option in kind.defaults}


def default_note(option: Option) -> str:
    """What `--help` says of a default that depends on the weighting; empty where it does not."""
    own = own_defaults(option.field)
    others = "".join(f", {value} for '{name}'" for name, value in own.items())
    return f" Unset: {option.default}{others}." if own else ""


def with_defaults(values: "Mapping[str, Any]") -> dict[str, Any]:
    """Options by name, in which those that are None have the default of the weighting that is among them."""
    names = [name for name, option in registered_options().items() if option.own_defaults and name in values]
    if "weighting" not in values or not names:
        return dict(values)
    return {**values, **{name: default_of(name, values["weighting"]) for name in names if values[name] is None}}


def default_of(option: str, weighting: Any) -> Any:
    """The default of an option with a weighting.

    Where a weighting is a product, the first of its factors that has a default of its own says.
    """
    kinds = [WEIGHTINGS[name] for name in split(str(weighting)) if name in WEIGHTINGS]
    own = [kind.defaults[option] for kind in kinds if option in kind.defaults]
    return [*own, registered_options()[option].default][0]


def set_defaults(args: Any) -> dict[str, Any]:
    """Sets the options of an `OTPOConfig` that are None to the default of its weighting; returns these by name."""
    unset = [name for name, option in registered_options().items() if option.own_defaults]
    unset = [name for name in unset if getattr(args, name, ...) is None]
    found = {name: default_of(name, args.weighting) for name in unset}
    for name, value in found.items():
        setattr(args, name, value)
    return found


def check_weighting(args: Any) -> None:
    """Checks the weighting's name and the options of all weightings in an `OTPOConfig`.

    Raises:
        ValueError: A name or a value is outside its range, or the weighting needs an option that is not set, or that
            the configuration's class lacks.
    """
    if args.weighting not in weighting_names():
        raise ValueError(
            f"`weighting` must be one of {sorted(WEIGHTINGS)}, got {args.weighting!r}. Several are multiplied where "
            f"'{JOINT}' joins them, as in 'otpo{JOINT}diff'. To use your own weighting, pass a callable as the "
            "trainer's argument `weighting`."
        )
    for option in _options_of(args.weighting):
        if not hasattr(args, option.field):
            raise ValueError(
                f"`weighting={args.weighting!r}` takes the option `{option.field}`, which `{type(args).__name__}` has "
                f"not. Take a dataclass that inherits from it and has the line `{option.field}: "
                f"{option.kind.__name__} = registered_option({option.field!r})`."
            )
    for option in registered_options().values():  # a weighting of the user's may have options that another has not
        if hasattr(args, option.field):
            option.check(option.field, getattr(args, option.field))
    for option in _options_of(args.weighting):
        if option.needed and getattr(args, option.field) is None:
            raise ValueError(f"`weighting={args.weighting!r}` needs `{option.field}`, got None. {option.needed}")


def describe_weighting(args: Any) -> str:
    """The weighting of an `OTPOConfig` and those of its options that matter, in one line."""
    shown = [option.describe(args) for option in _options_of(args.weighting) if option.shown(args)]
    return ", ".join([args.weighting, *shown])


def says_nothing(option: str, weighting: str | None) -> bool:
    """Whether an option of `OTPOConfig` makes no difference to a run with this weighting."""
    takers = {
        name
        for name, kind in WEIGHTINGS.items()
        if any(taken.field == option and not taken.shared for taken in kind.options)
    }
    return bool(takers) and takers.isdisjoint(split(weighting or ""))


def weightings_help() -> str:
    """All weightings in one sentence, for `--help`."""
    listed = [f"'{name}' ({kind.help.replace('`', '')})" for name, kind in WEIGHTINGS.items()]
    return f"What a token weighs: {', '.join(listed)}. Names joined by '{JOINT}' are multiplied."


def weightings_table() -> str:
    """The table of weightings in docs/weightings.md, in Markdown."""
    rows = [("name", "weight of a token", "options", "source"), ("---",) * 4]
    for name, kind in WEIGHTINGS.items():
        options = ", ".join(f"`{option.field}`" for option in kind.options)
        rows.append((f"`{name}`", kind.help.replace("|", r"\|"), options, kind.source))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _options_of(weighting: str) -> "Iterator[Option]":
    """The options of a weighting, each once."""
    yield from dict.fromkeys(option for kind in kinds_of(weighting) for option in kind.options)
