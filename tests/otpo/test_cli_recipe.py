"""Recipes: what can't be read or is of another type is refused with its place, and the rest is as if it were typed."""

import pytest

from otpo.cli import align, pretrain, sft
from otpo.cli.options.recipe import conform, option_types, read_yaml
from otpo.cli.options.run_options import changed_options, read_command_line


def read(text: str | bytes, tmp_path, *words: str):
    file = tmp_path / "recipe.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_command_line(align.make_parser(), ["--config", str(file), *words])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("beta: [1", r"recipe.yaml`, line 1, column 9: no valid YAML"),
        ("seed: 1\nbeta: a: b", r"recipe.yaml`, line 2, column 8: no valid YAML: mapping values are not allowed"),
        (b"seed: 1\nrun_name: caf\xe9", r"recipe.yaml`, line 2, column 14: the file is not UTF-8 text"),
        (b"seed: 1\nrun_name: \x01", r"recipe.yaml`, line 2, column 11: the character '\\x01' can't stand in YAML"),
        ("", "recipe.yaml` is empty"),
        ("- 1", "a recipe is a YAML mapping"),
        ("1: 2", "1 is no name of an option"),
        ("env: [1]", "`env` must be a mapping"),
        ("env: {1: x}", "`env` has 1, which is no name of a variable"),
        ("env: {A=B: x}", "`env` has 'A=B', which is no name of a variable"),
        ("env: {A: null}", "`A: null` in `env` is of the wrong type"),
        ("seed: 1\nbeta: 2\nseed: 3", "line 3, column 1: no valid YAML: `seed` stands there twice"),
        ("model_init_kwargs: {a: 1, a: 2}", "column 27: no valid YAML: `a` stands there twice"),
        ("model_name_or_path: [x]", r'`model_name_or_path: \["x"\]` is of the wrong type.*is null or text'),
        ("beta: true", "`beta: true` is of the wrong type. `beta` is a number"),
        ("max_steps: 2.5", "`max_steps` is a whole number"),
        ("max_steps: null", "`max_steps: null` is of the wrong type"),
        ("use_peft: 3", "`use_peft` is true or false"),
        ("lora_target_modules: {a: 1}", "is null or a list whose items are each text"),
        ("loss_weights: [1, x]", r'`loss_weights: \[1, "x"\]`.*items are each a number'),
        ("datasets: [{pth: x}]", r"a mapping with names among \['path'"),
        ("ot_cost: 3", r"`ot_cost` is null or one of \['euclidean', 'cosine'\]"),
        ("weighting: otop", "`weighting: otop` is not known. Set one of: "),
        ("model_init_kwargs: some", "`model_init_kwargs=some` is no JSON"),
    ],
)
def test_what_is_refused(text, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read(text, tmp_path)


def test_anchors_and_merged_names_are_read(tmp_path):
    text = "model_init_kwargs: &a {dtype: float32}\nlr_scheduler_kwargs: {<<: *a, dtype: x}"
    values = read(text, tmp_path).values
    assert values["model_init_kwargs"] == {"dtype": "float32"} and values["lr_scheduler_kwargs"] == {"dtype": "x"}


def test_a_folder_is_no_recipe(tmp_path):
    with pytest.raises(ValueError, match=r"`--config .*` is a folder"):
        read_yaml("--config", str(tmp_path))


def test_values_are_those_that_the_command_line_gives(tmp_path):
    text = "save_strategy: no\nloss_type: ipo\ndataset_config: 200\nlearning_rate: 5e-7\nmax_steps: 3.0"
    text += "\nloss_weights: 2"
    typed = ["--save_strategy", "no", "--loss_type", "ipo", "--dataset_config", "200", "--learning_rate", "5e-7"]
    typed += ["--max_steps", "3", "--loss_weights", "2"]
    given = read_command_line(align.make_parser(), typed)
    assert changed_options(read(text, tmp_path)) == changed_options(given)


@pytest.mark.parametrize("command", [align, sft, pretrain])
def test_defaults_are_of_their_types(command):
    parser = command.make_parser()
    defaults = {name: value for name, value in vars(parser.parse_args([])).items() if name != "debug"}
    conform(defaults, option_types(parser.dataclass_types), "defaults")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("{bad", "`model_init_kwargs={bad` is no JSON: .* column 2"),
        ("[1]", r"`model_init_kwargs=\[1\]` is no mapping"),
    ],
)
def test_mappings_on_the_command_line(value, message):
    with pytest.raises(ValueError, match=message):
        read_command_line(align.make_parser(), ["--model_init_kwargs", value])
