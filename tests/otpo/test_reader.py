"""One reader: every command takes every kind of source, draws by one rule, and refuses what a source can't honour."""

import bz2
import gzip
import lzma
from importlib.util import find_spec

import pytest
from datasets import Dataset, DatasetDict, IterableDataset, load_dataset
from trl import DatasetMixtureConfig, get_dataset

from moe_backbone.pretraining.documents import Source, SplitError, load_source, read_source
from otpo.cli import explain, pretrain
from otpo.cli.options import explained
from otpo.cli.pretraining.data import find_sources, read_documents
from otpo.cli.sft import _checked as check_instruction_rows
from otpo.data.files import SourceError
from otpo.data.loading import DataArguments, RowArguments, load_pairs, load_rows
from otpo.data.reader import read_splits, select_split
from otpo.data.source_kinds import BUNDLED, HELP, file_kind

NONE = DatasetMixtureConfig()
TEXTS = ["red", "blue", "42", "None"]
ROWS = [{"text": t, "prompt": t, "completion": "a", "chosen": "b", "rejected": "c"} for t in TEXTS]
KINDS = ["a.jsonl", "a.json", "a.csv", "a.parquet", "a.txt", "a.jsonl.gz", "a.json.bz2", "a.csv.xz", "a.txt.gz"]
KINDS += ["A.JSONL", "table", "tables", "folder"]
COMPRESS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, str]:
    """A source of each kind with the same rows; the .txt files have the texts alone."""
    folder = tmp_path_factory.mktemp("sources")
    table = Dataset.from_list(ROWS)
    table.save_to_disk(folder / "table")
    DatasetDict({"train": table, "test": table.select([1])}).save_to_disk(folder / "tables")
    (folder / "folder").mkdir()
    table.to_json(folder / "folder" / "train.jsonl")
    table.to_parquet(folder / "a.parquet")
    table.to_json(folder / "a.jsonl")
    table.to_json(folder / "a.json", lines=False)
    table.to_csv(folder / "a.csv")
    (folder / "a.txt").write_text("\n".join(TEXTS))
    (folder / "A.JSONL").write_bytes((folder / "a.jsonl").read_bytes())
    for name in KINDS:
        stem, _, ending = name.rpartition(".")
        if ending in COMPRESS:
            (folder / name).write_bytes(COMPRESS[ending]((folder / stem).read_bytes()))
    return {name: str(folder / name) for name in KINDS}


def by_align(path, streaming, **options):
    data = DataArguments(dataset_name=path, dataset_streaming=streaming, **options)
    return load_pairs(data, NONE, seed=0, evaluate=False)[0]


def by_sft(path, streaming, **options):
    data = RowArguments(dataset_name=path, dataset_streaming=streaming, **options)
    return load_rows(data, NONE, seed=0, evaluate=False, check=check_instruction_rows)[0]


def by_explain(path, streaming, **options):
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return explained.load_rows(
        explain.make_parser().parse_args(["--dataset_name", path, "--rows", "0", "1", "2", "3", *words])
    )[1]


def by_pretrain(path, streaming, **options):
    argv = ["--output_dir", "out", "--use_cpu", "--dataset_name", path]
    argv += [word for name, value in options.items() for word in (f"--{name}", str(value))]
    data = pretrain.make_parser().parse_args_into_dataclasses(argv, look_for_args_file=False)[0]
    return load_source(find_sources(data)[0][0], streaming, seed=0, read=read_documents)


def by_a_mixture_of_documents(path, streaming, **options):
    return load_source(Source(path=path, **options), streaming, read=read_documents)


def by_the_backbones_own_reader(path, streaming, **options):
    return load_source(Source(path=path, **options), streaming)


def by_a_mixture_of_rows(path, streaming, **options):
    mixture = DatasetMixtureConfig(datasets=[{"path": path, **options}], streaming=streaming)  # pyright: ignore
    return load_rows(RowArguments(), mixture, seed=0, evaluate=False)[0]


READERS = [by_align, by_sft, by_explain, by_pretrain, by_a_mixture_of_documents, by_a_mixture_of_rows]
READERS += [by_the_backbones_own_reader]
NEEDS_COLUMNS = {by_align: "lacks the column", by_sft: "Instructions need", by_explain: "lacks the column"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("read", READERS, ids=lambda read: read.__name__)
def test_every_command_reads_every_kind(read, kind, sources):
    for streaming in (False, True):
        if ".txt" in kind and read in NEEDS_COLUMNS:
            with pytest.raises(ValueError, match=rf"{NEEDS_COLUMNS[read]}.*|\['text'\]"):
                list(read(sources[kind], streaming))
            continue
        rows = read(sources[kind], streaming)
        assert isinstance(rows, IterableDataset if streaming and read is not by_explain else Dataset)
        # The plain reader takes the numbers and missing values of a CSV file as such.
        expected = [*TEXTS[:3], None] if read is by_the_backbones_own_reader and ".csv" in kind else TEXTS
        assert [row["text"] for row in rows] == expected


@pytest.mark.parametrize("read", READERS, ids=lambda read: read.__name__)
def test_every_command_takes_parts_of_splits(read, sources):
    if read is by_explain:
        return  # it names the rows themselves
    option = "dataset_train_split" if read in (by_align, by_sft, by_pretrain) else "split"
    for kind in ("a.jsonl", "tables"):
        if read is by_the_backbones_own_reader and kind == "tables":
            continue
        rows = read(sources[kind], False, **{option: "train[1:3]"})
        assert [row["text"] for row in rows] == TEXTS[1:3]
    if read is not by_the_backbones_own_reader:
        with pytest.raises(ValueError, match=r"a stream has no parts such as 'train\[:50%\]'"):
            read(sources["a.jsonl"], True, **{option: "train[:50%]"})


def test_parts_are_those_of_datasets(sources):
    splits = read_splits(sources["tables"])
    assert select_split(splits, "train[:2]+test")["text"] == [*TEXTS[:2], TEXTS[1]]
    for part in ("train[:30%]", "train[-1:]", "train[25%:]"):
        expected = load_dataset("json", data_files={"train": sources["a.jsonl"]}, split=part)
        assert select_split(splits, part)["text"] == expected["text"]
    assert select_split(splits, "all")["text"] == [*TEXTS, TEXTS[1]]
    with pytest.raises(SourceError, match="no part of a split"):
        select_split(splits, "train[a:b]")


def test_names_that_datasets_can_not_parse_have_parts(tmp_path):
    table = Dataset.from_list(ROWS)
    DatasetDict({"my-split": table, "my-split-2": table.select([1])}).save_to_disk(tmp_path)
    splits = read_splits(str(tmp_path))
    assert select_split(splits, "all")["text"] == [*TEXTS, TEXTS[1]]
    assert select_split(splits, "my-split[1:3] + my-split-2")["text"] == [*TEXTS[1:3], TEXTS[1]]
    assert select_split(splits, "my-split[:50%]")["text"] == TEXTS[:2]
    with pytest.raises(SourceError, match=r"'my-split\[a:b\]' is no part of a split"):
        select_split(splits, "my-split[a:b]")


def test_text_is_looked_at_where_no_documents_are_read(tmp_path):
    path = tmp_path / "a.jsonl"
    row = b'{"prompt": "a", "chosen": "b", "rejected": "c", "text": "d"}\n'
    path.write_bytes(row * 4 + row.replace(b'"c"', b'"\xff"'))
    for read in (by_align, by_explain):
        with pytest.raises(ValueError, match="line 5 is no UTF-8 text"):
            read(str(path), False)
    for read in (by_pretrain, by_a_mixture_of_documents, by_a_mixture_of_rows):
        assert len(read(str(path), False)) == 5


@pytest.mark.parametrize("streaming", [False, True])
def test_one_rule_draws_the_rows_of_all_commands(tmp_path, streaming):
    path = str(tmp_path / "a.jsonl")
    Dataset.from_list([{**ROWS[0], "text": str(number)} for number in range(60)]).to_json(path)
    drawn = [
        [row["text"] for row in rows]
        for rows in (
            by_align(path, streaming, max_train_rows=8),
            by_align(path, streaming, max_train_pairs=8),
            by_sft(path, streaming, max_train_rows=8),
            by_pretrain(path, streaming, max_train_rows=8),
            load_source(Source(path=path, max_documents=8, shuffle=True), streaming, seed=0),
        )
    ]
    assert len(set(drawn[0])) == 8 and drawn[0] != [str(number) for number in range(8)]
    assert all(texts == drawn[0] for texts in drawn)


@pytest.mark.parametrize("read", [by_align, by_sft, by_explain], ids=lambda read: read.__name__)
@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("a.jsonl", {"dataset_config": "en"}, "a file has no configurations, and `dataset_config` is 'en'. Leave it"),
        ("table", {"dataset_config": "en"}, "a saved dataset has no configurations, and `dataset_config` is 'en'"),
        ("a.jsonl", {"dataset_train_split": "none"}, "`dataset_train_split='none'`: .* ['train']. Set `dataset_train"),
        ("tables", {"dataset_train_split": "none"}, "`dataset_train_split='none'`: .* ['test', 'train']. Set"),
        ("otpo/demo", {"dataset_config": "many"}, "`dataset_config='many'`: of `otpo/demo` it is the number of pairs"),
        ("a.jsonl.7z", {}, "`dataset_name='.*/a.jsonl.7z'` is no local file or folder"),
        ("a.parquet.gz", {}, "`dataset_name`: the file .*/a.parquet.gz is of no kind that is read here"),
        ("a.csv.bz2", {}, "`dataset_name`: the file .*/a.csv.bz2 does not exist. Name one that does: .jsonl"),
    ],
)
def test_what_a_source_can_not_honour(read, kind, options, message, sources):
    pattern = message.replace("[", r"\[").replace("]", r"\]")
    path = kind if kind in BUNDLED else sources.get(kind, sources["a.txt"].replace("a.txt", kind))
    with pytest.raises(ValueError, match=pattern):
        read(path, False, **options)


@pytest.mark.parametrize("read", [by_pretrain, by_a_mixture_of_documents, by_the_backbones_own_reader])
def test_what_a_source_of_documents_can_not_honour(read, sources):
    split, config = ("dataset_train_split", "dataset_config") if read is by_pretrain else ("split", "config")
    for kind in ("a.jsonl", "table", "tables"):
        with pytest.raises(SplitError, match=r"Source .* \(split none\) can't be read: .*'train'\]"):
            read(sources[kind], False, **{split: "none"})
        with pytest.raises(ValueError, match=r"no configurations, and `config` is 'en'\. Leave it out"):
            read(sources[kind], False, **{config: "en"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset_config": "en"}, "`dataset_config=en` goes with `dataset_name`. Of a mixture set `name`"),
        ({"dataset_train_split": "test"}, "`dataset_train_split=test` goes with `dataset_name`. .* `split`"),
        ({"dataset_test_split": "dev"}, "`dataset_test_split=dev` goes with `dataset_name`. .* `test_split_size`"),
        ({"dataset_streaming": True}, "`dataset_streaming=True` goes with `dataset_name`. .* `streaming`"),
        ({"dataset_name": "a.jsonl"}, "Both `dataset_name='a.jsonl'` and `datasets` name the data"),
    ],
)
def test_options_of_a_name_beside_a_mixture_of_rows(options, message, sources):
    mixture = DatasetMixtureConfig(datasets=[{"path": sources["a.jsonl"]}])  # pyright: ignore
    with pytest.raises(ValueError, match=message):
        load_rows(RowArguments(**options), mixture, seed=0, evaluate=False)


def test_options_of_a_mixture_beside_a_name(sources):
    with pytest.raises(ValueError, match="`streaming` goes with a mixture"):
        load_rows(
            RowArguments(dataset_name=sources["a.jsonl"]), DatasetMixtureConfig(streaming=True), seed=0, evaluate=False
        )


def test_a_mixture_of_rows_is_that_of_trl(sources):
    by_builder = {"path": "json", "data_files": sources["a.jsonl"], "columns": ["prompt", "chosen"]}
    halves = [{**by_builder, "fraction": 0.75}, {**by_builder, "split": "train[1:]", "fraction": 0.25}]
    for part in ([by_builder, by_builder], halves):
        expected = get_dataset(DatasetMixtureConfig(datasets=[dict(source) for source in part]))["train"]  # pyright: ignore
        for path in ("json", "a.jsonl", "table"):
            own = [{**source, "path": sources.get(path, path)} for source in part]
            for source in own if path != "json" else ():
                del source["data_files"]
            mixture = DatasetMixtureConfig(datasets=own)  # pyright: ignore
            rows, test = load_rows(RowArguments(), mixture, seed=0, evaluate=False)
            assert rows.to_list() == expected.to_list() and test is None
    for source, message in (
        ({"path": "otpo/demo", "split": "all"}, r"`datasets=otpo/demo` can't be read: it has the split\(s\)"),
        ({"path": sources["a.csv"], "name": "en"}, "`datasets=.*a file has no configurations, and `name` is 'en'"),
        ({"path": "/nowhere.jsonl"}, "`datasets`: the file /nowhere.jsonl does not exist"),
    ):
        with pytest.raises(ValueError, match=message):
            load_rows(RowArguments(), DatasetMixtureConfig(datasets=[source]), seed=0, evaluate=False)  # pyright: ignore


def test_a_cut_of_a_mixture_is_by_the_seed(sources):
    def cut(seed, evaluate=True):
        mixture = DatasetMixtureConfig(datasets=[{"path": "otpo/demo"}], test_split_size=20)  # pyright: ignore
        train, test = load_rows(RowArguments(), mixture, seed=seed, evaluate=evaluate)
        assert len(train) == 1492
        return None if test is None else [row["product_id"] for row in test]

    assert cut(0) == cut(0) != cut(1) and cut(0, evaluate=False) is None
    with pytest.raises(ValueError, match="Cut one with `test_split_size`, or leave evaluation out"):
        load_rows(
            RowArguments(),
            DatasetMixtureConfig(datasets=[{"path": sources["a.jsonl"]}]),  # pyright: ignore
            seed=0,
            evaluate=True,
        )


def test_bundled_names_are_the_same_everywhere():
    count = {"dataset_config": "5"}
    assert len(by_align("otpo/demo", False, **count)) == len(by_explain("otpo/demo", False, **count)) + 1 == 5
    assert len(by_sft("otpo/demo-instructions", False, **count)) == 5
    for read, option in ((by_pretrain, "dataset_config"), (by_a_mixture_of_documents, "config")):
        documents = read("otpo/demo-corpus", False, **{option: "5"})
        assert (
            documents["text"]
            == load_rows(RowArguments(dataset_name="otpo/demo-corpus", **count), NONE, seed=0, evaluate=False)[0][
                "text"
            ]
        )
    held_out = by_a_mixture_of_documents("otpo/demo-corpus", True, config=7, split="test")
    assert isinstance(held_out, IterableDataset) and len(list(held_out)) == 7
    assert len(by_a_mixture_of_documents("otpo/demo-corpus", False, config=7, split="train[:3]")) == 3
    for name in BUNDLED:  # the number is of the split that is read, be it a test split
        for split in ("train", "test"):
            data = RowArguments(dataset_name=name, dataset_config="5", dataset_train_split=split)
            assert len(load_rows(data, NONE, seed=0, evaluate=False)[0]) == 5
    with pytest.raises(ValueError, match=r"its split 'test' has 252 rows, fewer than 300\. Ask for fewer"):
        by_sft("otpo/demo-instructions", False, dataset_config="300", dataset_train_split="test")


@pytest.mark.parametrize("read", [by_pretrain, by_a_mixture_of_documents, by_a_mixture_of_rows])
def test_documents_of_a_stream_are_written_while_they_are_read(read, monkeypatch):
    made = []

    def make(index, *args):
        made.append(index)
        return {"text": str(index)}

    monkeypatch.setattr("otpo.data.ecommerce.new_documents.make_document", make)
    rows = read("otpo/demo-corpus", True)
    assert isinstance(rows, IterableDataset) and rows.num_shards == 64
    assert next(iter(rows)) and len(made) < 20  # a mixture of rows looks at five for their columns


def test_both_names_of_a_number_of_rows():
    with pytest.raises(ValueError, match=r"Both `max_eval_rows=3` and `max_eval_pairs=4`, its older name, are set"):
        DataArguments(max_eval_rows=3, max_eval_pairs=4)
    for name in ("max_train_rows", "max_eval_rows"):
        with pytest.raises(ValueError, match=f"`{name}` must be at least 1, got 0"):
            DataArguments(**{name: 0})
    assert DataArguments(max_train_pairs=3, max_eval_rows=4).limits == (3, 4)


@pytest.mark.skipif(find_spec("zstandard") is not None, reason="what is said where zstandard is missing")
def test_zstd_needs_a_package(tmp_path):
    (tmp_path / "a.jsonl.zst").write_bytes(b"")
    assert file_kind("a.jsonl.zst") == ("json", "zstd")
    with pytest.raises(ValueError, match="`pip install zstandard`"):
        by_align(str(tmp_path / "a.jsonl.zst"), False)


def test_one_help_for_the_options_of_data(capsys):
    for command in ("align", "sft", "pretrain", "explain"):
        module = __import__(f"otpo.cli.{command}", fromlist=["make_parser"])
        actions = {action.dest: action.help for action in module.make_parser()._actions}
        shared = [name for name in HELP if name in actions]
        assert {"dataset_name", "dataset_config", "dataset_train_split"} <= set(shared)
        for name in shared:
            text = HELP[name]
            assert actions[name] == (text if command != "explain" else text[0].lower() + text[1:].rstrip("."))
        assert command == "explain" or shared == list(HELP)


@pytest.mark.parametrize("name", ["a.doc", "a.txt.7z", "a", "a.gz", "a.parquet.gz"])
def test_kinds_that_are_not_read(name, tmp_path):
    assert file_kind(name) is None
    (tmp_path / name).write_text("red")
    with pytest.raises(ValueError, match=rf"`dataset_name`: the file .*{name} is of no kind that is read here"):
        by_align(str(tmp_path / name), False)
    for read in (read_documents, read_source):
        with pytest.raises(ValueError, match=r"it is of no kind that is read here: \.jsonl, \.json"):
            read(Source(path=str(tmp_path / name)), False)
