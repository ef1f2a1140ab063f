"""`--experts_implementation`: what the header says runs the experts is what runs them, of the reference too."""

import copy
from collections import Counter

import pytest
import torch
from cli_helpers import arguments, refusal
from compass_helpers import TINY, compass_model
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen3Config, Qwen3MoeConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moe_backbone.experts_choice import find_experts
from otpo import OTPOConfig, OTPOTrainer
from otpo.cli import align, pretrain, sft
from otpo.cli.models.experts import Request, read_request, set_answering_experts, set_experts
from otpo.cli.options.run_options import RunArguments

pytestmark = pytest.mark.usefixtures("own_process")
QWEN = Qwen3MoeConfig(**TINY, moe_intermediate_size=24, num_experts=5)
MIXTRAL = MixtralConfig(**TINY, intermediate_size=24, num_local_experts=5)
DENSE = Qwen3Config(**{name: size for name, size in TINY.items() if name != "num_experts_per_tok"})


def model_of(config, **options):
    return AutoModelForCausalLM.from_config(copy.deepcopy(config), **options)


def running(model) -> str:
    return model.config._experts_implementation


@pytest.fixture
def calls(monkeypatch) -> Counter:
    """How often each experts function was called."""
    counted: Counter = Counter()

    def counting(name, function):
        def run(*args, **kwargs):
            counted[name] += 1
            return function(*args, **kwargs)

        return run

    for name in ("memcpy", "grouped_mm", "batched_mm"):
        function = counting(name, ALL_EXPERTS_FUNCTIONS[name])
        monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS._global_mapping, name, function)
    return counted


def header(printed: str) -> str | None:
    return next((line[11:] for line in printed.splitlines() if line.startswith("experts    ")), None)


def trainer_of(command, model: str, data: str, output, **changes):
    parsed = command.make_parser().parse_args_into_dataclasses(
        arguments(model, data, output, **changes), look_for_args_file=False
    )
    trainer = command.make_trainer(*parsed)
    return trainer, command.describe(trainer, parsed).get("experts")


@pytest.fixture(scope="module")
def completions(tmp_path_factory) -> str:
    file = tmp_path_factory.mktemp("completions") / "rows.jsonl"
    file.write_text('{"prompt": "the red", "completion": "box"}\n' * 4)
    return str(file)


# What is set


@pytest.mark.parametrize("config", [QWEN, MIXTRAL, "compass"])
def test_auto_runs_memcpy_on_a_gpu_and_says_so(config, calls):
    policy, reference = (compass_model() if config == "compass" else model_of(config) for _ in range(2))
    assert set_experts(Request(), [policy, reference], "cuda", True, True) == "run by memcpy, the reference's too"
    for model in (policy, reference):
        assert running(model) == "memcpy"
        calls.clear()
        model(torch.randint(0, 61, (2, 7)), use_cache=False)
        assert set(calls) == {"memcpy"}


@pytest.mark.parametrize(
    ("model", "device", "triton", "told", "runs"),
    [
        (lambda: model_of(QWEN), "cpu", True, "run by grouped_mm", "grouped_mm"),
        (lambda: model_of(QWEN, experts_implementation="eager"), "cpu", True, "run by grouped_mm", "grouped_mm"),
        (
            lambda: model_of(QWEN),
            "cuda",
            False,
            "run by grouped_mm, not by memcpy: Triton is not installed",
            "grouped_mm",
        ),
        (
            lambda: compass_model(moe_intermediate_size=20),
            "cuda",
            True,
            "run by eager, not by memcpy or grouped_mm: `moe_intermediate_size=20` of CompassExperts must be a "
            "multiple of 8 in this precision",
            "eager",
        ),
    ],
)
def test_auto_says_why_it_is_not_memcpy(model, device, triton, told, runs):
    made = model()
    assert set_experts(Request(), [made], device, True, triton) == told
    assert running(made) == runs


def test_a_model_that_answers_on_a_gpu_is_not_left_to_what_copies_weights_for_each_token():
    """transformers takes `batched_mm` in place of `grouped_mm` there, where tokens are written one by one."""
    model = compass_model()
    assert set_answering_experts(model) is None and running(model) == "grouped_mm"  # as it is on the CPU
    told = set_answering_experts(model, "cuda", has_triton=False)
    assert str(told).endswith("Triton is not installed; by batched_mm as tokens are written")
    assert set_answering_experts(model, "cuda", True) == "run by memcpy" and running(model) == "memcpy"
    assert "grouped_mm" not in model.get_experts_implementation().values()
    assert set_answering_experts(model_of(DENSE), "cuda", True) is None


def test_a_reference_of_its_own_kind_is_told_apart():
    policy, reference = compass_model(), compass_model(hidden_size=36)
    told = set_experts(Request(), [policy, reference], "cuda", True, True)
    assert told.startswith(
        "run by memcpy; the reference's run by eager, not by memcpy or grouped_mm: `hidden_size=36`"
    )
    assert (running(policy), running(reference)) == ("memcpy", "eager")
    dense = model_of(DENSE)
    assert set_experts(Request(), [policy, dense], "cpu", False) == "run by grouped_mm"
    assert set_experts(Request(), [dense, policy], "cuda", False, True) == "of the reference, run by memcpy"


def test_a_model_that_transformers_would_run_otherwise_without_a_word(monkeypatch):
    model = model_of(QWEN)
    monkeypatch.setattr(type(model), "_can_set_experts_implementation", classmethod(lambda cls: False))
    told = set_experts(Request(), [model], "cuda", True, True)
    assert told == "run by grouped_mm, not by memcpy: transformers keeps grouped_mm for Qwen3MoeForCausalLM"
    with pytest.raises(ValueError, match="asks for experts_implementation=memcpy, and transformers runs grouped_mm"):
        set_experts(Request("memcpy"), [model], "cuda", True, True)
    assert running(model) == "grouped_mm"


def test_quantized_experts_stay_as_they_were_loaded():
    model = model_of(QWEN)
    for layer in model.model.layers:
        experts = layer.mlp.experts
        experts.gate_up_proj = nn.Parameter(experts.gate_up_proj.to(torch.float8_e4m3fn), requires_grad=False)
    told = set_experts(Request(), [model], "cuda", True, True)
    assert told == "run by grouped_mm, not by memcpy: the weights of Qwen3MoeExperts are quantized (float8_e4m3fn)"
    with pytest.raises(ValueError, match=r"=memcpy, which can't run here: .* quantized .*, or leave it out"):
        set_experts(Request("memcpy"), [model], "cuda", True, True)


@pytest.mark.parametrize(
    ("name", "model", "message"),
    [
        ("memcpy", lambda: model_of(DENSE), "=memcpy, and Qwen3ForCausalLM is a model without experts. Leave it out"),
        ("eager", lambda: model_of(DENSE), "=eager, and Qwen3ForCausalLM is a model without experts"),
        (
            "memcpy",
            lambda: compass_model(hidden_size=36),
            "`hidden_size=36` of CompassExperts must be a multiple of 8",
        ),
        ("grouped_mm", lambda: compass_model(hidden_size=36), "or set `experts_implementation` to eager or auto"),
        ("grouped_mm", lambda: model_of(QWEN, dtype=torch.float64), "grouped products take no float64"),
    ],
)
def test_what_is_asked_for_and_cannot_run(name, model, message):
    with pytest.raises(ValueError) as raised:
        set_experts(Request(name), [model()], "cuda", True, True)
    assert message in str(raised.value) and str(raised.value).startswith("`experts_implementation` asks for")


def test_memcpy_without_triton_is_refused_on_a_gpu_and_runs_in_torch_on_the_cpu(calls):
    model = model_of(QWEN)
    with pytest.raises(ValueError, match="Triton is not installed"):
        set_experts(Request("memcpy"), [model], "cuda", True, False)
    assert set_experts(Request("memcpy"), [model], "cpu", True, False) == "run by memcpy (`experts_implementation`)"
    model(torch.randint(0, 61, (1, 1)), use_cache=False)
    assert set(calls) == {"memcpy"}


# What the options say


def test_what_a_request_is_read_from():
    options = RunArguments()
    assert read_request(options) == read_request(options, {"dtype": "auto"}) == Request()
    assert read_request(options, {"experts_implementation": "eager"}) == Request("eager", "model_init_kwargs")
    options = RunArguments(experts_implementation="memcpy", expert_parallel_size=2)
    assert read_request(options) == Request("memcpy", spread_by="deepspeed")
    with pytest.raises(
        ValueError, match=r"=memcpy`, and `model_init_kwargs` has experts_implementation=eager. Remove"
    ):
        read_request(options, {"experts_implementation": "eager"})
    options.experts_implementation = "eager"
    with pytest.raises(
        ValueError, match=r"`expert_parallel_size=2`: DeepSpeed trains a layer in place of the experts"
    ):
        read_request(options)
    options.expert_parallel_backend = "transformers"
    assert read_request(options) == Request("eager", spread_by="transformers")


def test_experts_that_are_spread_run_as_whatever_spreads_them_says():
    model = compass_model(implementation="grouped_mm")
    told = set_experts(Request(spread_by="deepspeed"), [model], "cpu", False)
    assert told == "run by the layers of expert parallelism, whose rows memcpy moves"
    assert set_experts(Request(spread_by="transformers"), [model], "cpu", False) == "run by memcpy"
    assert running(model) == "memcpy"
    with pytest.raises(
        ValueError, match=r"`expert_parallel_size` moves rows by memcpy, which can't run here: `hidden"
    ):
        set_experts(Request(spread_by="deepspeed"), [compass_model(hidden_size=36)], "cpu", True)


@pytest.mark.parametrize("command", [pretrain, sft, align])
def test_help_names_memcpy(command):
    text = " ".join(command.make_parser().format_help().split())
    assert "--experts_implementation" in text
    assert "auto, memcpy, grouped_mm, batched_mm, eager" in text and "auto is memcpy on a GPU" in text
    assert text.count("--experts_implementation TEXT") == 1


# What the commands run


@pytest.mark.parametrize("folder", ["compass", "qwen3_moe"])
@pytest.mark.parametrize("name", [None, "memcpy", "batched_mm", "eager"])
def test_align_runs_policy_and_reference_as_the_header_says(
    compass_folder, moe_folder, pairs_file, tmp_path, calls, folder, name
):
    model = compass_folder if folder == "compass" else moe_folder
    trainer, told = trainer_of(align, model, pairs_file, tmp_path, experts_implementation=name, max_steps=1)
    expected = name or "grouped_mm"
    source = " (`experts_implementation`)" if name else ""
    assert told == f"run by {expected}{source}, the reference's too"
    assert running(trainer.model) == running(trainer.ref_model) == expected
    trainer.train()
    assert set(calls) == ({expected} - {"eager"})


def test_a_reference_that_is_computed_beforehand_is_run_so_too(moe_folder, pairs_file, tmp_path, calls):
    changes = {"precompute_ref_log_probs": True, "experts_implementation": "memcpy"}
    trainer, told = trainer_of(align, moe_folder, pairs_file, tmp_path, **changes)
    assert trainer.ref_model is None and told == "run by memcpy (`experts_implementation`)"
    assert set(calls) == {"memcpy"}  # by the constructor alone


def test_a_reference_that_is_named_and_an_adapter(compass_folder, pairs_file, tmp_path):
    changes = {"ref_model_name_or_path": compass_folder, "experts_implementation": "memcpy"}
    trainer, _ = trainer_of(align, compass_folder, pairs_file, tmp_path, **changes)
    assert running(trainer.model) == running(trainer.ref_model) == "memcpy"
    changes = {"use_peft": True, "lora_target_modules": "all-linear", "experts_implementation": "memcpy"}
    trainer, told = trainer_of(align, compass_folder, pairs_file, tmp_path, **changes)
    assert running(trainer.model.get_base_model()) == "memcpy" and told == "run by memcpy (`experts_implementation`)"


def test_sft_runs_what_its_header_says(moe_folder, completions, tmp_path, calls):
    trainer, told = trainer_of(sft, moe_folder, completions, tmp_path, experts_implementation="memcpy", max_steps=1)
    assert told == "run by memcpy (`experts_implementation`); load-balancing loss weighed with 0.1, no z-loss"
    trainer.train()
    assert running(trainer.model) == "memcpy" and set(calls) == {"memcpy"}


def test_what_a_recipes_model_init_kwargs_load_stays(moe_folder, pairs_file, tmp_path):
    kwargs = '{"experts_implementation": "batched_mm"}'
    trainer, told = trainer_of(align, moe_folder, pairs_file, tmp_path, model_init_kwargs=kwargs)
    assert told == "run by batched_mm (`model_init_kwargs`), the reference's too"
    assert running(trainer.model) == running(trainer.ref_model) == "batched_mm"


@pytest.mark.parametrize("command", [align, sft])
def test_dense_models_say_nothing_and_take_no_name(command, model_folder, pairs_file, completions, tmp_path, capsys):
    data = pairs_file if command is align else completions
    assert command.main(arguments(model_folder, data, tmp_path, max_steps=1)) == 0
    assert header(capsys.readouterr().out) is None
    argv = arguments(model_folder, data, tmp_path, experts_implementation="memcpy")
    message = refusal(command.main, capsys, argv)
    assert (
        "`experts_implementation` asks for experts_implementation=memcpy, and Qwen3ForCausalLM is a model" in message
    )


@pytest.mark.parametrize("command", [align, sft])
def test_an_unknown_name_is_refused_before_anything_loads(command, tmp_path, capsys):
    argv = arguments("nowhere/nothing", "nowhere.jsonl", tmp_path, experts_implementation="fast")
    message = refusal(command.main, capsys, argv)
    assert (
        "`experts_implementation=fast` is not known. Set one of: auto, memcpy, grouped_mm, batched_mm, eager"
        in message
    )


def test_another_implementation_may_resume(moe_folder, pairs_file, tmp_path, capsys):
    saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    assert align.main(arguments(moe_folder, pairs_file, tmp_path, **saving)) == 0
    assert header(capsys.readouterr().out) == "run by grouped_mm, the reference's too"
    changes = {**saving, "resume_from_checkpoint": tmp_path / "checkpoint-1", "experts_implementation": "memcpy"}
    assert align.main(arguments(moe_folder, pairs_file, tmp_path, **changes)) == 0
    printed = capsys.readouterr().out
    assert header(printed) == "run by memcpy (`experts_implementation`), the reference's too"
    assert "resuming   from" in printed


def test_a_trainer_of_pythons_leaves_a_model_as_it_was_loaded(compass_folder, tmp_path, pairs_file):
    from datasets import load_dataset
    from transformers import AutoTokenizer

    rows = load_dataset("json", data_files=pairs_file, split="train")
    for name in ("grouped_mm", "batched_mm"):
        policy, reference = (
            AutoModelForCausalLM.from_pretrained(compass_folder, mtp_loss_coef=0.0, experts_implementation=name)
            for _ in range(2)
        )
        args = OTPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none")
        tokenizer = AutoTokenizer.from_pretrained(compass_folder)
        trainer = OTPOTrainer(policy, reference, args=args, train_dataset=rows, processing_class=tokenizer)
        assert running(trainer.model) == running(trainer.ref_model) == name


def test_experts_that_an_adapter_trains_as_a_copy_run_as_the_others(moe_folder):
    """PEFT copies their module, configuration included, which transformers' own setter does not reach."""
    model = AutoModelForCausalLM.from_pretrained(moe_folder, dtype=torch.float32)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["experts"]))
    for name in ("memcpy", "eager", "grouped_mm"):
        assert (
            set_experts(Request(name), [adapted], "cpu", halved=False) == f"run by {name} (`experts_implementation`)"
        )
        assert {kind.running for kind in find_experts(adapted)} == {name}
