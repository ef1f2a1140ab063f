import gzip
import sys
from collections import Counter

import pytest
from trl.data_utils import is_conversational

from otpo.data import load_demo_preferences
from otpo.data.checks import check_answer, likely_languages
from otpo.data.ecommerce import formats
from otpo.data.ecommerce.generate import BUNDLED, main, make_rows, to_bytes
from otpo.data.ecommerce.lexicon import LANGUAGES, lexicon
from otpo.data.ecommerce.pairs import KINDS, LENGTHS

SPLITS = {"train": 1512, "test": 252, "test_templates": 252}


@pytest.fixture(scope="module")
def splits():
    return {split: list(load_demo_preferences(split)) for split in SPLITS}


@pytest.fixture(scope="module")
def rows(splits):
    return [row for split in splits.values() for row in split]


def texts(row) -> tuple[str, str]:
    return row["chosen"][0]["content"], row["rejected"][0]["content"]


def test_the_generator_makes_the_bundled_file():
    first = to_bytes(make_rows())
    assert first == to_bytes(make_rows())
    assert gzip.decompress(first) == gzip.decompress(BUNDLED.read_bytes())


def test_the_command_writes_the_file_and_finds_one_that_differs(tmp_path, monkeypatch, capsys):
    path = tmp_path / "pairs.jsonl.gz"
    monkeypatch.setattr(sys, "argv", ["generate", "--output", str(path)])
    assert main() == 0
    written = path.read_bytes()
    assert gzip.decompress(written) == gzip.decompress(BUNDLED.read_bytes())

    monkeypatch.setattr(sys, "argv", ["generate", "--check", "--output", str(path)])
    assert main() == 0
    changed = gzip.compress(gzip.decompress(written)[:-1])
    path.write_bytes(changed)
    assert main() == 1
    assert "not what the generator makes" in capsys.readouterr().err
    assert path.read_bytes() == changed


def test_every_cell_is_equally_full(splits):
    assert {split: len(rows) for split, rows in splits.items()} == SPLITS
    for split, rows in splits.items():
        cells = Counter((row["language"], row["kind"], row["length"]) for row in rows)
        assert len(cells) == len(LANGUAGES) * len(KINDS) * len(LENGTHS)
        assert set(cells.values()) == {SPLITS[split] // len(cells)}


def test_held_out_products_and_wordings_are_new(splits):
    products = {split: {row["product_id"] for row in rows} for split, rows in splits.items()}
    wordings = {split: {row["template_id"] for row in rows} for split, rows in splits.items()}
    assert sum(map(len, products.values())) == len(set.union(*products.values())) == sum(SPLITS.values())
    assert wordings["test"] <= wordings["train"]
    assert not wordings["train"] & wordings["test_templates"]


def test_rows_are_conversational_and_unique(rows):
    assert all(is_conversational(row) for row in rows)
    assert len({(row["prompt"][0]["content"], *texts(row)) for row in rows}) == len(rows)
    assert all(90 <= len(row["prompt"][0]["content"]) <= 450 for row in rows)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("group", ["all", *KINDS, *LANGUAGES])
def test_length_tells_nothing(splits, split, group):
    """The chosen answer is the longer one as often as not, and by nothing on average."""
    rows = [row for row in splits[split] if group in ("all", row["kind"], row["language"])]
    sizes = [tuple(map(len, texts(row))) for row in rows]
    longer = sum((chosen > rejected) + 0.5 * (chosen == rejected) for chosen, rejected in sizes) / len(sizes)
    assert 0.45 <= longer <= 0.55
    assert abs(sum(chosen - rejected for chosen, rejected in sizes)) < 0.015 * sum(chosen for chosen, _ in sizes)


def cut(text: str, spans: list[list[int]]) -> str:
    for start, end in reversed(spans):
        text = text[:start] + "\0" + text[end:]
    return text


def test_spans_hold_the_difference_and_all_of_it(rows):
    for row in rows:
        chosen, rejected = texts(row)
        ((start, end),), ((bad_start, bad_end),) = row["chosen_spans"], row["rejected_spans"]
        right, wrong = chosen[start:end], rejected[bad_start:bad_end]
        assert right != wrong
        if row["kind"] in ("attribute", "price"):
            assert right == row["answer"]["value"] or right == row["answer"]["price"]
            assert right in row["prompt"][0]["content"]
            assert cut(chosen, row["chosen_spans"]) == cut(rejected, row["rejected_spans"])
        else:
            assert (right, wrong) == (chosen, rejected)


def test_chosen_answers_pass_their_checks_and_rejected_ones_fail_their_own(rows):
    for row in rows:
        chosen, rejected = texts(row)
        assert check_answer(row, chosen)["all"], (chosen, check_answer(row, chosen))
        failed = {name for name, passed in check_answer(row, rejected).items() if not passed}
        if row["kind"] == "language":  # its facts are named in another language, so their check can't see them
            assert {"language", "all"} <= failed <= {"language", "attribute", "all"}
        else:
            assert failed == {row["kind"], "all"}, (rejected, failed)


@pytest.mark.parametrize("code", LANGUAGES)
def test_lexicons_are_parallel(code):
    words, english = lexicon(code), lexicon("en")
    assert {name: len(values) for name, values in words.values.items()} == {"colour": 8, "material": 8, "origin": 8}
    assert all(len(set(values)) == len(values) for values in words.values.values())
    assert len(words.nouns) == len(set(words.nouns)) == len(english.nouns)
    assert {kind: len(parts) for kind, parts in words.questions.items()} == dict.fromkeys(KINDS, 4)
    assert set(words.formats) == set(formats.FORMATS)
    for kind, parts in words.answers.items():
        assert len(parts) == 4
        assert all("{value}" in part and "{name}" in part for part in parts)
        assert kind == "price" or all("{label}" in part for part in parts)


@pytest.mark.parametrize(
    ("code", "amount", "written"),
    [
        ("en", 1234.5, "S$ 1,234.50"),
        ("id", 129000, "Rp129.000"),
        ("th", 1290, "฿1,290"),
        ("vi", 129000, "129.000₫"),
        ("ms", 29.9, "RM 29.90"),
        ("fil", 1299, "₱1,299.00"),
        ("pt", 1129.9, "R$ 1.129,90"),
    ],
)
def test_prices_are_written_as_shops_write_them(code, amount, written):
    assert lexicon(code).price(amount) == written


def test_checks_see_through_free_answers(splits):
    row = next(row for row in splits["test"] if row["kind"] == "price" and row["language"] == "en")
    right = row["answer"]["price"]
    assert check_answer(row, f"It is {right}, thank you.")["all"]
    assert not check_answer(row, f"It is {right}, or S$ 1.00.")["price"]
    assert not check_answer(row, "It is cheap.")["price"]
    row = next(row for row in splits["test"] if row["kind"] == "attribute" and row["language"] == "en")
    values = lexicon("en").values[row["answer"]["attribute"]]
    right, other = row["answer"]["value"], next(value for value in values if value != row["answer"]["value"])
    assert check_answer(row, f"The seller says {right.upper()}.")["attribute"]
    assert not check_answer(row, f"The seller says {right} or {other}.")["attribute"]
    assert not check_answer(row, f"The seller says pre{right}ed.")["attribute"]
    assert likely_languages("12 34") == set()


@pytest.mark.parametrize("name", formats.FORMATS)
@pytest.mark.parametrize("items", [2, 4])
def test_formats_are_told_apart(name, items):
    facts = {f"Label {i}": f"value {i},50" for i in range(items)}
    assert formats.recognise(formats.write(name, facts), items) == name
    assert formats.recognise(formats.write(name, facts), items + 1) is None
    assert formats.recognise("{not json", items) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "dev"}, "`split` must be among .*'train'.* got \\['dev'\\]"),
        ({"languages": ["en", "de"]}, "`languages` must be among .* got \\['de'\\]"),
        ({"kinds": ["length"]}, "`kinds` must be among .* got \\['length'\\]"),
        ({"languages": []}, "`languages` must be among .* got \\[\\]"),
    ],
)
def test_unknown_names_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_demo_preferences(**arguments)


def test_filters_keep_what_was_asked_for():
    rows = load_demo_preferences("test", languages=["th", "vi"], kinds=["price"])
    assert {(row["language"], row["kind"]) for row in rows} == {("th", "price"), ("vi", "price")}
    assert len(rows) == 18
