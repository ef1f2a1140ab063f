"""What is measured before and after: the loss on held-out documents, and right answers."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional as F

from moe_backbone.quantization.observing import padded

from .documents import batches


@torch.no_grad()
def losses(
    model: Any, documents: list[list[int]], batch_size: int, done: Callable[[int], None] | None = None
) -> list[tuple[float, int]]:
    """The sum of each document's losses, in nats, and the number of tokens that were predicted.

    Args:
        model: Any model of transformers with logits, in evaluation mode.
        documents: Token ids, two or more of each.
        batch_size: Documents of a forward pass.
        done: Called after each pass with the number of its documents.
    """
    found: list[tuple[float, int]] = []
    for batch in batches(documents, batch_size):
        ids, mask = padded(batch, model.device)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
        labels = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
        summed = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100, reduction="none").sum(1)
        found += list(zip(summed.tolist(), mask[:, 1:].sum(1).tolist(), strict=True))
        if done is not None:
            done(len(batch))
    return found


def mean_loss(found: Sequence[tuple[float, int]]) -> float:
    """The mean over all predicted tokens."""
    return sum(loss for loss, _ in found) / sum(count for _, count in found)


def change(before: Sequence[tuple[float, int]], after: Sequence[tuple[float, int]]) -> tuple[float, float | None]:
    """How much higher the mean loss is, and the standard error of that over documents; None of a single document.

    Both are of the same documents, so that what is hard for both cancels out. The mean is a ratio of sums, and its
    error that of the ratio, to first order.
    """
    tokens = sum(count for _, count in before)
    raised = [left[0] - right[0] for left, right in zip(after, before, strict=True)]
    mean, number = sum(raised) / tokens, len(raised)
    if number < 2:
        return mean, None
    residuals = [value - mean * count for value, (_, count) in zip(raised, before, strict=True)]
    return mean, (sum(value**2 for value in residuals) * number / (number - 1)) ** 0.5 / tokens


class Answers:
    """Right answers to a file of prompts, scored as `otpo eval` does.

    Args:
        options: Of the command.
        tokenizer: Of the model.

    Raises:
        ImportError: lm-eval is not installed.
        ValueError: The prompts or the judge can't be used.
    """

    def __init__(self, options: Any, tokenizer: Any):
        from otpo.cli.evaluating import harness
        from otpo.cli.evaluating.judged import ENDINGS, is_prompts, judged_tasks

        harness.require_lm_eval()
        if not is_prompts(options.prompts):
            raise ValueError(f"`--prompts {options.prompts}`: name a file that ends in {' or '.join(ENDINGS)}.")
        if tokenizer is None:
            raise ValueError(f"`--prompts {options.prompts}`: the model has no tokenizer beside its weights.")
        self.options, self.tokenizer = options, tokenizer
        self.tasks: list[Any] = list(
            judged_tasks([options.prompts], options.judge, options.max_new_tokens, "--prompts")
        )
        self.manager = harness.find_tasks([])[1]

    def ask(self, model: Any) -> dict[str, Any]:
        """Scores by metric, each with its 95% interval, of a model as it is."""
        from otpo.cli.evaluating import harness
        from otpo.cli.evaluating.scores import collect_scores, interval

        options = self.options
        results = harness.run(
            harness.wrap(model, self.tokenizer, options.batch_size),
            self.tasks,
            self.manager,
            apply_chat_template=options.apply_chat_template,
            seed=options.seed,
            batch_size=options.batch_size,
            limit=None,
            num_fewshot=None,
        )
        return {metric: interval(score)._asdict() for (_, metric), score in collect_scores(results).items()}
