"""The weighted preference loss of a batch, written out in float64, and data and models to try it on."""

from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM

from otpo import PairBatch
from otpo.transport.solve import transport_weights

SGD = {"optim": "sgd", "learning_rate": 0.05, "max_grad_norm": 0.0}
LORA = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


def load(folder: str, **changes: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **changes)


def uneven_pairs() -> Dataset:
    """Plain texts of odd lengths; some completions are nothing but the end-of-sequence token."""
    return Dataset.from_dict(
        {
            "prompt": ["the red shirt costs", "a box", "today", "and", "ships from Jakarta to Manila", "x", "in the"],
            "chosen": [" twenty dollars", "", " it ships", " a small blue box and ten", "", " y", " small red box"],
            "rejected": ["", " ten dollars today", " no", " cotton", " a", " z z z z z z z z z", " blue box"],
        }
    )


class Written:
    """The loss of a batch, in plain torch and float64.

    `weigh` maps a `PairBatch` of float64 tensors to weights.
    """

    def __init__(self, policy: Any, reference: Any, weigh: Callable[[PairBatch], Tensor], **settings: Any) -> None:
        self.policy, self.reference, self.weigh = policy.double(), reference.double(), weigh
        self.beta: float = settings.pop("beta", 0.1)
        self.loss_types: list[str] = settings.pop("loss_type", ["sigmoid"])
        self.coefficients: list[float] = settings.pop("loss_weights", [1.0] * len(self.loss_types))
        self.wpo: bool = settings.pop("use_weighting", False)
        self.forward_kl: bool = settings.pop("f_divergence_type", "reverse_kl") == "forward_kl"
        assert not settings, settings

    def score(self, model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        seen = {name: value for name, value in batch.items() if name != "completion_mask"}
        seen = {name: value.double() if value.is_floating_point() else value for name, value in seen.items()}
        outputs = model(**seen, output_hidden_states=True, use_cache=False)
        logps = outputs.logits[:, :-1].log_softmax(2)
        scored = logps.gather(2, batch["input_ids"][:, 1:].unsqueeze(2)).squeeze(2)
        return scored, outputs.hidden_states[-1][:, :-1], logps.mul(2).exp().sum(2).log()

    def __call__(self, batch: dict[str, Tensor], step: int = 0) -> Tensor:
        mask = batch["completion_mask"][:, 1:].bool()
        logps, states, log_sum_sq = self.score(self.policy, batch)
        with torch.no_grad():
            ref_logps = self.score(self.reference, batch)[0]
            self.seen = PairBatch(mask, batch["input_ids"][:, 1:], logps.detach() * mask, states.detach(), step)
            weights = self.weigh(self.seen) * mask
        self.weights = weights
        self.log_ratios = (logps - ref_logps).detach() * mask
        chosen, rejected = ((logps - ref_logps) * weights).sum(1).chunk(2)
        if self.forward_kl:
            chosen, rejected = 1 - (-chosen).exp(), 1 - (-rejected).exp()
        chosen_mass, rejected_mass = weights.sum(1).chunk(2)
        chosen_logps, chosen_mask = logps.chunk(2)[0], mask.chunk(2)[0]
        factor = torch.ones(len(chosen), dtype=torch.float64)
        if self.wpo:
            likely = (((logps - log_sum_sq) * mask).sum(1) / mask.sum(1)).detach().exp()
            factor = likely.chunk(2)[0] * likely.chunk(2)[1]
        margin, beta = chosen - rejected, self.beta
        normalised = chosen / chosen_mass - rejected / rejected_mass
        terms = {
            "sigmoid": lambda: -logsigmoid(beta * margin),
            "hinge": lambda: (1 - beta * margin).relu(),
            "ipo": lambda: (normalised - 1 / (2 * beta)).square(),
            "sigmoid_norm": lambda: -logsigmoid(beta * normalised),
            "bco_pair": lambda: -logsigmoid(beta * chosen) - logsigmoid(-beta * rejected),
            "apo_zero": lambda: 1 - (beta * chosen).sigmoid() + (beta * rejected).sigmoid(),
            "sft": lambda: -chosen_logps[chosen_mask].mean().expand(len(chosen)),
        }
        return sum(
            coefficient * (terms[name]() * factor).mean()
            for name, coefficient in zip(self.loss_types, self.coefficients, strict=True)
        )


def written_otpo(reg: float, reg_m: float = 0.2, **kind: Any) -> Callable[[PairBatch], Tensor]:
    def weigh(batch: PairBatch) -> Tensor:
        solved = transport_weights(*batch.hidden_states.chunk(2), *batch.mask.chunk(2), reg=reg, reg_m=reg_m, **kind)
        return torch.cat([solved.chosen, solved.rejected])

    return weigh


def written_budget(batch: PairBatch) -> Tensor:
    counts = batch.mask.sum(1).tolist()
    pairs = len(counts) // 2
    rows = [min(count, counts[(row + pairs) % len(counts)]) / count for row, count in enumerate(counts)]
    return torch.tensor(rows, dtype=torch.float64).unsqueeze(1).expand(batch.mask.shape)
