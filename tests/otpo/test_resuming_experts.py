"""Models whose files have a key for each expert resume, and end with their best checkpoint, as any other.

transformers' Trainer leaves such experts as they are in memory. Here the resumed run starts from a model that is
elsewhere in each weight, so what a checkpoint does not restore shows.
"""

from pathlib import Path

import pytest
import torch
from compass_helpers import TINY
from expert_parallel_worker import arguments, rows
from helpers import assert_same_parameters, make_pairs, options, parameters
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    MixtralConfig,
    OlmoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Trainer,
)

from otpo import OTPOTrainer
from otpo.cli import sft
from otpo.trl_seam import ConvertedWeights, load_converted_weights

CONFIGS = {
    "qwen3_moe": Qwen3MoeConfig(**TINY, moe_intermediate_size=24, num_experts=5),
    "mixtral": MixtralConfig(**TINY, intermediate_size=24, num_local_experts=5),
    "olmoe": OlmoeConfig(**TINY, intermediate_size=24, num_experts=5, tie_word_embeddings=True, pad_token_id=0),
    "deepseek_v3": DeepseekV3Config(
        **{**TINY, "num_key_value_heads": 4, "head_dim": 4, "n_routed_experts": 4, "n_group": 2, "topk_group": 1},
        **{"intermediate_size": 40, "moe_intermediate_size": 24, "q_lora_rank": 16, "kv_lora_rank": 16},
        **{"qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "first_k_dense_replace": 1},
    ),
}
DENSE = Qwen3Config(**{name: size for name, size in TINY.items() if name != "num_experts_per_tok"})


class Resuming(ConvertedWeights, Trainer):
    pass


def model_of(config, moved: float = 0.0):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(moved)
    return model


def trained(folder, config, of_class=Resuming, moved=0.0, resume=None, **changes):
    args = arguments(folder, max_steps=4, save_steps=1, **changes)
    trainer = of_class(model_of(config, moved), args, train_dataset=rows(), eval_dataset=rows()[:4])
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def in_shards(folder: Path) -> None:
    """Splits a checkpoint's file so that no file has all matrices of an expert."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="10KB")
    assert len(list(folder.glob("*.safetensors"))) > 3


@pytest.mark.parametrize("name", CONFIGS)
def test_resuming_is_the_uninterrupted_run(name, tmp_path):
    """A whole file, and shards; what is kept and loaded at the end is the best checkpoint."""
    best = {"eval_strategy": "steps", "eval_steps": 1, "save_total_limit": 2, "load_best_model_at_end": True}
    best |= {"metric_for_best_model": "eval_loss", "greater_is_better": True, "learning_rate": 1e-3}
    whole = trained(tmp_path / "whole", CONFIGS[name], **best)
    kept = sorted(path.name for path in (tmp_path / "whole").glob("checkpoint-*"))
    first = Path(str(whole.state.best_model_checkpoint))
    assert kept == [first.name, "checkpoint-4"]  # the losses fall, and greater was said to be better
    assert first.name in ("checkpoint-1", "checkpoint-2")
    assert_same_parameters(parameters(whole.model), parameters(AutoModelForCausalLM.from_pretrained(first)))

    for shards in (False, True):
        if shards:
            in_shards(first)
        resumed = trained(tmp_path / f"again-{shards}", CONFIGS[name], moved=0.5, resume=str(first), **best)
        assert losses(resumed) == losses(whole)
        last = tmp_path / f"again-{shards}" / "checkpoint-4"
        finals = [AutoModelForCausalLM.from_pretrained(f) for f in (last, tmp_path / "whole" / "checkpoint-4")]
        assert_same_parameters(*(model.state_dict() for model in finals))
        assert_same_parameters(parameters(resumed.model), parameters(whole.model))


def test_transformers_own_trainer_does_not_load_experts_yet(tmp_path):
    """Once it does, `otpo.trl_seam.ConvertedWeights` and `load_converted_weights` have nothing left to do."""
    config = CONFIGS["qwen3_moe"]
    trainer = trained(tmp_path, config, Trainer)
    saved = parameters(AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-4"))
    trainer.model = model_of(config, moved=0.5)
    before = parameters(trainer.model)
    trainer._load_from_checkpoint(str(tmp_path / "checkpoint-4"))
    after = parameters(trainer.model)
    for name in after:
        mended = f"transformers' Trainer loads {name} now: remove `otpo.trl_seam.ConvertedWeights`"
        assert torch.equal(after[name], before[name] if ".experts." in name else saved[name]), mended


@pytest.mark.parametrize("of_class", [Resuming, Trainer])
def test_a_finished_run_takes_no_further_step(of_class, tmp_path):
    """As of one that was killed while it saved its model; an epoch has 32 steps here."""
    config = CONFIGS["mixtral"] if of_class is Resuming else DENSE
    whole = trained(tmp_path / "whole", config, of_class)
    last = str(tmp_path / "whole" / "checkpoint-4")
    resumed = trained(tmp_path / "again", config, of_class, resume=last)
    if of_class is Trainer:
        mended = "transformers' Trainer stops at the last step now: remove `otpo.trl_seam.NoStepTooMany`"
        assert resumed.state.global_step == 5, mended
    else:
        assert resumed.state.global_step == 4 and losses(resumed) == losses(whole)
        assert_same_parameters(parameters(resumed.model), parameters(whole.model))


def test_what_the_trainer_can_load_is_left_to_it(tmp_path):
    trainer = trained(tmp_path, DENSE)
    assert not load_converted_weights(trainer, str(tmp_path / "checkpoint-4"))


@pytest.mark.parametrize("lacks", ["model.norm.weight", "a layer"])
def test_a_checkpoint_without_some_weights_is_refused(tmp_path, lacks):
    config = CONFIGS["qwen3_moe"]
    trainer, folder = trained(tmp_path, config), tmp_path / "checkpoint-4"
    if lacks == "a layer":
        trainer.model, lacks = (
            model_of(Qwen3MoeConfig(**{**config.to_dict(), "num_hidden_layers": 3})),
            "model.layers.2",
        )
    else:
        weights = load_file(folder / "model.safetensors")
        del weights[lacks]
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"checkpoint-4` lacks weights of the model: .*{lacks}"):
        load_converted_weights(trainer, str(folder))


def test_otpo_resumes_qwen3_moe(moe_folder, tmp_path):
    def make(moved: float) -> OTPOTrainer:
        args = options(tmp_path, max_steps=4, save_strategy="steps", save_steps=2)
        trainer = OTPOTrainer(moe_folder, args=args, train_dataset=make_pairs())
        with torch.no_grad():
            for parameter in trainer.model.parameters():
                parameter.add_(moved)
        return trainer

    whole, resumed = make(0.0), make(0.5)
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same_parameters(parameters(resumed.model), parameters(whole.model))


def test_sft_resumes_qwen3_moe(moe_folder, tmp_path):
    from cli_helpers import arguments as command_line

    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "the red", "completion": "box"}\n{"prompt": "ten", "completion": "dollars"}\n' * 4)
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "learning_rate": 0.01}
    straight, other = tmp_path / "straight", tmp_path / "other"
    assert sft.main(command_line(moe_folder, str(file), straight, **saving)) == 0
    resume = {"resume_from_checkpoint": straight / "checkpoint-2"}
    assert sft.main(command_line(moe_folder, str(file), other, **saving, **resume)) == 0
    finals = [parameters(AutoModelForCausalLM.from_pretrained(folder)) for folder in (straight, other)]
    assert_same_parameters(*finals)
