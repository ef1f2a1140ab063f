"""`otpo chat`: scripted conversations, whose answers are those of `generate` in the chat template."""

import io
import json
import shutil
import threading

import pytest
import torch
from cli_helpers import refusal
from peft import LoraConfig, get_peft_model
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from otpo.cli import chat
from otpo.cli.chatting.screen import show_answers
from otpo.cli.chatting.speaker import THREAD, Speaker, load_speaker

GREEDY = {"max_new_tokens": 6, "do_sample": False}


@pytest.fixture
def say(monkeypatch, capsys):
    """Runs the command on lines of input and returns what it printed, and the models with their conversations."""
    speakers = []

    def load(*args):
        speakers.append(load_speaker(*args))
        return speakers[-1]

    def run(*lines, argv):
        speakers.clear()
        monkeypatch.setattr("otpo.cli.chatting.speaker.load_speaker", load)
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        assert chat.main([*argv, "--device", "cpu"]) == 0
        return capsys.readouterr().out, speakers

    return run


@torch.no_grad()
def conversation(folder, *texts, system=None, model=None):
    """Greedy answers of six tokens to texts, one after the other."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = model or AutoModelForCausalLM.from_pretrained(folder)
    messages = [{"role": "system", "content": system}] if system else []
    answers = []
    for text in texts:
        messages.append({"role": "user", "content": text})
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        out = model.eval().generate(**ids, **GREEDY)[0, ids["input_ids"].size(1) :]
        answers.append(tokenizer.decode(out, skip_special_tokens=True).strip())
        messages.append({"role": "assistant", "content": answers[-1]})
    return answers


def said(speaker):
    return [message["content"] for message in speaker.messages if message["role"] == "assistant"]


def letters(text):
    """What of a text a terminal neither breaks nor drops."""
    return "".join(character for character in text if character.isascii() and character.isalnum())


def speaker(folder, **options):
    return load_speaker("MODEL", folder, None, "cpu", "auto", {**GREEDY, **options})


@pytest.mark.parametrize("fixture", ["model_folder", "compass_folder"])
def test_answers_are_those_of_the_conversation(fixture, request, say):
    folder = request.getfixturevalue(fixture)
    first, second = conversation(folder, "the red shirt", "ten dollars")
    (alone,) = conversation(folder, "ten dollars")
    assert second != alone  # else the test could not see whether the conversation is remembered
    argv = [folder, "--max_new_tokens", "6", "--temperature", "0"]
    text, (found,) = say("the red shirt", "", "ten dollars", "/exit", "never said", argv=argv)
    assert said(found) == [first, second]
    assert [message["content"] for message in found.messages[::2]] == ["the red shirt", "ten dollars"]
    assert letters(first + second) in letters(text)
    text, (found,) = say("the red shirt", "/new", "ten dollars", argv=argv)
    assert said(found) == [alone] and "A new conversation." in text and letters(alone) in letters(text)


def test_the_systems_message_and_help(model_folder, say):
    (answer,) = conversation(model_folder, "red", system="twenty boxes")
    assert answer != conversation(model_folder, "red")[0]
    argv = [model_folder, "--max_new_tokens", "6", "--temperature", "0", "--system", "twenty boxes"]
    text, (found,) = say("/help", "red", argv=argv)
    assert said(found) == [answer] and text.count("/new begins a new") == 2


def test_two_models_answer_side_by_side(model_folder, other_model_folder, say):
    answers = [conversation(folder, "blue", "box") for folder in (model_folder, other_model_folder)]
    argv = [model_folder, "--compare", other_model_folder, "--max_new_tokens", "6", "--temperature", "0"]
    text, found = say("blue", "box", argv=argv)
    assert [said(it) for it in found] == answers
    assert all(letters(answer)[:8] in letters(text) for both in answers for answer in both)
    assert text.count("╭") == 4


def test_an_adapter_chats(model_folder, tmp_path, say):
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model_folder), LoraConfig(r=2, target_modules=["q_proj", "o_proj"])
    )
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter))
    adapted.save_pretrained(tmp_path / "adapter")
    (answer,) = conversation(model_folder, "cotton", model=adapted)
    assert answer != conversation(model_folder, "cotton")[0]
    argv = [str(tmp_path / "adapter"), "--max_new_tokens", "6", "--temperature", "0"]
    assert said(say("cotton", argv=argv)[1][0]) == [answer]


def test_an_answer_that_is_left_stops_and_is_remembered(model_folder):
    found = speaker(model_folder, max_new_tokens=4000)
    answer = found.answer("the red shirt and the box")
    next(piece for piece in answer if piece)
    answer.close()
    assert THREAD not in [thread.name for thread in threading.enumerate()]
    assert len(said(found)) == 1 and len(found.tokenizer(said(found)[0]).input_ids) < 1000
    found.options["max_new_tokens"] = 3
    list(found.answer("and"))
    assert len(said(found)) == 2  # the conversation goes on


def test_ctrl_c_ends_the_answer_alone(model_folder):
    class Impatient(Console):
        def print(self, *args, **kwargs):
            super().print(*args, **kwargs)
            if kwargs.get("end") == "":
                raise KeyboardInterrupt

    console = Impatient(file=io.StringIO())
    found = speaker(model_folder, max_new_tokens=4000)
    show_answers(console, [found], "the red shirt")
    assert "(stopped)" in console.file.getvalue() and len(found.messages) == 2


def test_a_terminal_gets_both_answers_while_they_are_written(model_folder, other_model_folder):
    console = Console(file=io.StringIO(), force_terminal=True, width=60)
    both = [speaker(folder) for folder in (model_folder, other_model_folder)]
    show_answers(console, both, "blue")
    assert console.file.getvalue().count("╭") >= 4  # drawn at least twice
    assert [len(it.messages) for it in both] == [2, 2]


def test_an_error_of_the_model_reaches_the_reader(model_folder, other_model_folder, monkeypatch):
    both = [speaker(folder) for folder in (model_folder, other_model_folder)]
    monkeypatch.setattr(both[1].model, "generate", lambda **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(both[1].answer("red"))
    assert both[1].messages == []
    with pytest.raises(ZeroDivisionError):
        show_answers(Console(file=io.StringIO()), both, "red")


def test_a_conversation_too_long_says_so_and_goes_on(compass_folder, say, monkeypatch):
    monkeypatch.setattr(Speaker, "_limit", lambda self: 30)
    argv = [compass_folder, "--max_new_tokens", "6", "--temperature", "0"]
    text, (found,) = say("the red blue shirt " * 20, "red", argv=argv)
    assert "reads 30. Begin a new one: /new" in " ".join(text.split())
    assert said(found) == conversation(compass_folder, "red")
    asked = []
    generate = found.model.generate
    monkeypatch.setattr(found.model, "generate", lambda **kwargs: (asked.append(kwargs), generate(**kwargs))[1])
    found.messages[1]["content"] = "red " * 17
    list(found.answer("a"))
    room = 30 - asked[0]["input_ids"].size(1)
    assert 0 < room < 6 and asked[0]["max_new_tokens"] == room


def test_sampling_is_the_models_choice_unless_it_is_set():
    def options(*words):
        return chat.generation_options(chat.make_parser().parse_args(["model", *words]))

    assert options() == {"max_new_tokens": 512}
    assert options("--temperature", "0.5") == {"max_new_tokens": 512, "do_sample": True, "temperature": 0.5}
    assert options("--top_p", "0.9")["top_p"] == 0.9
    assert options("--temperature", "0", "--top_p", "0.9")["do_sample"] is False


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max_new_tokens", "0"], "`--max_new_tokens` must be at least 1"),
        (["--temperature", "-1"], "`--temperature` must be at least 0"),
        (["--top_p", "0"], "`--top_p` must be above 0"),
        (["--dtype", "int4"], "`--dtype` must be auto"),
        (["--compare", "./nowhere"], "`--compare=./nowhere`: there is no such folder"),
    ],
    ids=str,
)
def test_options_are_refused(model_folder, words, message, capsys):
    assert message in refusal(chat.main, capsys, [model_folder, *words])


def test_a_model_without_a_chat_template_is_refused(model_folder, tmp_path, capsys):
    AutoModelForCausalLM.from_pretrained(model_folder).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    message = " ".join(refusal(chat.main, capsys, [str(tmp_path), "--device", "cpu"]).split())
    assert "has no chat template" in message


def test_code_of_a_models_own_is_refused_without_a_question(model_folder, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    message = refusal(chat.main, capsys, [str(folder), "--device", "cpu"])
    assert f"`MODEL={folder}`: the model can't be loaded" in message and "custom code" in message
    assert not (tmp_path / "ran").exists()


def test_a_model_without_a_tokenizer_is_named(model_folder, tmp_path, capsys):
    LlamaConfig().save_pretrained(tmp_path)
    message = refusal(chat.main, capsys, [str(tmp_path), "--device", "cpu"])
    assert f"`MODEL={tmp_path}`: there is no tokenizer to read" in message
    message = refusal(chat.main, capsys, [model_folder, "--compare", str(tmp_path), "--device", "cpu"])
    assert f"`--compare={tmp_path}`: there is no tokenizer to read" in message


def test_bytes_that_are_no_text_are_read_as_far_as_they_are(model_folder, say):
    escaped = "réd".encode().decode("ascii", "surrogateescape")
    _, (first,) = say(escaped, "red \udcff", argv=[model_folder, "--max_new_tokens", "2"])
    asked = [message["content"] for message in first.messages if message["role"] == "user"]
    assert asked == ["réd", "red \ufffd"]
