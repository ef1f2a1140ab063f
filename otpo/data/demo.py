"""Data of a shopping assistant in seven languages, and instructions with constraints. All of it is generated text."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice, pairwise
from typing import TYPE_CHECKING, Any, overload

from .constraints.checks import CONSTRAINTS
from .constraints.prompts import MIX, new_prompt
from .ecommerce import new_documents
from .ecommerce.bundled import read_rows
from .ecommerce.lexicon import LANGUAGES
from .ecommerce.make_pairs import KINDS
from .ecommerce.new_instructions import new_instruction
from .ecommerce.new_pairs import new_pairs
from .ecommerce.new_questions import new_question, question_document

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

SPLITS = ("train", "test", "test_templates")
CORPUS_SPLITS = new_documents.SPLITS
_SHARDS = 64


def load_demo_preferences(
    split: str = "train",
    languages: Sequence[str] | None = None,
    kinds: Sequence[str] | None = None,
    count: int | None = None,
    seed: int = 0,
) -> "Dataset":
    """Loads pairs whose rejected answers are wrong in a known span: the bundled ones, and more of them.

    Args:
        split: `"train"` (1,512 pairs), `"test"` (252, products that are not in train) or `"test_templates"` (252,
            products and wordings that are not in train).
        languages: One or more of en, id, th, vi, ms, fil, pt; None for all.
        kinds: What is wrong with the rejected answers, one or more of attribute, price, language, format; None
            for all.
        count: Rows: the bundled ones, then new ones about products that are in no bundled pair and, those of the
            test splits, in nothing drawn for training. None for the bundled ones.
        seed: Of the new ones.

    Returns:
        Rows in TRL's conversational format (`prompt`, `chosen`, `rejected`), with `chosen_spans` and
        `rejected_spans` (`[start, end)` in characters of the answer: what is right, and what is wrong),
        `language`, `kind`, `length` (short, medium, long), `product_id`, `template_id`, and `answer`, what a right
        answer holds: `attribute` and its `value`, `price`, `language`, `format` (text, bullets, lines, commas,
        json) and its number of `items`. Chosen and rejected answers are as long as each other on average.

    Raises:
        ValueError: An argument names something that is not there, or nothing, or `count` is below 1.
    """
    from datasets import Dataset

    if count is not None and count < 1:
        raise ValueError(f"`count` must be at least 1, got {count}. Leave it out for the bundled pairs.")
    languages, kinds = LANGUAGES if languages is None else languages, KINDS if kinds is None else kinds
    rows = _bundled(split, languages, kinds)
    if count is not None:
        rows = rows[:count] + list(islice(new_pairs(split, languages, kinds, seed), max(0, count - len(rows))))
    return Dataset.from_list(rows)


def load_demo_instructions(
    split: str = "train", languages: Sequence[str] | None = None, count: int | None = None, seed: int = 0
) -> "Dataset":
    """Loads requests with their right answers: the prompts and chosen answers of the bundled pairs, and more of them.

    Args:
        split: As in [`load_demo_preferences`]. No listing of a test split is in train, and no wording of
            `"test_templates"`.
        languages: One or more of en, id, th, vi, ms, fil, pt; None for all.
        count: Rows of the training split: the bundled ones, then new ones about products that are in no bundled
            pair. None for the bundled ones.
        seed: Of the new ones; each depends on it and its place alone.

    Returns:
        Rows with `messages` (user, assistant), and `answer`, `language`, `kind`, `length`, `product_id` and
        `template_id` as in [`load_demo_preferences`], so that
        [`otpo.data.ecommerce.answers.check_answer`] can check what a model answers to the first message.

    Raises:
        ValueError: An argument names something that is not there, or nothing; or `count` is set for a test split.
    """
    from datasets import Dataset

    if count is not None and (split != "train" or count < 1):
        raise ValueError(f"`count` must be at least 1 and of split 'train', got {count} of {split!r}. Leave it out.")
    rows = [_as_instruction(row) for row in _bundled(split, languages, KINDS)]
    if count is not None:
        chosen = tuple(languages or LANGUAGES)
        rows = rows[:count] + [new_instruction(index, chosen, seed) for index in range(count - len(rows))]
    return Dataset.from_list(rows)


@overload
def load_demo_corpus(
    split: str = ...,
    count: int = ...,
    languages: Sequence[str] | None = ...,
    seed: int = ...,
    *,
    short_questions: bool = ...,
) -> "Dataset": ...
@overload
def load_demo_corpus(
    split: str = ...,
    count: int = ...,
    languages: Sequence[str] | None = ...,
    seed: int = ...,
    *,
    streaming: bool,
    short_questions: bool = ...,
) -> "Dataset | IterableDataset": ...
def load_demo_corpus(
    split: str = "train",
    count: int = 10_000,
    languages: Sequence[str] | None = None,
    seed: int = 0,
    *,
    streaming: bool = False,
    short_questions: bool = False,
) -> "Dataset | IterableDataset":
    """Writes documents for pretraining: listings, prose, questions with answers, lists, facts in several formats.

    They hold what the instructions ask for, not in a chat's form, and neither products of bundled pairs nor wordings
    that `"test_templates"` holds out.

    Args:
        split: `"train"` or `"test"`, about products that are not in train.
        count: Documents, >= 1, of some 400 characters on average. Document `i` depends on the other arguments and
            `i` alone, so a larger set starts with a smaller one.
        languages: One or more of en, id, th, vi, ms, fil, pt; None for all.
        seed: Of all randomness.
        streaming: Whether documents are written while they are read, in shards for several readers, rather than all
            at once.
        short_questions: Whether all documents are short pages, each with questions as in [`load_demo_questions`] and
            their answers, in place of all kinds.

    Returns:
        Rows with `text`, `language` and `kind`.

    Raises:
        ValueError: An argument names something that is not there, or nothing.
    """
    from datasets import Dataset, IterableDataset

    chosen = tuple(LANGUAGES if languages is None else languages)
    _check(("split", [split], CORPUS_SPLITS), ("languages", chosen, LANGUAGES))
    if count < 1:
        raise ValueError(f"`count` must be at least 1, got {count}.")
    shards = min(count, _SHARDS)
    bounds = [count * shard // shards for shard in range(shards + 1)]
    options = {
        "ranges": [range(*pair) for pair in pairwise(bounds)],
        "split": split,
        "languages": chosen,
        "seed": seed,
        "short_questions": short_questions,
    }
    if streaming:
        return IterableDataset.from_generator(_documents, gen_kwargs=options)
    return Dataset.from_list(list(_documents(**options)))


def load_demo_questions(
    split: str = "train",
    languages: Sequence[str] | None = None,
    count: int = 1_000,
    seed: int = 0,
    *,
    misread: float = 0.0,
) -> "Dataset":
    """Writes short questions about short pages, each with an answer of one line, for models of a million parameters.

    Args:
        split: `"train"`, `"test"` (products that are not in train) or `"test_templates"` (wordings that are not in
            train, too).
        languages: One or more of en, id, th, vi, ms, fil, pt; None for all.
        count: Rows, >= 1. Row `i` depends on the other arguments and `i` alone.
        seed: Of all randomness.
        misread: Share of the questions in one of the three wordings, in [0, 1], whose completion states another fact
            of the page: data of uneven quality, as what people wrote often is.

    Returns:
        Rows with `prompt` and `completion` in TRL's conversational format, and `answer`, `language`, `kind`,
        `length`, `product_id` and `template_id` as in [`load_demo_preferences`], so that
        [`otpo.data.ecommerce.answers.check_answer`] can check what a model answers to the prompt.

    Raises:
        ValueError: An argument names something that is not there, or nothing, or is out of its range.
    """
    from datasets import Dataset

    chosen = tuple(LANGUAGES if languages is None else languages)
    _check(("split", [split], SPLITS), ("languages", chosen, LANGUAGES))
    if count < 1:
        raise ValueError(f"`count` must be at least 1, got {count}.")
    if not 0 <= misread <= 1:
        raise ValueError(f"`misread` is a share and must be within [0, 1], got {misread}.")
    return Dataset.from_list([new_question(index, split, chosen, seed, misread) for index in range(count)])


def load_demo_constraints(
    split: str = "train", count: int = 1_000, seed: int = 0, *, mix: Mapping[str, float] | None = None
) -> "Dataset":
    """Writes instructions with constraints that a program checks, for small chat models that know some English.

    A prompt asks for a list of things or a sentence, and sets one or more of: how many items or words, in which form,
    in which language, with or without which words.

    Args:
        split: `"train"`, `"test"` (what is asked about, taken together, is in no training prompt) or
            `"test_templates"` (nor are the wordings).
        count: Rows, >= 1. Row `i` depends on the other arguments and `i` alone.
        seed: Of all randomness.
        mix: How often a prompt sets each of count, format, language and keyword, in [0, 1]; None for
            `otpo.data.constraints.prompts.MIX`. More constraints are harder.

    Returns:
        Rows with `prompt` and `completion`, an answer that keeps the constraints, in TRL's conversational format,
        `kind` (list, sentence), `template_id` and `constraints`, so that
        [`otpo.data.constraints.checks.check_constraints`] can check what a model answers to the prompt.

    Raises:
        ValueError: An argument names something that is not there, or is out of its range.
    """
    from datasets import Dataset

    shares = dict(MIX if mix is None else mix)
    _check(("split", [split], SPLITS), ("mix", list(shares), CONSTRAINTS))
    if count < 1:
        raise ValueError(f"`count` must be at least 1, got {count}.")
    wrong = {name: share for name, share in shares.items() if not 0 <= share <= 1}
    if wrong or not any(shares.values()):
        raise ValueError(f"`mix` has shares, which must be within [0, 1] and not all 0, got {shares}.")
    return Dataset.from_list([new_prompt(index, split, seed, shares) for index in range(count)])


def _documents(
    ranges: list[range], split: str, languages: tuple[str, ...], seed: int, short_questions: bool
) -> Iterator[dict[str, str]]:
    make = question_document if short_questions else new_documents.make_document
    for places in ranges:
        for index in places:
            yield make(index, split, languages, seed)


def _bundled(split: str, languages: Sequence[str] | None, kinds: Sequence[str]) -> list[dict[str, Any]]:
    languages = LANGUAGES if languages is None else languages
    _check(("split", [split], SPLITS), ("languages", languages, LANGUAGES), ("kinds", kinds, KINDS))
    return [
        row
        for row in read_rows()
        if row.pop("split") == split and row["language"] in languages and row["kind"] in kinds
    ]


def _as_instruction(row: dict[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in row.items() if not name.startswith(("prompt", "chosen", "rejected"))}
    return {"messages": row["prompt"] + row["chosen"], **kept}


def _check(*arguments: tuple[str, Sequence[str], Sequence[str]]) -> None:
    for name, given, allowed in arguments:
        unknown = [value for value in given if value not in allowed]
        if unknown or not given:
            raise ValueError(f"`{name}` must be among {list(allowed)}, got {unknown}.")
