"""Mixtures: stages and sources in YAML, drawn by weight, with faults that name the source and the row."""

import gzip
from collections import Counter
from pathlib import Path

import pytest
import yaml
from datasets import Dataset, DatasetDict, IterableDataset

from moe_backbone import preset
from moe_backbone.pretraining.documents import Mixture, Source, SplitError, Stage, load_mixture, read_mixture


def write(path, documents, column="text"):
    Dataset.from_dict({column: documents}).to_json(path)
    return str(path)


def write_mixture(tmp_path, content):
    path = tmp_path / "mixture.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


STAGE = {"name": "one", "steps": 3, "sequence_length": 8, "learning_rate": 1e-3, "sources": [{"path": "a.jsonl"}]}


def test_reading(tmp_path):
    content = {"streaming": True, "evaluation": [{"path": "b.jsonl"}], "stages": [STAGE, {**STAGE, "name": "two"}]}
    mixture = read_mixture(write_mixture(tmp_path, content))
    assert mixture == Mixture(
        stages=[
            Stage(name=name, steps=3, sequence_length=8, learning_rate=1e-3, sources=[Source(path="a.jsonl")])
            for name in ("one", "two")
        ],
        evaluation=[Source(path="b.jsonl")],
        streaming=True,
    )
    assert mixture.stage("two").name == "two"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (["stages"], "a YAML mapping with a list `stages`"),
        ({"stages": []}, "a YAML mapping with a list `stages`"),
        ({"stages": [STAGE], "stream": True}, r"a mixture has no \['stream'\]"),
        ({"stages": [{**STAGE, "lr": 1}]}, r"a stage has no \['lr'\]; there are \['name', 'steps'"),
        ({"stages": [{k: v for k, v in STAGE.items() if k != "steps"}]}, "a stage is incomplete: .*'steps'"),
        ({"stages": [{**STAGE, "steps": 0}]}, r"`stages\[0\].steps` must be at least 1, got 0"),
        ({"stages": [{**STAGE, "sources": []}]}, r"`stages\[0\].sources` must not be empty"),
        ({"stages": [{**STAGE, "sources": [{"path": "a", "weight": 0}]}]}, r"sources\[0\].weight` must be above 0"),
        ({"stages": [{**STAGE, "sources": [{"file": "a"}]}]}, r"a source has no \['file'\]"),
        ({"stages": [STAGE, STAGE]}, r"`stages\[1\].name` is 'one', but two stages have the same `name`"),
        (None, "a YAML mapping with a list `stages`, got None"),
        ({"stages": {"one": STAGE}}, "`stages` must be a list, got {'one'"),
        ({"stages": [STAGE, "two"]}, r"`stages\[1\]`: a stage must be a mapping with .*, got 'two'"),
        ({"stages": [STAGE], "evaluation": None}, "`evaluation` must be a list, got None"),
        ({"stages": [STAGE], "streaming": "no"}, "`streaming` must be true or false, got 'no'"),
        ({"stages": [{**STAGE, "sorces": []}]}, "Did you mean `sources`"),
        ({"stages": [{**STAGE, 3: 4}]}, r"a stage has no \[3\]"),
    ],
)
def test_what_a_mixture_may_not_be(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        read_mixture(write_mixture(tmp_path, content))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 2.5}, "steps` must be a whole number, got 2.5"),
        ({"steps": True}, "steps` must be a whole number, got True"),
        ({"sequence_length": 1}, "sequence_length` must be at least 2, got 1"),
        ({"learning_rate": -1}, "learning_rate` must be at least 0, got -1"),
        ({"learning_rate": float("nan")}, "learning_rate` must be a finite number, got nan"),
        ({"learning_rate": None}, "learning_rate` must be a number, got None"),
        ({"learning_rate": "high"}, "learning_rate` must be a number, got 'high'"),
        ({"warmup_steps": 1.5}, "warmup_steps` must be whole, or below 1 for a share, got 1.5"),
        ({"name": "../x"}, "name` must be letters, digits and .* got '../x'"),
        ({"name": ""}, "name` must not be empty"),
        ({"name": 1}, "name` must be text, got 1"),
        ({"name": "a "}, "name` must be letters, digits and .* got 'a '"),
        (
            {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"least": 0.1}},
            "lr_scheduler_kwargs` can't be used with cosine: .* unexpected keyword argument 'least'",
        ),
        (
            {"lr_scheduler_type": "cosine_with_min_lr"},
            "lr_scheduler_kwargs` can't be used with cosine_with_min_lr: One of min_lr or min_lr_rate should be set",
        ),
        (
            {"lr_scheduler_type": "constant", "lr_scheduler_kwargs": {"min_lr": 0.1}},
            "lr_scheduler_kwargs` can't be used with constant: constant takes no arguments",
        ),
        (
            {"lr_scheduler_type": "cosin"},
            "lr_scheduler_type` must be one of linear, .* got 'cosin'. Did you mean 'cos",
        ),
        ({"rope_parameters": "yarn"}, "rope_parameters` must be a mapping or left out, got 'yarn'"),
        ({"rope_parameters": {"rope_type": "yarnn"}}, "rope_parameters` can't be used: .* got 'yarnn'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters` can't be used: .*'factor'"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size` must be at least 1"),
        ({"sources": None}, "sources` must be a list, got None"),
        ({"sources": "file.jsonl"}, "sources` must be a list, got 'file.jsonl'"),
        ({"sources": ["file.jsonl"]}, r"sources\[0\]`: a source must be a mapping"),
        (
            {"sources": [{"path": "a", "weight": float("inf")}]},
            r"sources\[0\].weight` must be a finite number, got inf",
        ),
        ({"sources": [{"path": "a", "weight": False}]}, r"sources\[0\].weight` must be a number, got False"),
        (
            {"sources": [{"path": "a"}, {"path": "b", "max_documents": -1}]},
            r"sources\[1\].max_documents` must be at l",
        ),
        ({"sources": [{"path": " "}]}, r"sources\[0\].path` must not be empty"),
    ],
)
def test_what_a_field_may_not_hold(tmp_path, changes, message):
    path = write_mixture(tmp_path, {"stages": [{**STAGE, "name": "zero"}, {**STAGE, **changes}]})
    with pytest.raises(ValueError, match=rf"^`mixture={path}`: `stages\[1\].{message}[^\n]*$"):
        read_mixture(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"stages:\n  - name: [one\n", "it is not YAML: line 3, column 1: "),
        (b"streaming: true\nstreaming: false\nstages: []\n", "line 2, column 1: the key 'streaming' stands twice"),
        (b"stages: " + b"[" * 3000, "it is nested too deep"),
        (b"stages: \xff\n", r"it is not UTF-8 text \(.* at byte 8\)"),
        (b"stages: \x00\n", "it is not YAML: unacceptable character"),
        (b"", "a YAML mapping with a list `stages`, got None"),
    ],
)
def test_a_file_that_is_no_mapping_says_where(tmp_path, text, message):
    path = tmp_path / "mixture.yaml"
    path.write_bytes(text)
    with pytest.raises(ValueError, match=rf"^`mixture={path}`: .*{message}[^\n]*$"):
        read_mixture(str(path))
    with pytest.raises(ValueError, match="it is a folder"):
        read_mixture(str(tmp_path))


def test_numbers_that_yaml_takes_for_text(tmp_path):
    path = tmp_path / "mixture.yaml"
    path.write_text(yaml.safe_dump({"stages": [STAGE]}).replace("learning_rate: 0.001", "learning_rate: 3e-4"))
    assert read_mixture(str(path)).stages[0].learning_rate == 3e-4


def test_a_missing_file_and_a_missing_stage(tmp_path):
    with pytest.raises(ValueError, match=r"mixture=nowhere.yaml`: there is no such file"):
        read_mixture("nowhere.yaml")
    with pytest.raises(ValueError, match=r"stage=three`: the mixture has \['one'\]"):
        read_mixture(write_mixture(tmp_path, {"stages": [STAGE]})).stage("three")


@pytest.mark.parametrize("streaming", [False, True])
def test_documents_come_by_weight_and_end_with_the_end_token(tmp_path, tokenizer, streaming):
    sources = [
        Source(path=write(tmp_path / "a.jsonl", ["red shirt"] * 300), weight=3),
        Source(path=write(tmp_path / "b.jsonl", ["blue box"] * 300, "body"), weight=1, text_column="body"),
    ]
    documents = load_mixture(sources, tokenizer, len(tokenizer), streaming=streaming, seed=0)
    assert isinstance(documents, IterableDataset if streaming else Dataset)
    ids = [row["input_ids"] for row in documents]
    assert all(row[-1] == tokenizer.eos_token_id for row in ids)
    drawn = Counter(tokenizer.decode(row[:-1]) for row in ids[:400])
    assert drawn.keys() == {"red shirt", "blue box"}
    assert 260 < drawn["red shirt"] < 340  # 300 expected, standard deviation 8.7
    again = load_mixture(sources, tokenizer, len(tokenizer), streaming=streaming, seed=0)
    assert [row["input_ids"] for row in again] == ids


def test_all_kinds_of_sources(tmp_path, tokenizer):
    Dataset.from_dict({"text": ["red", "blue"]}).save_to_disk(tmp_path / "saved")
    Dataset.from_dict({"text": ["red", "blue"]}).to_parquet(tmp_path / "a.parquet")
    (tmp_path / "a.txt").write_text("red\nblue\n")
    paths = [str(tmp_path / name) for name in ("saved", "a.parquet", "a.txt")]
    for source in [Source(path=path) for path in paths] + [Source(path="ours")]:
        bundled = {"ours": lambda source: Dataset.from_dict({"text": ["red", "blue"]})}
        for streaming in (False, True):
            rows = load_mixture([source], tokenizer, len(tokenizer), streaming=streaming, seed=0, bundled=bundled)
            assert [tokenizer.decode(row["input_ids"][:-1]) for row in rows] == ["red", "blue"]
    for count in (1, 5):
        source = Source(path=paths[0], max_documents=count)
        assert len(load_mixture([source], tokenizer, 400, streaming=False, seed=0)) == min(count, 2)
    Dataset.from_dict({"text": ["red", "blue"]}).to_csv(tmp_path / "a.csv")
    with gzip.open(tmp_path / "a.json.gz", "wt") as file:
        file.write('{"text": "red"}\n{"text": "blue"}\n')
    for name in ("a.csv", "a.json.gz"):
        source = Source(path=str(tmp_path / name))
        assert len(load_mixture([source], tokenizer, 400, streaming=False, seed=0)) == 2


@pytest.mark.parametrize("streaming", [False, True])
def test_documents_drawn_by_the_seed(tmp_path, tokenizer, streaming):
    path = write(tmp_path / "a.jsonl", [[number, number] for number in range(100)], "input_ids")

    def draw(seed, **changes):
        source = Source(path=path, max_documents=10, **changes)
        rows = load_mixture([source], tokenizer, 400, streaming=streaming, seed=seed)
        return [row["input_ids"][0] for row in rows]

    assert draw(0) == list(range(10))
    drawn = draw(0, shuffle=True)
    assert len(set(drawn)) == 10 and drawn != list(range(10)) and drawn == draw(0, shuffle=True)
    assert drawn != draw(1, shuffle=True)


def test_a_split_that_a_source_does_not_have(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", ["red", "blue"])
    table = Dataset.from_dict({"text": ["red", "blue"]})
    table.save_to_disk(tmp_path / "table")
    DatasetDict({"train": table, "validation": table}).save_to_disk(tmp_path / "tables")
    (tmp_path / "folder").mkdir()
    table.to_json(tmp_path / "folder/train.jsonl")

    def load(path, split, streaming):
        source = Source(path=str(path), split=split)
        return list(load_mixture([source], tokenizer, 400, streaming=streaming, seed=0))

    for streaming in (False, True):
        for place in (path, tmp_path / "table", tmp_path / "tables", tmp_path / "folder"):
            assert len(load(place, "train", streaming)) == 2
            with pytest.raises(SplitError, match=r"\(split test\) can't be read: .*'train'"):
                load(place, "test", streaming)
        assert len(load(tmp_path / "tables", "validation", streaming)) == 2
    assert len(load(path, "train[:50%]", False)) == 1


def test_a_column_that_is_named_is_the_one_that_is_read(tmp_path, tokenizer):
    rows = Dataset.from_dict({"input_ids": [[1, 2, 3]], "body": ["red"]})
    rows.to_json(tmp_path / "a.jsonl")
    for column, length in ((None, 3), ("input_ids", 3), ("body", 2)):
        source = Source(path=str(tmp_path / "a.jsonl"), text_column=column)
        assert len(load_mixture([source], tokenizer, 400, streaming=False, seed=0)[0]["input_ids"]) == length


@pytest.mark.parametrize("streaming", [False, True])
def test_documents_with_nothing_to_predict_are_left_out(tmp_path, tokenizer, caplog, streaming):
    path = write(tmp_path / "a.jsonl", [[1], [2, 3], [4], [5, 6, 7]], "input_ids")
    rows = list(load_mixture([Source(path=path)], tokenizer, 60, streaming=streaming, seed=0))
    assert [row["input_ids"] for row in rows] == [[2, 3], [5, 6, 7]]
    assert ("2 of 4 documents are left out, of one token each" in caplog.text) != streaming
    path = write(tmp_path / "b.jsonl", [[1], [2]], "input_ids")
    with pytest.raises(ValueError, match="has no document of two tokens or more"):
        load_mixture([Source(path=path)], tokenizer, 60, streaming=streaming, seed=0)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("empty", ["", "  \n", None])
def test_an_empty_document_names_source_and_row(tmp_path, tokenizer, empty, streaming):
    path = write(tmp_path / "a.jsonl", ["red", "blue", empty])
    with pytest.raises(ValueError, match=r"Row 2 of source .*a\.jsonl is an empty document"):
        list(load_mixture([Source(path=path)], tokenizer, 400, streaming=streaming, seed=0))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_a_dataset_that_was_saved_with_a_format_is_read(tmp_path, tokenizer, kind, streaming):
    saved = Dataset.from_dict({"input_ids": [[1, 2, 3], [4, 5]]}).with_format(kind)
    saved.save_to_disk(tmp_path / "saved")
    rows = load_mixture([Source(path=str(tmp_path / "saved"))], tokenizer, 60, streaming=streaming, seed=0)
    assert [row["input_ids"] for row in rows] == [[1, 2, 3], [4, 5]]


@pytest.mark.parametrize(
    ("column", "documents", "message"),
    [
        ("text", [3, 4], r"has 3 in column 'text', which must hold text\. Set `text_column`"),
        ("text", [["red"], ["blue"]], r"has \['red'\] in column 'text'"),
        ("input_ids", ["red", "blue"], "has 'red' in column 'input_ids', which must hold a list of token ids"),
        ("input_ids", [[1.5, 2.0]], r"has 1\.5 among its `input_ids`, which must be whole numbers"),
        ("input_ids", [[1, None]], "has None among its `input_ids`"),
        ("input_ids", [["1", "2"]], "has '1' among its `input_ids`"),
        ("input_ids", [[[1, 2]]], r"has \[1, 2\] among its `input_ids`"),
    ],
)
def test_what_is_no_document_names_source_and_row(tmp_path, tokenizer, column, documents, message):
    path = write(tmp_path / "a.jsonl", documents, column)
    with pytest.raises(ValueError, match=rf"Row 0 of source .*a\.jsonl {message}"):
        load_mixture([Source(path=path)], tokenizer, 400, streaming=True, seed=0)


@pytest.mark.parametrize("token", [60, -1])
def test_a_token_beyond_the_vocabulary_names_source_and_row(tmp_path, tokenizer, token):
    path = write(tmp_path / "a.jsonl", [[1, 2], [3, token]], "input_ids")
    with pytest.raises(ValueError, match=rf"Row 1 of source .*a\.jsonl has token {token}, .*`vocab_size` is 60"):
        load_mixture([Source(path=path)], tokenizer, 60, streaming=False, seed=0)
    assert load_mixture([Source(path=path)], tokenizer, 61, streaming=False, seed=0)[0] if token > 0 else True


def test_a_text_source_is_checked_against_the_models_vocabulary(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", ["red shirt"])
    with pytest.raises(ValueError, match=r"Row 0 .*Use the tokenizer that the model was made for"):
        load_mixture([Source(path=path)], tokenizer, 5, streaming=False, seed=0)


def test_sources_that_cannot_be_read(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", ["red"], "body")
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "red"}\nnot json\n')
    saved = tmp_path / "saved"
    Dataset.from_dict({"text": ["red"]}).save_to_disk(saved)
    (tmp_path / "a.doc").write_text("red")
    for source, message in [
        (Source(path="nowhere.jsonl"), r"Source nowhere\.jsonl \(split train\) can't be read: there is no such file"),
        (Source(path="no/where"), r"Source no/where \(split train\) can't be read"),
        (Source(path=path), r"a\.jsonl has no column 'text'; it has \['body'\]. Set `text_column`"),
        (Source(path=str(broken)), r"broken\.jsonl .*can't be read"),
        (Source(path=str(saved), config="en"), "a saved dataset has no configurations, and `config` is 'en'"),
        (Source(path=path, config=3), "a file has no configurations, and `config` is 3"),
        (Source(path=str(tmp_path / "a.doc")), "it is of no kind that is read here: .jsonl"),
        (Source(path=str(tmp_path / "missing.parquet.gz")), "it is of no kind that is read here: .jsonl"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_mixture([source], tokenizer, 400, streaming=False, seed=0)
    broken.write_text("not json\n")
    with pytest.raises(ValueError, match=r"Source .*broken\.jsonl .*can't be read"):
        load_mixture([Source(path=str(broken))], tokenizer, 400, streaming=True, seed=0)


def test_the_mixture_that_comes_with_the_library():
    mixture = read_mixture(str(Path(__file__).parents[2] / "examples/mixtures/compass.yaml"))
    assert [stage.sequence_length for stage in mixture.stages] == [4096, 4096, 8192, 32768, 131072]
    ropes = {s.name: preset("compass-v3", rope_parameters=s.rope_parameters).rope_parameters for s in mixture.stages}
    assert ropes["general"]["rope_type"] == "default"
    for stage in mixture.stages[3:]:
        rope = ropes[stage.name]
        assert rope["factor"] * rope["original_max_position_embeddings"] == stage.sequence_length
