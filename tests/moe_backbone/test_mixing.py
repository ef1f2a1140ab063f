"""Mixtures: stages and sources in YAML, drawn by weight, with faults that name the source and the row."""

from collections import Counter
from pathlib import Path

import pytest
import yaml
from datasets import Dataset, IterableDataset

from moe_backbone import preset
from moe_backbone.mixing import Mixture, Source, Stage, load_mixture, read_mixture


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
        ({"stages": [{**STAGE, "steps": 0}]}, "Stage one: `steps` must be at least 1, got 0"),
        ({"stages": [{**STAGE, "sources": []}]}, "Stage one has no `sources`"),
        ({"stages": [{**STAGE, "sources": [{"path": "a", "weight": 0}]}]}, "Source a: `weight` must be above 0"),
        ({"stages": [{**STAGE, "sources": [{"file": "a"}]}]}, r"a source has no \['file'\]"),
        ({"stages": [STAGE, STAGE]}, "two stages have the same `name`"),
    ],
)
def test_what_a_mixture_may_not_be(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        read_mixture(write_mixture(tmp_path, content))


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
    assert len(load_mixture([Source(path=paths[0], max_documents=1)], tokenizer, 400, streaming=False, seed=0)) == 1


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("empty", ["", "  \n", None])
def test_an_empty_document_names_source_and_row(tmp_path, tokenizer, empty, streaming):
    path = write(tmp_path / "a.jsonl", ["red", "blue", empty])
    with pytest.raises(ValueError, match=r"Row 2 of source .*a\.jsonl is an empty document"):
        list(load_mixture([Source(path=path)], tokenizer, 400, streaming=streaming, seed=0))


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
    for source, message in [
        (Source(path="nowhere.jsonl"), r"Source nowhere\.jsonl \(split train\) can't be read: there is no such file"),
        (Source(path="no/where"), r"Source no/where \(split train\) can't be read"),
        (Source(path=path), r"a\.jsonl has no column 'text'; it has \['body'\]. Set `text_column`"),
        (Source(path=str(broken)), r"broken\.jsonl .*can't be read"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_mixture([source], tokenizer, 400, streaming=False, seed=0)


def test_the_mixture_that_comes_with_the_library():
    mixture = read_mixture(str(Path(__file__).parents[2] / "examples/mixtures/compass.yaml"))
    assert [stage.sequence_length for stage in mixture.stages] == [4096, 4096, 8192, 32768, 131072]
    ropes = {s.name: preset("compass-v3", rope_parameters=s.rope_parameters).rope_parameters for s in mixture.stages}
    assert ropes["general"]["rope_type"] == "default"
    for stage in mixture.stages[3:]:
        rope = ropes[stage.name]
        assert rope["factor"] * rope["original_max_position_embeddings"] == stage.sequence_length
