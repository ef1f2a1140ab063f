"""Adapters of models whose experts are spread over two processes, against one process with the whole model."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from adapted_models import adapted
from cli_helpers import arguments, launched, python
from compass_helpers import TINY, compass_model
from expert_parallel_helpers import CLOSE, ENVIRONMENT, FIRST, by_step, result
from expert_parallel_worker import arguments as training_arguments
from expert_parallel_worker import losses, rows
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Trainer,
)

from moe_backbone.expert_parallel.adapters import FactorA, FactorB, LowRank
from moe_backbone.expert_parallel.resume import (
    ADAPTER_STATES_FILE,
    LAYOUT_FILE,
    Layout,
    check_adapter_checkpoint,
    check_layout,
)

pytest.importorskip("deepspeed", reason="DeepSpeed is an extra")
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="DeepSpeed compiles its operator for the CPU")
SIZES = {**TINY, "router_aux_loss_coef": 0.1}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    sizes = {"num_experts": 4, "num_mtp_layers": 1, "num_shared_experts": 1, "router_aux_loss_coef": 0.1}
    compass_model(**sizes).save_pretrained(folder / "compass")
    qwen = Qwen3MoeConfig(**SIZES, moe_intermediate_size=24, num_experts=4)
    Qwen3MoeForCausalLM(qwen).save_pretrained(folder / "qwen3_moe")
    mixtral = MixtralConfig(**SIZES, intermediate_size=24, num_local_experts=4)
    MixtralForCausalLM(mixtral).save_pretrained(folder / "mixtral")
    return {name: str(folder / name) for name in ("compass", "qwen3_moe", "mixtral")}


@pytest.fixture(scope="module")
def alone(models, tmp_path_factory):
    """Losses of one process that takes the rows of both, one after the other."""
    model = adapted(AutoModelForCausalLM.from_pretrained(models["compass"]), "all")
    args = training_arguments(tmp_path_factory.mktemp("alone"), gradient_accumulation_steps=2, save_strategy="no")
    trainer = Trainer(model=model, args=args, train_dataset=rows())
    trainer.train()
    return losses(trainer)


def assert_plain_adapter(folder: Path, found, model: str):
    """What was saved loads in one process, and merges, and is the adapter that was trained."""
    ids = torch.stack([row["input_ids"] for row in rows()[:2]])
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), folder / "final").eval()
    want = torch.tensor(found["logits"])
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits.flatten()[:50], want, rtol=1e-4, atol=1e-5)
        merged = loaded.merge_and_unload()
        torch.testing.assert_close(merged(ids).logits.flatten()[:50], want, rtol=1e-4, atol=1e-5)


def assert_same_steps(cases, found):
    for (name, *_, kind), errors in zip(cases, found, strict=True):
        # two layers and an MTP layer, if there is one; 4 tensors of attention and 2 of experts, 2 factors of each
        tensors = {"attention": 4, "experts": 2, "all": 6}[kind] * 2 * (3 if "compass" in name else 2)
        assert sum(part.startswith("gradient") for part in errors) == tensors
        assert sum(part.startswith("weight") for part in errors) == tensors
        assert {"loss", "reference"} <= errors.keys()
        assert max(errors.values()) < 1e-3, (name, kind, max(errors, key=errors.__getitem__))


@pytest.mark.lengthy
def test_five_steps_of_deepspeed_are_those_of_the_whole_model(models, tmp_path):
    """Each stage of ZeRO; adapters of attention, of experts, and of both; three architectures."""
    cases = [("compass", 1, "attention"), ("compass", 2, "all"), ("compass", 3, "all"), ("qwen3_moe", 1, "all")]
    cases += [("mixtral", 3, "experts")]
    cases = [(models[name], *rest) for name, *rest in cases]
    assert_same_steps(cases, result("engines_of_adapters", tmp_path, cases=cases))


@pytest.mark.lengthy
def test_five_steps_with_all_tokens_gathered(models, tmp_path):
    cases = [(models["compass"], 2, "all"), (models["qwen3_moe"], 3, "experts")]
    assert_same_steps(cases, result("engines_of_adapters", tmp_path, cases=cases, gathers=True))


@pytest.mark.lengthy
def test_five_steps_of_transformers_are_those_of_the_whole_model(models, tmp_path):
    pytest.importorskip("transformers.distributed.expert_parallel", reason="transformers 5.21 or later")
    cases = [("compass", "attention"), ("compass", "all"), ("qwen3_moe", "experts"), ("mixtral", "all")]
    cases = [(models[name], kind) for name, kind in cases]
    assert_same_steps(cases, result("native_adapters", tmp_path, cases=cases))


@pytest.fixture(scope="module")
def run(models, tmp_path_factory):
    """A run of ZeRO-1 in two processes that share the experts, with its checkpoints."""
    folder = tmp_path_factory.mktemp("run")
    return folder, result("train", folder, model=models["compass"], stage=1, kind="all")


@pytest.fixture(scope="module")
def native_run(models, tmp_path_factory):
    """The same with experts that transformers spreads."""
    pytest.importorskip("transformers.distributed.expert_parallel", reason="transformers 5.21 or later")
    folder = tmp_path_factory.mktemp("native")
    return folder, result("native", folder, model=models["compass"], kind="all")


@pytest.mark.lengthy
@pytest.mark.parametrize("engine", ["run", "native_run"])
def test_a_trainer_is_that_of_one_process_and_saves_a_plain_adapter(request, models, alone, engine):
    folder, found = request.getfixturevalue(engine)
    assert by_step(found) == pytest.approx(alone, abs=CLOSE)
    assert_plain_adapter(folder, found, models["compass"])
    checkpoint = folder / "checkpoint-2"
    assert not list(checkpoint.glob("model*")) and not list(checkpoint.glob("global_step2/*model_states*"))
    states = load_file(checkpoint / "global_step2" / ADAPTER_STATES_FILE)
    assert sum(tensor.nbytes for tensor in states.values()) == 3 * sum(  # values and the two means of gradients
        tensor.nbytes for tensor in load_file(checkpoint / "adapter_model.safetensors").values()
    )


@pytest.mark.lengthy
@pytest.mark.parametrize(
    ("saved", "name", "options"),
    [("native_run", "train", {"stage": 3, "ep_size": 1}), ("run", "train", {"stage": 2}), ("run", "native", {})],
)
def test_a_checkpoint_resumes_in_another_layout_and_engine(request, models, tmp_path, alone, saved, name, options):
    checkpoint = request.getfixturevalue(saved)[0] / "checkpoint-2"
    found = result(name, tmp_path, model=models["compass"], resume=str(checkpoint), kind="all", **options)
    assert by_step(found) == pytest.approx(alone, abs=CLOSE)
    assert_plain_adapter(tmp_path, found, models["compass"])


@pytest.mark.lengthy
@pytest.mark.parametrize(("name", "options"), [("train", {"stage": 3}), ("train", {"stage": 2}), ("native", {})])
def test_the_best_adapter_is_loaded_at_the_end(models, tmp_path, name, options):
    """The first one of a run that is told that a greater loss is better."""
    found = result(name, tmp_path, model=models["compass"], kind="all", changes=FIRST, **options)
    assert found["best"] == "checkpoint-1"
    best = load_file(tmp_path / "checkpoint-1" / "adapter_model.safetensors")
    last = load_file(tmp_path / "checkpoint-4" / "adapter_model.safetensors")
    for part, tensor in load_file(tmp_path / "final" / "adapter_model.safetensors").items():
        assert torch.equal(tensor, best[part]), part
        assert not torch.equal(tensor, last[part]), part


@pytest.mark.lengthy
@pytest.mark.parametrize("backend", ["deepspeed", "transformers"])
def test_alignment_from_the_command_line(compass_folder, pairs_file, tmp_path, backend):
    """The reference is the model without the adapter: the first margin is zero, spread or not."""
    found, saved = {}, {}
    for size in (1, 2):
        out = tmp_path / str(size)
        changes = {"report": out / "report.json", "expert_parallel_size": size, "expert_parallel_backend": backend}
        changes |= {"use_peft": True, "lora_r": 4, "lora_dropout": 0, "lora_target_modules": ["q_proj", "v_proj"]}
        changes |= {"lora_target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], "beta": 0.5}
        done = python(
            *launched("otpo.cli.align", *arguments(compass_folder, pairs_file, out, **changes)), **ENVIRONMENT
        )
        assert done.returncode == 0, done.stderr[-4000:]
        assert "reference  the model without its adapter" in done.stdout
        assert ("parallel   2 of 4 in each process" in done.stdout) == (size == 2)
        found[size] = json.loads((out / "report.json").read_text())["metrics"]["train"]
        saved[size] = load_file(out / "adapter_model.safetensors")
    for name in ("loss", "aux_loss", "rewards/margins"):
        assert found[2][name] == pytest.approx(found[1][name], rel=1e-3, abs=1e-5), name
    assert saved[1].keys() == saved[2].keys() and len(saved[1]) == 24
    for name, tensor in saved[1].items():
        torch.testing.assert_close(saved[2][name], tensor, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("rank", [1, 3, 4])
@pytest.mark.parametrize("counts", [[2, 0, 5], [0, 0, 0], [1, 0, 0]])
def test_factors_add_what_peft_adds_to_the_tensor(rank, counts):
    """By PEFT's own product of the factors, with uneven rows of experts and none."""
    model = nn.Module()
    model.experts = nn.Module()
    model.experts.gate_up_proj = nn.Parameter(torch.randn(3, 8, 4))
    config = LoraConfig(r=rank, lora_alpha=5, target_modules=[], target_parameters=["experts.gate_up_proj"])
    wrapper = get_peft_model(model, config).base_model.model.experts
    wrapper.lora_B["default"].weight.data.normal_()
    delta = wrapper.get_delta_weight("default")
    a, b = wrapper.lora_A["default"].weight, wrapper.lora_B["default"].weight
    adapter = LowRank("gate_up_proj", FactorA(a, 3), FactorB(b, 3), wrapper.scaling["default"])
    x = torch.randn(sum(counts), 4)
    got = adapter(x, torch.tensor(counts).cumsum(0, dtype=torch.int32))
    want = torch.cat([part @ delta[expert].T for expert, part in enumerate(x.split(counts))])
    torch.testing.assert_close(got, want)


def test_parts_of_factors_join_to_the_whole():
    a, b = torch.arange(24.0).view(6, 4), torch.arange(30.0).view(5, 6)  # 2 experts of rank 3, or 6 of rank 1
    for factor, whole in ((FactorA, a), (FactorB, b)):
        for ep_size, experts in ((1, 2), (2, 1), (2, 3), (3, 2)):
            parts = [factor.part(whole, ep_size, rank, experts) for rank in range(ep_size)]
            assert len({part.shape for part in parts}) == 1
            assert torch.equal(factor.join(parts, experts), whole)
            assert factor.whole_shape(parts[0].shape, ep_size) == whole.shape
    assert torch.equal(FactorB.part(b, 2, 1, 1), b[:, 1::2])  # in B the expert changes fastest


def test_checkpoints_of_the_other_kind(tmp_path):
    with pytest.raises(ValueError, match=r"has no adapter_states.safetensors.*start from its weights"):
        check_adapter_checkpoint(tmp_path)
    (tmp_path / "global_step4").mkdir()
    (tmp_path / "global_step4" / ADAPTER_STATES_FILE).touch()
    check_adapter_checkpoint(tmp_path)
    (tmp_path / LAYOUT_FILE).write_text(json.dumps(Layout(2, 2, 2)._asdict()))
    with pytest.raises(ValueError, match=r"has the states of an adapter.*`use_peft`"):
        check_layout(tmp_path, Layout(2, 2, 2), False)
