"""Numbers of tokens that a weighting looks at and that are made of a pair's row, by name; without torch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from otpo.lazy import load


@dataclass(frozen=True)
class TokenValues:
    """A number for each scored token of a pair, made once, when the dataset is prepared.

    Attributes:
        name: Where a weighting finds the numbers: `batch.token_values[name]`.
        function: Where the function is, as `"module:name"`. It takes a row with `prompt_ids`, `chosen_ids` and
            `rejected_ids`, the [`otpo.data.preferences.PairRule`] and the tokenizer (None unless it is asked for) and
            returns the numbers of the chosen and of the rejected response's scored tokens. A `ValueError` that it
            raises says what is wrong with the row, as the end of a sentence.
        reads: Columns that the user's dataset has to have for it.
        needs_tokenizer: Whether the function gets the tokenizer.
    """

    name: str
    function: str | Callable[..., Any]
    reads: tuple[str, ...] = ()
    needs_tokenizer: bool = False

    @property
    def columns(self) -> tuple[str, str]:
        """The columns of a prepared dataset that hold the numbers."""
        return f"chosen_{self.name}", f"rejected_{self.name}"

    def load(self) -> Callable[..., Any]:
        """The function; its module is imported when it was not."""
        return load(self.function)


UNMATCHED = TokenValues("unmatched", "otpo.data.token_values:unmatched_tokens")
"""1 for the tokens that an alignment of the two responses does not match, else 0."""
GIVEN = TokenValues(
    "given_weights",
    "otpo.data.given_weights:given_weights",
    reads=("chosen_weights", "rejected_weights"),
    needs_tokenizer=True,
)
"""The user's own weights, from a column for each response."""
VALUE_COLUMNS = tuple(column for kind in (UNMATCHED, GIVEN) for column in kind.columns)
"""Columns of prepared datasets that are ours."""
