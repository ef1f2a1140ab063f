"""The model card that is saved beside a checkpoint."""

import pytest
from helpers import make_pairs, options
from huggingface_hub import ModelCard
from peft import LoraConfig

from otpo import OTPOTrainer


@pytest.mark.parametrize("adapter", [False, True], ids=["model", "lora"])
def test_model_card(adapter, model_folder, tmp_path):
    peft_config = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM") if adapter else None
    trainer = OTPOTrainer(
        model_folder,
        args=options(tmp_path / "my-model", max_steps=1, save_strategy="steps", save_steps=1),
        train_dataset=make_pairs(),
        peft_config=peft_config,
    )
    trainer.train()
    card = ModelCard.load(tmp_path / "my-model" / "README.md")

    assert {"dpo", "otpo", "trl"} <= set(card.data.tags)
    assert card.data.model_name == "my-model"
    assert "trained with OTPO" in card.text
    assert "Optimal Transport-Based Token Weighting scheme for Enhanced Preference Optimization" in card.text
    assert "https://huggingface.co/papers/2505.18720" in card.text
    citation = card.text[card.text.index("@inproceedings{li2025otpo,") :]
    assert "Meng Li and Guangda Huzhang and Haibo Zhang and Xiting Wang and Anxiang Zeng" in citation
    assert citation[: citation.index("```")].count("{") == citation[: citation.index("```")].count("}")
    assert "rafailov2023direct" not in card.text
    assert {"dpo", "otpo", "trl"} <= set(trainer.model.model_tags)
