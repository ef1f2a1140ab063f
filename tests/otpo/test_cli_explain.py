"""`otpo explain`: what it writes, what it takes as the reference, and what it refuses with one message."""

import re
import subprocess
import sys

import pytest
from cli_helpers import ROOT, arguments, refusal
from datasets import Dataset
from helpers import make_pairs, with_images
from PIL import Image
from transformers import AutoModelForCausalLM

from otpo.cli import align, explain

pytestmark = pytest.mark.usefixtures("own_process")
PAIR = {"prompt": "Which colour?", "chosen": "the red shirt ค่ะ 🙂", "rejected": "no"}


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = make_pairs(6).to_list()
    rows[4]["chosen"][0]["content"] = "  "
    rows[5]["rejected"] = rows[5]["chosen"]
    Dataset.from_list(rows).to_json(path)
    return str(path)


def words(**changes: object) -> list[str]:
    """A command line of these options; those that are None are left out."""
    line = ["--use_cpu"]
    for name, value in changes.items():
        if value is not None:
            line += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return line


def test_a_page_of_rows(model_folder, other_model_folder, pairs_file, tmp_path, capsys):
    output = tmp_path / "page.html"
    asked = {"model_name_or_path": model_folder, "reference": other_model_folder, "dataset_name": pairs_file}
    line = words(**asked, rows=[3, 0], output=output, ot_reg=0.05, ot_reg_m=0.3, ot_cost_scale="pairwise", beta=0.02)
    assert explain.main(line) == 0
    assert f"saved      {output}, 2 pair(s)" in capsys.readouterr().out
    page = output.read_text(encoding="utf-8")
    assert re.findall("<h2>(.*?)</h2>", page) == ["row 3", "row 0"]
    assert "otpo, ot_reg 0.05, ot_reg_m 0.3, ot_cost_scale pairwise" in page and "beta 0.02" in page
    assert f"<b>reference</b> {other_model_folder}" in page and "reward, OTPO" in page


@pytest.mark.parametrize("weighting", ["budget", "ld"])
def test_a_typed_pair_without_a_reference(model_folder, tmp_path, monkeypatch, weighting):
    monkeypatch.chdir(tmp_path)
    alpha = 0.5 if weighting == "ld" else None
    assert explain.main(words(model_name_or_path=model_folder, **PAIR, weighting=weighting, ld_alpha=alpha)) == 0
    page = (tmp_path / "explain.html").read_text(encoding="utf-8")
    assert "<b>reference</b> none" in page and "No reference model was given" in page
    assert "<h2>the pair</h2>" in page and f"log-probability, {weighting}" in page
    assert "&lt;|user|&gt;Which colour?&lt;|end|&gt;&lt;|assistant|&gt;" in page


def test_pictures(model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert explain.main(words(model_name_or_path=model_folder, **PAIR, format="png")) == 0
    assert explain.main(words(model_name_or_path=model_folder, **PAIR, output="by-ending.png")) == 0
    for name in ("explain.png", "by-ending.png"):
        with Image.open(tmp_path / name) as picture:
            picture.load()
            assert picture.format == "PNG" and picture.width == 1000
    with Image.open(tmp_path / "explain.png") as picture:
        sizes = [picture.height]
    for more in ({}, {"beside": ["diff"]}, {"beside": []}):  # contrast and diff where nothing is said
        line = words(model_name_or_path=model_folder, **PAIR, output="few.png", **more)
        assert explain.main([*line, "--weights_only"]) == 0
        with Image.open(tmp_path / "few.png") as picture:
            sizes.append(picture.height)
    assert sizes == sorted(set(sizes), reverse=True)


def test_the_model_under_an_adapter_is_its_reference(model_folder, pairs_file, tmp_path):
    changes = {"use_peft": True, "max_train_pairs": 3, "drop_identical_pairs": True}
    assert align.main(arguments(model_folder, pairs_file, tmp_path / "adapter", **changes)) == 0
    rewards = []
    for reference in (None, model_folder):
        output = tmp_path / "page.html"
        asked = {"model_name_or_path": tmp_path / "adapter", "reference": reference, "dataset_name": pairs_file}
        assert explain.main(words(**asked, output=output)) == 0
        page = output.read_text(encoding="utf-8")
        assert f"<b>reference</b> {model_folder}" in page
        rewards.append(re.findall(r"reward OTPO ([+-]?[\d.e-]+)", page))
    assert rewards[0] == rewards[1] and any(float(reward) for reward in rewards[0])


@pytest.mark.parametrize("kind", ["moe_folder", "compass_folder", "vision_folder"])
def test_other_models(request, tmp_path, kind):
    data = with_images(make_pairs(2)) if kind == "vision_folder" else make_pairs(2)
    data.save_to_disk(tmp_path / "data")
    asked = {"model_name_or_path": request.getfixturevalue(kind), "dataset_name": tmp_path / "data"}
    assert explain.main(words(**asked, rows=1, output=tmp_path / "page.html")) == 0
    text = re.search('<p class="text">(.*?)</p>', (tmp_path / "page.html").read_text(encoding="utf-8"))[1]
    assert re.sub("<[^>]*>", "", text) == f"{data['chosen'][1][0]['content']}&lt;|end|&gt;"


@pytest.mark.lengthy
def test_help_is_light():
    code = (
        "import sys\nfrom otpo.cli.main import main\n"
        "try: main(['explain', '--help'])\nexcept SystemExit: pass\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "trl", "datasets", "numpy", "rich", "matplotlib"} & set(done.stderr.split())
    for option in ("--rows", "--prompt", "--reference", "--ot_cost_scale", "--format", "--weighting"):
        assert option in done.stdout


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "No pair is named. Set `dataset_name`, or `prompt`, `chosen` and `rejected`"),
        ({**PAIR, "rejected": None}, "`rejected` is missing: a pair is `prompt`, `chosen` and `rejected`"),
        ({**PAIR, "chosen": " "}, "`chosen=' '` is empty, so there are no tokens to weigh. Give the response's text"),
        ({**PAIR, "dataset_name": "otpo/demo"}, "Both `dataset_name=otpo/demo` and `prompt` name a pair"),
        ({**PAIR, "rows": 3}, r"`rows=\[3\]` are rows of a dataset, and `prompt` gives a pair"),
        ({"dataset_name": "FILE", "rows": [2, 6]}, "`rows=6`: .* has 6 rows .* Name rows from 0 to 5"),
        ({"dataset_name": "FILE", "rows": -1}, "`rows=-1`: .* has 6 rows"),
        ({"dataset_name": "FILE", "rows": 4}, "`rows=4`: its chosen response is empty"),
        ({"dataset_name": "FILE", "rows": [0, 5]}, "`rows`: row 5 can't be weighed: .* or both are the same"),
        ({"dataset_name": "FILE", "rows": "two"}, "argument --rows: invalid int value: 'two'"),
        ({"dataset_name": "FILE", "max_length": 4}, "No pair of the train dataset is left: .*Raise `max_length`"),
        (
            {"dataset_name": "otpo/demo", "dataset_train_split": "all"},
            "`dataset_train_split='all'`: .*'test'",
        ),
        ({"dataset_name": "/nowhere.jsonl"}, "`dataset_name`: the file /nowhere.jsonl does not exist"),
        ({**PAIR, "model_name_or_path": None}, "No model is named. Set `model_name_or_path`"),
        ({**PAIR, "model_name_or_path": "/nowhere"}, "`model_name_or_path=/nowhere`: there is no such folder"),
        ({**PAIR, "reference": "/nowhere"}, "`reference=/nowhere`: there is no such folder"),
        ({**PAIR, "weighting": "otop"}, r"`weighting` must be one of \['budget', .*, got 'otop'"),
        ({**PAIR, "beside": ["otop"]}, "`beside=otop` is not known. Name some of budget, "),
        ({**PAIR, "beside": ["ld"]}, "`beside=ld` needs `ld_alpha`, which changes any other weighting"),
        ({**PAIR, "weighting": "surprisal"}, "`weighting=surprisal` is made of the reference's log-probabilities"),
        ({**PAIR, "beside": ["surprisal"]}, "`weighting='surprisal'` is made of the reference's log-probabilities"),
        ({**PAIR, "weighting": "ld"}, "`weighting='ld'` needs `ld_alpha`, got None"),
        ({**PAIR, "ld_alpha": 0.5}, "`ld_alpha=0.5` is an option of `weighting=ld`"),
        ({**PAIR, "ot_reg": 0}, "`ot_reg` must be a positive finite number, got 0"),
        ({**PAIR, "ot_cost_scale": "big"}, "`ot_cost_scale` must be 'release' or 'pairwise', got 'big'"),
        ({**PAIR, "dtype": "int8"}, "got int8"),
        ({**PAIR, "format": "pdf"}, "`format=pdf` is not known. Set html or png"),
        ({**PAIR, "format": "png", "output": "a.html"}, "`format=png` does not fit `output=a.html`"),
        (
            {**PAIR, "output": "/nowhere/a.html"},
            "`output=/nowhere/a.html`: the folder /nowhere does not exist. Make it",
        ),
        ({**PAIR, "output": "."}, r"`output=\.` is a folder. Name a file, such as explain.html"),
        ({**PAIR, "use_cpu": "maybe"}, "argument --use_cpu: true or false, got 'maybe'"),
        ({**PAIR, "weights_only": []}, "`weights_only` is an option of pictures. Set `format=png`"),
        ({**PAIR, "ot_rge": 1}, "unrecognized arguments: --ot_rge 1"),
    ],
    ids=lambda value: "-".join(f"{name}" for name in value if name not in PAIR) if isinstance(value, dict) else "",
)
def test_what_is_refused(capsys, model_folder, pairs_file, tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    changes = {"model_name_or_path": model_folder, **changes}
    if changes.get("dataset_name") == "FILE":
        changes["dataset_name"] = pairs_file
    assert re.search(message, refusal(explain.main, capsys, words(**changes)))
    assert not list(tmp_path.iterdir())


def test_bytes_that_are_no_text_are_read_as_far_as_they_are(model_folder, tmp_path):
    texts = {name: f"{text} é".encode().decode("ascii", "surrogateescape") for name, text in PAIR.items()}
    page = tmp_path / "page.html"
    assert explain.main(words(model_name_or_path=model_folder, **texts, output=page)) == 0
    assert "é" in page.read_text()


def test_a_reference_of_another_vocabulary(capsys, model_folder, tmp_path):
    other = AutoModelForCausalLM.from_pretrained(model_folder)
    other.resize_token_embeddings(8)
    other.save_pretrained(tmp_path / "other")
    line = words(model_name_or_path=model_folder, reference=tmp_path / "other", **PAIR, output=tmp_path / "a.html")
    assert "The reference has 8 tokens in its vocabulary" in refusal(explain.main, capsys, line)


def test_pictures_without_matplotlib(capsys, model_folder, monkeypatch):
    monkeypatch.setattr(explain, "find_spec", lambda name: None)
    message = refusal(explain.main, capsys, words(model_name_or_path=model_folder, **PAIR, format="png"))
    assert "`format=png` needs matplotlib: `pip install 'otpo[plots]'`" in message
