"""Secrets are left out by name, nesting and look, and nothing else is."""

import pytest

from otpo.cli.align import make_parser
from otpo.cli.options.redact import LEFT_OUT, is_secret, redact_text, without_secrets
from otpo.cli.options.run_options import changed_options, read_command_line

SECRET = "token hub_token use_auth_token api_key apiKey password secret authorization headers HF_TOKEN X-Auth-Token"
SECRET += " storage_options sas sig passwords"
SECRET += " WANDB_API_KEY aws_secret_access_key client_secret credentials proxy_password github_token access_tokens"
PLAIN = (
    "pad_token eos_token max_token_length max_new_tokens max_tokens token_weights num_key_value_heads author tokens"
)
PLAIN += " query_token answer_token user_token role_token turn_token header_rows"
PLAIN += " tokenizer_name_or_path image_token include_num_input_tokens_seen compass decoder_start_token_id"


@pytest.mark.parametrize("name", SECRET.split())
def test_names_of_secrets(name):
    assert is_secret(name)
    assert without_secrets([{"a": {name: "x"}}]) == [{"a": {name: LEFT_OUT}}]


@pytest.mark.parametrize("name", PLAIN.split())
def test_names_of_anything_else(name):
    assert without_secrets({name: "x"}) == {name: "x"}


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("https://me:pass@host/data.jsonl", "https://left out@host/data.jsonl"),
        ("https://host/x?token=abc&part=1", "https://host/x?token=left out&part=1"),
        ("hf_abcDEF123", "left out"),
        ("see hf_abcdefghijklmnopqrstuv", "see left out"),
        ('{"token": "x", "a": [{"password": 1}]}', '{"token": "left out", "a": [{"password": "left out"}]}'),
        ("{'token': 'x', 'b': 2}", "{'token': 'left out', 'b': 2}"),
        ("a=1,api_key=zzz", "a=1,api_key=left out"),
        ('{"pad_token": "<x>"}', '{"pad_token": "<x>"}'),
        ("runs/hf_model", "runs/hf_model"),
        ("git@github.com:x/y", "git@github.com:x/y"),
        ("pass a token having permission, no token weights", "pass a token having permission, no token weights"),
        (
            "Error while deserializing header: incomplete metadata",
            "Error while deserializing header: incomplete metadata",
        ),
        ("hf-internal-testing/tiny-random-qwen", "hf-internal-testing/tiny-random-qwen"),
        ("hf_transfer", "hf_transfer"),
        ("pass: 3 of 4", "pass: 3 of 4"),
        ("Authorization: Bearer abcdefgh", "Authorization: left out"),
        ("password: hunter2", "password: left out"),
    ],
)
def test_secrets_in_text(text, safe):
    assert redact_text(text) == safe


def test_names_and_paths_are_told_apart():
    names = {"model_name_or_path": "hf_base", "dataset_name": "hf-internal-testing/dpo-a-1234567890"}
    assert without_secrets(names) == names
    assert without_secrets({"dataset_name": "https://me:pass@host/x"}) == {"dataset_name": "https://left out@host/x"}


def test_reports_keep_the_names_of_options():
    words = ["--hub_token", "abc", "--model_init_kwargs", '{"token": "abc", "dtype": "float16"}', "--pad_token", "<x>"]
    options = changed_options(read_command_line(make_parser(), words))
    assert options["hub_token"] == LEFT_OUT and options["pad_token"] == "<x>"
    assert options["model_init_kwargs"] == '{"token": "left out", "dtype": "float16"}'
