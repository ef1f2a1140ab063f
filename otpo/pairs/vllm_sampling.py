"""Answers by vLLM, where it is installed. We have not run it with a real vLLM; a test runs it with a stand-in."""

from collections.abc import Sequence
from typing import Any

from .pairing import Answer
from .sampling import SamplingOptions, answer_seed


def vllm_answers(
    engine: Any, prompts: Sequence[Sequence[int]], rows: Sequence[int], options: SamplingOptions
) -> list[list[Answer]]:
    """The answers of `vllm.LLM` to each prompt, each drawn with a seed of its own: see [`otpo.pairs.sampling`].

    Args:
        engine: A `vllm.LLM`.
        prompts: Tokens of each.
        rows: Number of each prompt.
        options: How answers are drawn.
    """
    from vllm import SamplingParams  # pyright: ignore[reportMissingImports]

    asked: list[Any] = []
    drawn: list[Any] = []
    for prompt, row in zip(prompts, rows, strict=True):
        for number in range(options.num_samples):
            asked.append({"prompt_token_ids": list(prompt)})
            drawn.append(
                SamplingParams(
                    n=1,
                    temperature=options.temperature,
                    top_p=options.top_p,
                    max_tokens=options.max_new_tokens,
                    seed=answer_seed(options.seed, row, number),
                )
            )
    outputs = [request.outputs[0] for request in engine.generate(asked, drawn, use_tqdm=False)]
    answers = [Answer(output.text, output.finish_reason == "stop") for output in outputs]
    return [answers[begin : begin + options.num_samples] for begin in range(0, len(answers), options.num_samples)]
