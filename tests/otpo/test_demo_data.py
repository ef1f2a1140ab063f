import gzip
import re
import sys
from collections import Counter

import pytest
from trl.data_utils import is_conversational

from otpo.data import load_demo_corpus, load_demo_instructions, load_demo_preferences
from otpo.data.ecommerce import formats
from otpo.data.ecommerce.answers import check_answer, likely_languages
from otpo.data.ecommerce.generate import BUNDLED, main, make_rows, to_bytes
from otpo.data.ecommerce.lexicon import LANGUAGES, lexicon
from otpo.data.ecommerce.make_pairs import KINDS, LENGTHS

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
        ({"count": 0}, "`count` must be at least 1, got 0. Leave it out for the bundled pairs"),
    ],
)
def test_unknown_names_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_demo_preferences(**arguments)


def test_filters_keep_what_was_asked_for():
    rows = load_demo_preferences("test", languages=["th", "vi"], kinds=["price"])
    assert {(row["language"], row["kind"]) for row in rows} == {("th", "price"), ("vi", "price")}
    assert len(rows) == 18


# Pairs of any number


@pytest.mark.parametrize("split", SPLITS)
def test_more_pairs_are_like_the_bundled_ones(splits, split):
    count = len(splits[split]) + 500
    rows = list(load_demo_preferences(split, count=count))
    assert rows[: len(splits[split])] == splits[split]
    new = rows[len(splits[split]) :]
    assert len(new) == 500
    assert new == list(load_demo_preferences(split, count=count))[len(splits[split]) :]
    assert new != list(load_demo_preferences(split, count=count, seed=1))[len(splits[split]) :]
    bundled = {row["template_id"] for row in splits[split]}
    for row in new:
        assert check_answer(row, texts(row)[0])["all"]
        assert row["template_id"] in bundled
    unseen = [row for row in new if check_answer(row, texts(row)[1])[row["kind"]]]
    assert len(unseen) <= 2  # short answers of nothing but words that Malay and Indonesian share
    assert {(row["kind"], row["language"]) for row in unseen} <= {("language", "ms"), ("language", "id")}
    for kind in KINDS:
        lengths = [len(texts(row)[0]) - len(texts(row)[1]) for row in new if row["kind"] == kind]
        assert abs(sum(lengths) / len(lengths)) < 3


def test_no_product_of_a_test_pair_is_trained_on(rows):
    trained = {row["product_id"] for row in load_demo_preferences("train", count=3000)}
    trained |= {row["product_id"] for row in load_demo_instructions("train", count=3000)}
    for split in ("test", "test_templates"):
        assert not trained & {row["product_id"] for row in load_demo_preferences(split, count=1000)}


def test_fewer_pairs_are_the_first_ones(splits):
    assert list(load_demo_preferences("test", count=7)) == splits["test"][:7]
    assert len(load_demo_preferences("test", ["th"], ["price"], count=40)) == 40


# Instructions


@pytest.fixture(scope="module")
def instructions():
    return list(load_demo_instructions("train", count=4000))


def prompt(row) -> str:
    return row["messages"][0]["content"]


@pytest.mark.parametrize("split", SPLITS)
def test_instructions_are_the_bundled_prompts_with_their_chosen_answers(splits, split):
    rows = load_demo_instructions(split)
    assert len(rows) == SPLITS[split]
    for row, pair in zip(rows, splits[split], strict=True):
        assert row["messages"] == pair["prompt"] + pair["chosen"]
        assert row["answer"] == pair["answer"] and row["template_id"] == pair["template_id"]
    assert not {"prompt", "chosen", "rejected"} & set(rows.column_names)


def test_more_instructions_are_right_and_equally_many_of_each_kind(splits, instructions):
    assert len(instructions) == 4000
    assert [prompt(row) for row in instructions[:1512]] == [row["prompt"][0]["content"] for row in splits["train"]]
    assert all(check_answer(row, row["messages"][1]["content"])["all"] for row in instructions)
    cells = Counter((row["language"], row["kind"], row["length"]) for row in instructions)
    assert len(cells) == 84 and max(cells.values()) - min(cells.values()) <= 1
    asked = Counter(row["answer"]["format"] for row in instructions if row["kind"] == "format")
    assert set(asked) == set(formats.FORMATS) and max(asked.values()) < 1.1 * min(asked.values())
    assert len({prompt(row) for row in instructions}) == len(instructions)


def test_no_instruction_gives_a_test_away(splits, instructions):
    """Neither listing and question, nor product, of a test split; no wording that is held out."""
    held_out = [row for split in ("test", "test_templates") for row in splits[split]]
    trained = {prompt(row) for row in instructions}
    assert not trained & {row["prompt"][0]["content"] for row in held_out}
    listings = {text.split("\n\n")[0] for text in trained}
    assert not listings & {row["prompt"][0]["content"].split("\n\n")[0] for row in held_out}
    assert not {row["product_id"] for row in instructions} & {row["product_id"] for row in held_out}
    wordings = {row["template_id"] for row in instructions}
    assert wordings == {row["template_id"] for row in splits["train"]}
    assert not wordings & {row["template_id"] for row in splits["test_templates"]}


def test_instructions_depend_on_seed_and_place_alone(instructions):
    again = load_demo_instructions("train", count=2000)
    assert [prompt(row) for row in again] == [prompt(row) for row in instructions[:2000]]
    other = load_demo_instructions("train", count=2000, seed=1)
    assert not {prompt(row) for row in other.select(range(1512, 2000))} & {prompt(row) for row in instructions}
    thai = load_demo_instructions("train", languages=["th"], count=300)
    assert len(thai) == 300 and set(thai["language"]) == {"th"}
    assert len(load_demo_instructions("train", count=7)) == 7


# Documents


@pytest.fixture(scope="module")
def corpus():
    return load_demo_corpus("train", 600)


def test_documents_hold_every_kind_and_language(corpus):
    assert len(corpus) == 600 and len(set(corpus["text"])) == 600
    kinds, languages = Counter(corpus["kind"]), Counter(corpus["language"])
    assert set(kinds) == {"listings", "prose", "questions", "lists", "conversions"}
    assert set(languages) == set(LANGUAGES)
    assert min(kinds.values()) > 30 and min(languages.values()) > 50
    assert all("<|" not in text and "\0" not in text and "{label}" not in text for text in corpus["text"])


def test_streamed_documents_are_the_same_in_any_number_of_shards(corpus):
    stream = load_demo_corpus("train", 600, streaming=True)
    texts = [row["text"] for row in stream]
    assert texts == corpus["text"][:]
    shards = [stream.shard(num_shards=3, index=index) for index in range(3)]
    assert sorted(row["text"] for shard in shards for row in shard) == sorted(texts)
    assert load_demo_corpus("train", 5)["text"][:] == texts[:5]
    assert load_demo_corpus("train", 5, seed=1)["text"][:] != texts[:5]
    assert next(iter(load_demo_corpus("train", 10**12, streaming=True)))["text"] == texts[0]


def test_documents_hold_out_products_and_wordings(splits, corpus):
    names = {row["product_id"] for rows in splits.values() for row in rows}
    held_out = load_demo_corpus("test", 600)
    found = {
        split: set(re.findall(r"[A-Z][a-z]+ [A-M]\d{4}\b", "\n".join(rows["text"])))
        for split, rows in (("train", corpus), ("test", held_out))
    }
    assert all(len(products) > 500 and not products & names for products in found.values())
    assert not found["train"] & found["test"]
    wordings = [lexicon(code).questions["price"][3] for code in LANGUAGES]
    assert not any(wording in text for wording in wordings for text in corpus["text"])


def test_documents_in_some_languages_only():
    assert set(load_demo_corpus("test", 40, languages=["vi", "pt"])["language"]) == {"vi", "pt"}


@pytest.mark.parametrize(
    ("load", "arguments", "message"),
    [
        (load_demo_instructions, {"split": "dev"}, "`split` must be among .*'test_templates'.* got \\['dev'\\]"),
        (load_demo_instructions, {"languages": ["de"], "count": 3}, "`languages` must be among .* got \\['de'\\]"),
        (
            load_demo_instructions,
            {"split": "test", "count": 3},
            "`count` must be .* of split 'train', got 3 of 'test'",
        ),
        (load_demo_instructions, {"count": 0}, "`count` must be at least 1"),
        (load_demo_corpus, {"split": "test_templates"}, "`split` must be among \\['train', 'test'\\]"),
        (load_demo_corpus, {"languages": []}, "`languages` must be among"),
        (load_demo_corpus, {"count": 0}, "`count` must be at least 1, got 0"),
    ],
)
def test_what_instructions_and_documents_refuse(load, arguments, message):
    with pytest.raises(ValueError, match=message):
        load(**arguments)
