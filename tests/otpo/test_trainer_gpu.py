"""The trainer on a CUDA device: precisions, checkpointing, and equality with DPO. Run with `-m gpu`."""

import pytest
import torch
from helpers import assert_same_parameters, history, make_pairs, option_dict, parameters
from trl import DPOConfig, DPOTrainer

from otpo import OTPOConfig, OTPOTrainer

pytestmark = pytest.mark.gpu

PRECISIONS = {
    "float32": {},
    "bf16": {"bf16": True},
    "fp16": {"fp16": True},
    "checkpointing": {"bf16": True, "gradient_checkpointing": True},
    "reentrant": {
        "bf16": True,
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
}


def train(trainer_class, config_class, model_folder, tmp_path, **changes):
    args = config_class(**{**option_dict(tmp_path, **changes), "use_cpu": False, "learning_rate": 1e-3})
    trainer = trainer_class(model_folder, args=args, train_dataset=make_pairs(), eval_dataset=make_pairs(6, 3))
    trainer.train()
    trainer.evaluate()
    return trainer


@pytest.mark.parametrize("name", PRECISIONS)
def test_uniform_is_dpo(name, model_folder, tmp_path):
    want = train(DPOTrainer, DPOConfig, model_folder, tmp_path, **PRECISIONS[name])
    got = train(
        OTPOTrainer, OTPOConfig, model_folder, tmp_path, weighting="uniform", row_layout="padded", **PRECISIONS[name]
    )
    assert history(got, "loss") == history(want, "loss")
    assert_same_parameters(parameters(got.model), parameters(want.model))


@pytest.mark.parametrize("name", PRECISIONS)
def test_otpo_trains_and_reports(name, model_folder, tmp_path):
    trainer = train(OTPOTrainer, OTPOConfig, model_folder, tmp_path, ot_reg=0.1, max_steps=8, **PRECISIONS[name])
    rows = history(trainer, "loss", "transport/residual", "transport/iterations", "transport/ms", "weights/ess")
    assert len(rows) == 8
    assert rows[-1][0] < rows[0][0]
    assert all(residual <= 1e-6 and 1 <= iterations < 1000 and ms > 0 for _, residual, iterations, ms, _ in rows)
    assert history(trainer, "eval_transport/ms", "eval_rewards/margins_unweighted")


def test_an_unsolved_transport_is_said_when_the_log_is_read(model_folder, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("otpo.transport.solve.logger.warning", said.append)
    train(OTPOTrainer, OTPOConfig, model_folder, tmp_path, ot_reg=0.011, ot_max_iterations=2, max_steps=3)
    assert len(said) == 1 and "after 2 sweeps at a residual of" in said[0] and "`ot_max_iterations`" in said[0]


def test_weights_under_autocast_are_those_of_float32_states(model_folder, tmp_path):
    """The transport runs outside autocast: in bf16 the distances of nearby states would be noise."""
    seen = []

    class Watching(OTPOTrainer):
        def token_weights(self, batch):
            assert not torch.is_autocast_enabled("cuda")
            answer = super().token_weights(batch)
            seen.append((answer.values.dtype, (answer.values * batch.mask).sum(1), batch.shorter[:, 0]))
            return answer

    train(Watching, OTPOConfig, model_folder, tmp_path, bf16=True)
    for dtype, total, budget in seen:
        assert dtype == torch.float32
        torch.testing.assert_close(total, budget.float(), rtol=1e-5, atol=0)
