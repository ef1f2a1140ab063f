"""`otpo sft`: answers alone are learned, packed or not, with adapters or without; bad data is refused.

The file is over 350 lines because its runs share their data and its written-out labels.
"""

import json
import re

import pytest
import torch
from cli_helpers import arguments, launched, python, refusal
from datasets import Dataset
from helpers import MARKED_TEMPLATE, assert_same_parameters, make_pairs, parameters, save_model
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.chat_template_utils import qwen3_chat_template

from otpo import __version__
from otpo.cli import sft
from otpo.cli.running.model_card import Origin, make_card
from otpo.data.instruction_checks import check_instructions, instruction_form, row_problem

pytestmark = pytest.mark.usefixtures("own_process")
LORA = {
    "use_peft": True,
    "lora_r": 2,
    "lora_dropout": 0,
    "lora_target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "lora_target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
}


@pytest.fixture(scope="module")
def rows():
    """Conversations of two turns each, with a system's message in every other one."""
    pairs = make_pairs(24)
    made = []
    for index in range(0, len(pairs), 2):
        first, second = pairs[index], pairs[index + 1]
        start = [{"role": "system", "content": "ships in a box"}] if index % 4 else []
        made.append({"messages": start + first["prompt"] + first["chosen"] + second["prompt"] + second["chosen"]})
    return made


@pytest.fixture(scope="module")
def messages_file(rows, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("instructions") / "rows.jsonl"
    Dataset.from_list(rows).to_json(path)
    return str(path)


@pytest.fixture(scope="module")
def completions_file(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("completions") / "rows.jsonl"
    pairs = make_pairs(12).rename_column("chosen", "completion")
    pairs.remove_columns("rejected").to_json(path)
    return str(path)


def trainer_of(model: str, data: str, output, **changes):
    parsed = sft.make_parser().parse_args_into_dataclasses(
        arguments(model, data, output, **changes), look_for_args_file=False
    )
    return sft.make_trainer(*parsed)


def counted(trainer) -> list[str]:
    """The text that the loss counts, row by row."""
    decode = trainer.processing_class.decode
    return [decode([token for token in row["labels"] if token != -100]) for row in trainer.train_dataset]


def write(rows, path) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# What is learned


@pytest.mark.lengthy
def test_a_run_in_a_process_of_its_own(compass_folder, messages_file, tmp_path):
    report = tmp_path / "report.json"
    changes = {"max_steps": 12, "do_eval": True, "test_split_size": 4, "report": report}
    done = python("-m", "otpo.cli.sft", *arguments(compass_folder, messages_file, tmp_path / "out", **changes))
    assert done.returncode == 0, done.stderr
    for line in (
        "engine     NO, 1 process",
        "loss       nll of the assistant's tokens, learning rate 0.01",
        "rows       8 to train on, 4 to evaluate on, 2 in a step",
        "experts    run by grouped_mm; load-balancing loss weighed with 0.1, no z-loss",
        "mtp        1 layer(s) frozen: their loss is left out, `mtp_loss_coef` is set to 0",
    ):
        assert line in done.stdout
    written = json.loads(report.read_text())
    assert written["metrics"]["train"]["step"] == 12 and written["metrics"]["eval"]["step"] == 12
    assert written["options"]["test_split_size"] == 4 and "dropped_pairs" not in written

    before = parameters(AutoModelForCausalLM.from_pretrained(compass_folder))
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert trained.config.mtp_loss_coef == 0
    for name, value in parameters(trained).items():
        assert torch.equal(value, before[name]) == name.startswith("model.layers.2."), name
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == MARKED_TEMPLATE


@pytest.mark.parametrize("folder", ["compass", "qwen3"])
def test_the_card_says_what_was_made_of_what(compass_folder, model_folder, completions_file, tmp_path, folder):
    parent = compass_folder if folder == "compass" else model_folder
    argv = arguments(parent, completions_file, tmp_path / "tuned", max_steps=1, save_strategy="steps", save_steps=1)
    assert sft.main(argv) == 0
    card = ModelCard.load(tmp_path / "tuned" / "README.md")
    assert {"otpo", "sft"} <= set(card.data.tags) and card.data.model_name == "tuned"
    assert card.data.base_model is None and card.data.datasets is None  # which name what is on the Hub alone
    assert f"`otpo sft` of otpo {__version__}, from `{parent}`, on `{completions_file}`" in card.text
    assert ("import moe_backbone" in card.text) == (folder == "compass")


def test_metadata_of_the_card_name_what_is_on_the_hub():
    origin = Origin("otpo sft", "owner/model", None, ("owner/data", "otpo/demo", "/a/b", "rows.jsonl"), True, False)
    card = make_card(origin, "name", "owner/name", ["mine"])
    assert card.data.base_model == "owner/model" and card.data.datasets == ["owner/data"]
    assert card.data.tags == ["otpo", "sft", "compass", "mine"]
    assert 'model="owner/name")' in card.text and "on `owner/data`, `otpo/demo`, `/a/b`, `rows.jsonl`" in card.text


def test_the_loss_falls_and_the_load_is_balanced(compass_folder, messages_file, tmp_path):
    trainer = trainer_of(compass_folder, messages_file, tmp_path, max_steps=15)
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert sum(entry["loss"] for entry in log[-3:]) < 0.8 * sum(entry["loss"] for entry in log[:3])
    assert all(1.9 < entry["aux_loss"] < 4 for entry in log)  # 2 at an even load of 2 experts a token

    inputs = trainer.data_collator([trainer.train_dataset[row] for row in (0, 1)])
    trainer.model.train()
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, dict(inputs))
        output = trainer.model(**inputs, fused_lm_head=True, output_router_logits=True)
    nll = -output.log_probs.sum() / (inputs["labels"][:, 1:] != -100).sum()
    torch.testing.assert_close(loss, nll + 0.1 * output.aux_loss)


def test_only_the_assistants_tokens_count(compass_folder, messages_file, rows, tmp_path):
    trainer = trainer_of(compass_folder, messages_file, tmp_path)
    answers = [
        "".join(f"{turn['content']}<|end|>" for turn in row["messages"] if turn["role"] == "assistant") for row in rows
    ]
    assert counted(trainer) == answers
    whole = trainer_of(compass_folder, messages_file, tmp_path, completion_only_loss=False)
    assert all("<|user|>" in text for text in counted(whole))


def test_only_the_completions_tokens_count(model_folder, completions_file, tmp_path, capsys):
    """Also with a template that marks no answers."""
    trainer = trainer_of(model_folder, completions_file, tmp_path)
    texts = [pair["chosen"][0]["content"] for pair in make_pairs(12)]
    assert counted(trainer) == [f"{text}<|end|>" for text in texts]
    assert sft.main(arguments(model_folder, completions_file, tmp_path)) == 0
    printed = capsys.readouterr().out
    assert "loss       nll of the completions' tokens" in printed
    assert "mtp " not in printed and "experts " not in printed


def test_plain_text_needs_no_template(model_folder, tmp_path):
    data = write([{"prompt": "the red", "completion": " blue shirt"}] * 4, tmp_path / "rows.jsonl")
    assert counted(trainer_of(model_folder, data, tmp_path)) == [" blue shirt<|end|>"] * 4


def test_templates_that_trl_knows_are_marked_by_it(model_folder, messages_file, rows, tmp_path):
    template = tmp_path / "qwen3.jinja"
    template.write_text(qwen3_chat_template)
    trainer = trainer_of(model_folder, messages_file, tmp_path, chat_template_path=template)
    for text, row in zip(counted(trainer), rows, strict=True):
        assert row["messages"][-1]["content"] in text and row["messages"][-2]["content"] not in text


# Packing


@pytest.mark.parametrize("folder", ["compass", "qwen3"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_rows_do_not_see_each_other(
    folder, attention, compass_folder, model_folder, messages_file, tmp_path, request
):
    """The loss of all rows, packed, is that of the rows one by one, and is not when they see each other."""
    template = tmp_path / "marked.jinja"
    template.write_text(MARKED_TEMPLATE)
    model = compass_folder if folder == "compass" else model_folder
    changes = {"chat_template_path": template, "attn_implementation": attention, "max_length": 160}
    losses = []
    for packing in (False, True):
        trainer = trainer_of(model, messages_file, tmp_path, **changes, packing=packing)
        assert trainer.model.config._attn_implementation == attention
        batch = trainer.data_collator(list(trainer.train_dataset))
        with torch.no_grad():
            losses.append(trainer.compute_loss(trainer.model, dict(batch)))
    assert len(trainer.train_dataset) < 12 and batch["input_ids"].size(0) == 1
    torch.testing.assert_close(losses[1], losses[0])
    batch["position_ids"] = torch.arange(batch["input_ids"].size(1))[None]
    with torch.no_grad():
        assert abs(trainer.compute_loss(trainer.model, batch) - losses[0]) > 1e-3


def test_a_packed_run(compass_folder, messages_file, tmp_path, capsys):
    argv = arguments(compass_folder, messages_file, tmp_path, packing=True, max_length=128, do_eval=True)
    assert sft.main([*argv, "--test_split_size", "3"]) == 0
    printed = capsys.readouterr().out
    assert "packing    bfd, blocks of up to 128 tokens" in printed
    assert re.search(r"blocks     \d to train on, \d to evaluate on, 2 in a step", printed)


# Adapters


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_of_attention_and_experts(compass_folder, messages_file, tmp_path, dtype):
    changes = {**LORA, "dtype": dtype, "bf16": dtype == "bfloat16", "max_steps": 3, "learning_rate": 0.1}
    trainer = trainer_of(compass_folder, messages_file, tmp_path, **changes)
    before = parameters(trainer.model)
    trainable = {name for name, value in trainer.model.named_parameters() if value.requires_grad}
    assert trainable and all("lora_" in name and ".layers.2." not in name for name in trainable)
    assert any(".experts." in name for name in trainable) and any(".self_attn." in name for name in trainable)
    trainer.train()
    moved = {name for name, value in parameters(trainer.model).items() if not torch.equal(value, before[name])}
    assert moved == trainable


def test_an_adapted_run_saves_adapters_alone(compass_folder, messages_file, tmp_path, capsys):
    assert sft.main(arguments(compass_folder, messages_file, tmp_path, **LORA)) == 0
    total, trainable = (
        int(number.replace(",", ""))
        for number in re.search(r"([\d,]+) parameters, ([\d,]+) trainable", capsys.readouterr().out).groups()
    )
    assert 0 < trainable < total / 4
    assert (tmp_path / "adapter_model.safetensors").is_file() and not (tmp_path / "model.safetensors").exists()
    AutoModelForCausalLM.from_pretrained(tmp_path)


# Resuming and launching


def test_a_resumed_run_is_the_uninterrupted_one(compass_folder, messages_file, tmp_path, capsys):
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 5}
    straight, other = tmp_path / "straight", tmp_path / "other"
    assert sft.main(arguments(compass_folder, messages_file, straight, **saving)) == 0
    capsys.readouterr()
    last = straight / "checkpoint-2"
    assert sft.main(arguments(compass_folder, messages_file, other, **saving, resume_from_checkpoint=last)) == 0
    assert f"resuming   from {last}" in capsys.readouterr().out
    finals = [parameters(AutoModelForCausalLM.from_pretrained(folder)) for folder in (straight, other)]
    assert_same_parameters(*finals)


@pytest.mark.lengthy
@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
def test_two_processes_under_accelerate(compass_folder, messages_file, tmp_path, adapters):
    argv = arguments(compass_folder, messages_file, tmp_path / "out", **(LORA if adapters else {}))
    done = python(*launched("otpo.cli.sft", *argv))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("engine     MULTI_CPU, 2 processes") == 1
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


# What is refused, with one message

ASKED, ANSWERED = {"role": "user", "content": "the box"}, {"role": "assistant", "content": "ships"}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            [{"text": "a"}],
            r"training dataset has the columns \['text'\].*'messages', or 'prompt' and.*`otpo pretrain`",
        ),
        ([{"conversations": [ASKED]}], "maybe_convert_to_chatml"),
        ([{"prompt": "a", "chosen": "b", "rejected": "c"}], "`otpo align`"),
        ([{"question": "a", "completion": "b"}], "`dataset.rename_column"),
        (
            [{"messages": [ASKED, ANSWERED]}, {"messages": [ASKED]}],
            "Row 1 of the training dataset has no assistant turn.*`dataset.filter`",
        ),
        (
            [{"messages": [ASKED, ANSWERED]}] * 2 + [{"messages": [ASKED, {**ANSWERED, "content": " "}]}],
            r"Row 2 of the training dataset has an empty message, number 1 \(assistant\)",
        ),
        ([{"prompt": "a", "completion": ""}], "Row 0 of the training dataset has an empty completion"),
    ],
)
def test_data_that_is_refused(capsys, compass_folder, tmp_path, data, message):
    argv = arguments(compass_folder, write(data, tmp_path / "rows.jsonl"), tmp_path / "out")
    assert re.search(message, refusal(sft.main, capsys, argv))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset_name": None}, "Set `dataset_name` to .*'otpo/demo-instructions'"),
        ({"model_name_or_path": "/nowhere"}, "`model_name_or_path=/nowhere`: there is no such folder"),
        ({"max_train_rows": 0}, "`max_train_rows` must be at least 1, got 0"),
        ({"resume_from_checkpoint": True}, "`resume_from_checkpoint=true`: there is no checkpoint"),
        ({"max_length": 3}, "All 12 rows of the training dataset have no token of an answer within `max_length=3`"),
        ({**LORA, "save_code": True}, "`save_code=true` with `use_peft`: an adapter is saved without its model"),
        (
            {"save_code": True, "model_name_or_path": "qwen3"},
            "transformers has that of 'qwen3' itself. Leave the option out",
        ),
        ({**LORA, "lora_dropout": 0.1}, "`lora_dropout=0.1` with `lora_target_parameters`.*to 0"),
        ({"packign": True}, r"Unknown option among \['--packign', 'True'\]. `otpo sft --help`"),
    ],
)
def test_options_that_are_refused(
    capsys, compass_folder, model_folder, completions_file, messages_file, tmp_path, changes, message
):
    if changes.get("model_name_or_path") == "qwen3":
        changes = {**changes, "model_name_or_path": model_folder, "dataset_name": completions_file}
    argv = arguments(compass_folder, messages_file, tmp_path / "out", **changes)
    assert re.search(message, refusal(sft.main, capsys, argv))


def test_templates_without_marks_are_refused(capsys, model_folder, messages_file, tmp_path):
    message = refusal(sft.main, capsys, arguments(model_folder, messages_file, tmp_path))
    for remedy in ("{% generation %}", "`chat_template_path`", "'completion'", "`completion_only_loss=False`"):
        assert remedy in message
    assert sft.main(arguments(model_folder, messages_file, tmp_path, completion_only_loss=False)) == 0
    assert "loss       nll of all tokens" in capsys.readouterr().out


def test_a_tokenizer_without_a_template_is_refused(capsys, model_folder, messages_file, completions_file, tmp_path):
    bare = tmp_path / "bare"
    model, tokenizer = (kind.from_pretrained(model_folder) for kind in (AutoModelForCausalLM, AutoTokenizer))
    tokenizer.chat_template = None
    save_model(model, bare, tokenizer)
    for data in (messages_file, completions_file):
        message = refusal(sft.main, capsys, arguments(str(bare), data, tmp_path))
        assert "has no chat template, which messages need" in message


def test_rows_lost_to_truncation_are_told(compass_folder, messages_file, tmp_path, caplog):
    trainer = trainer_of(compass_folder, messages_file, tmp_path, max_length=24)
    left = len(trainer.train_dataset)
    assert 0 < left < 12
    assert f"{12 - left} of 12 rows of the training dataset are left out" in caplog.text


def test_a_streamed_run(capsys, compass_folder, messages_file, tmp_path):
    assert sft.main(arguments(compass_folder, messages_file, tmp_path, dataset_streaming=True)) == 0
    assert "rows       a stream to train on" in capsys.readouterr().out


def test_streams_are_checked_while_they_are_read():
    stream = Dataset.from_list([{"messages": [ASKED, ANSWERED]}, {"messages": [ASKED]}]).to_iterable_dataset()
    assert instruction_form(stream, "training") == "messages"
    checked = iter(check_instructions(stream, "messages", "training"))
    assert next(checked)["messages"] == [ASKED, ANSWERED]
    with pytest.raises(ValueError, match="Row 1 of the training dataset has no assistant turn"):
        next(checked)


@pytest.mark.parametrize(
    ("row", "form", "problem"),
    [
        ({"messages": None}, "messages", "no assistant turn"),
        ({"messages": [{"role": "user", "content": None}, ANSWERED]}, "messages", "empty message, number 0"),
        ({"messages": [ASKED, {**ANSWERED, "content": "", "tool_calls": [{"name": "f"}]}]}, "messages", None),
        ({"messages": [{**ASKED, "content": [{"type": "text", "text": "a"}]}, ANSWERED]}, "messages", None),
        ({"prompt": [ASKED], "completion": []}, "prompt-completion", "empty completion"),
        ({"prompt": [ASKED], "completion": [ANSWERED]}, "prompt-completion", None),
        ({"prompt": " ", "completion": "a"}, "prompt-completion", "empty prompt"),
    ],
)
def test_what_is_wrong_with_a_row(row, form, problem):
    found = row_problem(row, form)
    assert found is None if problem is None else problem in found


def test_help_groups_the_options(capsys):
    with pytest.raises(SystemExit) as stop:
        sft.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    titles = ("data and run", "model and adapters", "instructions and loss (TRL)", "training (transformers)")
    places = [text.index(f"\n{title}") for title in titles]
    assert places == sorted(places)
    assert (
        places[0] < text.index("--max_train_rows") < places[1] < text.index("\n  --lora_target_parameters") < places[2]
    )
    assert places[2] < text.index("\n  --packing ") < places[3] < text.index("--num_train_epochs")
    assert "%%" not in text
