"""`otpo export` and `otpo import`: lines, adapters, tokenizers, llama.cpp's converter, refusals."""

import json
import sys
import warnings
from pathlib import Path

import pytest
import torch
from cli_helpers import refusal
from compass_helpers import compass_model
from helpers import make_tokenizer, save_model
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeForCausalLM, TrainingArguments

from moe_backbone import CompassForCausalLM
from moe_backbone.conversion import verifying
from otpo.cli import export, import_model
from otpo.cli.main import COMMANDS, main
from otpo.cli.models.loading import find_origin, load_reference
from otpo.cli.models.merging import merge_adapter

CONVERTER = """\
import json, pathlib, sys
folder, out = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[sys.argv.index("--outfile") + 1])
config = json.loads((folder / "config.json").read_text())
out.write_text("half of it")
if config["num_experts_per_tok"] == 1:
    sys.exit("cannot do one expert")
out.write_text(" ".join([config["model_type"], *sys.argv[-2:]]))
"""
"""Takes the arguments of llama.cpp's converter."""
CHAT = [{"role": "user", "content": "the blue shirt"}]


@pytest.fixture(autouse=True)
def _no_llama_cpp(monkeypatch):
    monkeypatch.delenv("LLAMA_CPP", raising=False)


@pytest.fixture
def folder(tmp_path):
    """A Compass model with an MTP layer and its tokenizer, larger than one shard of the tests."""
    tokenizer = make_tokenizer()
    model = compass_model(
        vocab_size=len(tokenizer), num_mtp_layers=1, max_position_embeddings=128, eos_token_id=tokenizer.eos_token_id
    )
    model.generation_config.use_mtp = True
    model.generation_config.temperature, model.generation_config.do_sample = 0.5, True
    return save_model(model.eval(), tmp_path / "compass", tokenizer)


def assert_same(left, right, rtol=0.0, atol=1e-5):
    ids = torch.randint(1, 60, (2, 7))
    with torch.no_grad():
        torch.testing.assert_close(left.eval()(ids).logits, right.eval()(ids).logits, rtol=rtol, atol=atol)


def make_adapter(base, out, **targets):
    with warnings.catch_warnings(action="ignore"):  # PEFT's, of tied embeddings
        adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=3, **targets))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    with warnings.catch_warnings(action="ignore"):
        adapted.save_pretrained(out)


def with_adapter(base, adapter):
    """The two, not merged, in float32."""
    with warnings.catch_warnings(action="ignore"):
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)


def test_the_commands_are_listed():
    assert COMMANDS["export"].module == export.__name__ and COMMANDS["import"].module == import_model.__name__


def test_export_says_what_it_wrote_and_import_brings_it_back(folder, tmp_path, capsys):
    out, back = str(tmp_path / "served"), str(tmp_path / "back")
    assert main(["export", folder, out, "--verify", "--max_shard_size", "60KB"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["model"].startswith("Qwen3-MoE (Qwen3MoeForCausalLM): the same weights")
    assert lines["weights"] == f"float32, {len(list(Path(out).glob('*.safetensors')))} files"
    assert lines["verified"] == "logits differ by 0 at most, in float32" and lines["saved"] == out

    assert main(["import", out, back, "--verify"]) == 0
    assert "Compass (CompassForCausalLM)" in capsys.readouterr().out
    model = CompassForCausalLM.from_pretrained(folder, num_mtp_layers=0)
    assert_same(AutoModelForCausalLM.from_pretrained(back), model, atol=0.0)


@pytest.mark.parametrize("command", ["export", "import"])
def test_a_model_that_is_not_verified_is_not_left(folder, tmp_path, command, monkeypatch, capsys):
    assert main(["export", folder, str(tmp_path / "served")]) == 0
    monkeypatch.setattr(verifying, "TOLERANCE", -1.0)
    run, source = (export.main, folder) if command == "export" else (import_model.main, str(tmp_path / "served"))
    message = "The written model answers otherwise"
    assert message in refusal(run, capsys, [source, str(tmp_path / "out"), "--verify"])
    assert {path.name for path in tmp_path.iterdir()} == {"compass", "served"}


def test_a_config_without_architectures_is_verified(folder, tmp_path, capsys):
    for command, source, out in (
        ("export", folder, tmp_path / "served"),
        ("import", tmp_path / "served", tmp_path / "b"),
    ):
        config = Path(source) / "config.json"
        options = json.loads(config.read_text())
        del options["architectures"]
        config.write_text(json.dumps(options))
        assert main([command, str(source), str(out), "--verify"]) == 0
        assert "verified" in capsys.readouterr().out


def test_a_link_is_refused_before_the_model_is_read(folder, tmp_path, capsys, monkeypatch):
    def read(*args, **options):
        pytest.fail("the model was read")

    monkeypatch.setattr("otpo.cli.converting.source.open_source", read)
    (tmp_path / "link").symlink_to("nothing")
    argv = [folder, str(tmp_path / "link")]
    for run in (export.main, import_model.main):
        assert "is a link to nothing, which is not there" in refusal(run, capsys, argv)
    (tmp_path / "convert.py").write_text(CONVERTER)
    argv += ["--format", "gguf", "--converter", str(tmp_path / "convert.py")]
    assert "is there already" in refusal(export.main, capsys, argv)


def test_what_is_left_out_has_a_line(folder, tmp_path, capsys):
    assert main(["export", folder, str(tmp_path / "out")]) == 0
    left_out = [line for line in capsys.readouterr().out.splitlines() if line.startswith("left out")]
    assert len(left_out) == 2
    assert "1 MTP layer(s), `model.layers.2`" in left_out[0] and "generation_config.json's `use_mtp`" in left_out[1]


def test_tokenizer_template_and_generation_go_along(folder, tmp_path):
    out = tmp_path / "out"
    assert main(["export", folder, str(out)]) == 0
    left, right = (AutoTokenizer.from_pretrained(name) for name in (folder, out))
    text = [it.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False) for it in (left, right)]
    assert text[0] == text[1] and left.decode(text[0]).startswith("<|user|>the blue")
    options = json.loads((out / "generation_config.json").read_text())
    assert (options["temperature"], options["do_sample"], options["pad_token_id"]) == (0.5, True, left.pad_token_id)
    model = Qwen3MoeForCausalLM.from_pretrained(out)
    model.generate(torch.tensor([text[0]]), max_new_tokens=3)  # a model without MTP layers refuses `use_mtp`
    assert model.config.eos_token_id == left.eos_token_id


@pytest.mark.parametrize(
    "targets",
    [
        {"target_modules": ["q_proj", "v_proj"], "use_rslora": True},
        {"target_modules": ["o_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "use_dora": True},
    ],
    ids=["attention", "experts", "head"],
)
def test_an_adapter_is_merged(folder, tmp_path, targets, capsys):
    make_adapter(folder, str(tmp_path / "adapter"), **targets)
    want = with_adapter(folder, tmp_path / "adapter")
    out = str(tmp_path / "out")
    assert main(["export", str(tmp_path / "adapter"), out, "--verify"]) == 0
    assert "verified" in capsys.readouterr().out
    got = Qwen3MoeForCausalLM.from_pretrained(out)
    assert_same(got, want)
    with pytest.raises(AssertionError):
        assert_same(got, AutoModelForCausalLM.from_pretrained(folder))
    assert (Path(out) / "chat_template.jinja").is_file()  # of the model, since there is none beside the adapter


@pytest.mark.parametrize("asked", [None, "bfloat16", "float32"])
@pytest.mark.parametrize(
    "targets",
    [
        {"target_modules": ["lm_head"]},
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": "all-linear", "target_parameters": ["lm_head.weight"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    ],
    ids=["head", "embeddings", "parameter", "saved head", "saved embeddings"],
)
def test_an_adapter_on_tied_embeddings_is_merged_into_one_of_them(tmp_path, targets, asked, capsys):
    base, adapter, out = (str(tmp_path / name) for name in ("compass", "adapter", "out"))
    model = compass_model(tie_word_embeddings=True).to(torch.bfloat16 if asked else torch.float32)
    model.save_pretrained(base)
    make_adapter(base, adapter, **targets)
    want = with_adapter(base, adapter)
    assert main(["export", adapter, out, "--verify", *(["--dtype", asked] if asked else [])]) == 0
    assert "verified" in capsys.readouterr().out
    got = Qwen3MoeForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert not got.config.tie_word_embeddings
    if asked == "bfloat16":
        want = merge_adapter(want)
        for parameter in want.parameters():
            parameter.data = parameter.data.bfloat16().float()
    assert_same(got, want)


def test_embeddings_that_stay_the_same_stay_tied(tmp_path, capsys):
    base, out = str(tmp_path / "compass"), tmp_path / "out"
    compass_model(tie_word_embeddings=True).save_pretrained(base)
    for name, targets in (
        ("plain", {"target_modules": ["q_proj"]}),
        ("saved", {"modules_to_save": ["embed_tokens"], "target_modules": ["q_proj"], "ensure_weight_tying": True}),
    ):
        make_adapter(base, str(tmp_path / name), **targets)
        want = with_adapter(base, tmp_path / name)
        assert main(["export", str(tmp_path / name), str(out / name), "--verify"]) == 0
        got = Qwen3MoeForCausalLM.from_pretrained(out / name)
        assert got.lm_head.weight is got.model.embed_tokens.weight
        assert_same(got, want)


def test_a_reference_of_an_adapter_on_tied_embeddings_is_merged_alike(tmp_path):
    base, adapter = str(tmp_path / "compass"), str(tmp_path / "adapter")
    compass_model(tie_word_embeddings=True).save_pretrained(base)
    make_adapter(base, adapter, target_modules=["embed_tokens"])
    want = with_adapter(base, adapter)
    args = TrainingArguments(str(tmp_path / "run"), use_cpu=True)
    args.trust_remote_code = False
    got = load_reference(find_origin("reference", adapter), args, {"dtype": "float32"})
    assert_same(got, want)
    got.tie_weights()
    assert_same(got, want)


def test_an_adapter_is_merged_in_float32(folder, tmp_path):
    base, adapter, out = str(tmp_path / "half"), str(tmp_path / "adapter"), str(tmp_path / "out")
    AutoModelForCausalLM.from_pretrained(folder).to(torch.bfloat16).save_pretrained(base)
    make_adapter(base, adapter, target_modules=["q_proj", "o_proj"])
    want = with_adapter(base, adapter)
    assert main(["export", adapter, out, "--verify", "--dtype", "float32"]) == 0
    assert_same(Qwen3MoeForCausalLM.from_pretrained(out), want)
    assert main(["export", adapter, str(tmp_path / "kept"), "--verify"]) == 0
    kept = Qwen3MoeForCausalLM.from_pretrained(tmp_path / "kept", dtype="auto")
    assert {parameter.dtype for parameter in kept.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("where", ["option", "folder", "environment", "path"])
def test_gguf_is_llama_cpps_own(folder, tmp_path, where, monkeypatch, capsys):
    script = tmp_path / "llama.cpp" / "convert_hf_to_gguf.py"
    script.parent.mkdir()
    script.write_text(CONVERTER)
    script.chmod(0o755)
    argv = ["export", folder, str(tmp_path / "out.gguf"), "--format", "gguf", "--outtype", "f16"]
    if where == "option":
        argv += ["--converter", str(script)]
    elif where == "folder":
        argv += ["--converter", str(script.parent)]
    elif where == "environment":
        monkeypatch.setenv("LLAMA_CPP", str(script.parent))
    else:
        monkeypatch.setenv("PATH", str(script.parent), prepend=":")
    assert main(argv) == 0
    assert (tmp_path / "out.gguf").read_text() == "qwen3_moe --outtype f16"
    assert f"{script}, `--outtype f16`" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"compass", "llama.cpp", "out.gguf"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_shared_experts": 1}, "`num_shared_experts=1` with `--format gguf`"),
        ({"norm_topk_prob": False}, "`norm_topk_prob=False` with `--format gguf`"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "`rope_type=dynamic` with `--format gguf`",
        ),
        (
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0, "beta_fast": 3.0}},
            "`beta_fast` of `rope_parameters` with `--format gguf`",
        ),
        ({"num_experts_per_tok": 1}, "failed: cannot do one expert"),
    ],
    ids=str,
)
def test_what_llama_cpp_computes_otherwise_is_refused(tmp_path, changes, message, capsys):
    compass_model(**changes).save_pretrained(tmp_path / "compass")
    script = tmp_path / "convert.py"
    script.write_text(CONVERTER)
    out = tmp_path / "out.gguf"
    argv = [str(tmp_path / "compass"), str(out), "--format", "gguf", "--converter", str(script)]
    assert message in refusal(export.main, capsys, argv)
    assert {path.name for path in tmp_path.iterdir()} == {"compass", "convert.py"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--format", "gguf"], "which is neither on the path nor in `$LLAMA_CPP`"),
        (["--format", "gguf", "--converter", "nowhere"], "nowhere: there is no convert_hf_to_gguf.py"),
        (["--max_shard_size", "much"], "`--max_shard_size=much`: write a number and a unit"),
        (["--max_shard_size", "0MB"], "`--max_shard_size=0MB`"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
    ],
    ids=str,
)
def test_options_are_refused(folder, tmp_path, words, message, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    assert message in refusal(export.main, capsys, [folder, str(tmp_path / "out"), *words])
    assert {path.name for path in tmp_path.iterdir()} == {"compass"}


def test_models_are_refused(folder, moe_folder, tmp_path, capsys):
    out = str(tmp_path / "out")
    assert "`model_type=qwen3_moe`. `otpo export` writes Compass" in refusal(export.main, capsys, [moe_folder, out])
    assert "`model_type=compass`: Compass models are made of" in refusal(import_model.main, capsys, [folder, out])
    assert "there is no such folder" in refusal(export.main, capsys, ["./nowhere", out])
    assert "there is no config.json" in refusal(export.main, capsys, [str(tmp_path), out])
    assert "is there already" in refusal(export.main, capsys, [folder, folder])
    config = Path(folder) / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "num_experts": 0}))
    message = refusal(export.main, capsys, [folder, out])
    assert "config.json can't be read: `num_experts` must be at least 1" in message
