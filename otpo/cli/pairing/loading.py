"""The model that answers, the prompts and the judge, as the options name them."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import DatasetMixtureConfig

from otpo.cli.models.experts import set_answering_experts
from otpo.cli.models.loading import find_origin, load_config, load_processor, require_folder
from otpo.data.loading import RowArguments, load_rows
from otpo.data.preferences import RowError
from otpo.pairs.judges import REWARD_MODEL, Judge, load_judge
from otpo.pairs.prompts import find_prompt
from otpo.pairs.reward_model import RewardModel
from otpo.pairs.sampling import Sampler, SamplingOptions, TransformersSampler, longest_prompt
from otpo.pairs.vllm_sampling import vllm_answers

from .contents import judge_digest, local_folders, model_files_digest, rows_digest, weights_digest
from .options import PairsArguments


class Prompts(NamedTuple):
    """The rows whose prompts are answered.

    Attributes:
        rows: Of the dataset.
        numbers: Number of each in the split that the user named.
        digest: Of all rows, whole, and their numbers, which tells another file of the same name.
    """

    rows: Dataset
    numbers: list[int]
    digest: str


class Answering(NamedTuple):
    """What answers, loaded.

    Attributes:
        sampler: Answers prompts.
        tokenizer: Of the model.
        longest_prompt: Tokens that a prompt may have; None for any number.
        described: Where and by what it runs, for the header.
    """

    sampler: Sampler
    tokenizer: Any
    longest_prompt: int | None
    described: str


def load_prompts(options: PairsArguments) -> Prompts:
    """The rows to answer, each of which has a prompt.

    Raises:
        ValueError: They can't be read, or a row has no prompt that can be answered; the message names the row.
    """
    source = RowArguments(
        dataset_name=options.dataset_name,
        dataset_config=options.dataset_config,
        dataset_train_split=options.dataset_train_split,
        max_train_rows=options.max_train_rows,
    )
    kept: list[int] = []

    def check(rows: Any, name: str, numbers: Sequence[int] | None) -> Any:
        kept.extend(range(len(rows)) if numbers is None else numbers)
        return rows

    rows: Any = load_rows(source, DatasetMixtureConfig(), seed=options.seed, evaluate=False, check=check)[0]
    if not len(rows):
        raise ValueError(f"`dataset_name={options.dataset_name}` has no rows, so there are no prompts to answer.")
    for number, row in zip(kept, rows, strict=True):
        try:
            find_prompt(row)
        except ValueError as error:
            raise RowError(f"Row {number} of `dataset_name={options.dataset_name}` {error}.") from error
    return Prompts(rows, kept, rows_digest(rows, kept))


def contents_of(options: PairsArguments, prompts: Prompts) -> dict[str, str | None]:
    """Digests of what the options name, by the names of [`otpo.cli.pairing.contents.CONTENTS`].

    Raises:
        ValueError: A model's folder or the judge's file does not exist.
    """
    folders = local_folders(
        model_name_or_path=options.model_name_or_path, reward_model_name_or_path=options.reward_model_name_or_path
    )
    return {
        "prompts": prompts.digest,
        "weights": weights_digest(folders),
        "model_files": model_files_digest(folders),
        "judge_code": judge_digest(options.judge),
    }


def load_answering(options: PairsArguments, drawing: SamplingOptions) -> Answering:
    """The model and its tokenizer, by the options' generator.

    Raises:
        ValueError: They can't be loaded, or vLLM can't run an adapter; the message names the option.
    """
    from otpo.cli.models import compass  # noqa: F401 - makes its models known to the Auto classes

    name = options.model_name_or_path
    if name is None:
        raise ValueError("No model is named. Set `model_name_or_path` to a name on the Hub or a local folder.")
    origin = find_origin("model_name_or_path", name, options.model_revision)
    config = load_config(origin, options.trust_remote_code)
    processor = load_processor(origin, options.trust_remote_code)
    tokenizer = getattr(processor, "tokenizer", processor)
    limit = longest_prompt(config, drawing.max_new_tokens)
    if limit is not None and limit < 1:
        raise ValueError(
            f"`max_new_tokens={drawing.max_new_tokens}` leaves no room for a prompt in the "
            f"{limit + drawing.max_new_tokens} positions of this model. Set less."
        )
    if options.generator == "vllm":
        if origin.adapted:
            raise ValueError(
                f"`generator=vllm` with `model_name_or_path={name}`, which is an adapter. Merge it into its model, or "
                "leave `generator` out."
            )
        from vllm import LLM  # pyright: ignore[reportMissingImports]

        engine = LLM(
            model=name,
            tokenizer=name,
            revision=origin.revision,
            dtype=options.dtype,
            trust_remote_code=options.trust_remote_code,
        )
        sampler = partial(_by_vllm, engine, drawing)
        return Answering(sampler, tokenizer, limit, "vLLM, which places the model itself")

    device = pick_device(options.use_cpu)
    model: Any = AutoModelForCausalLM.from_pretrained(
        origin.base,
        revision=origin.revision,
        dtype=options.dtype if options.dtype == "auto" else getattr(torch, options.dtype),
        trust_remote_code=options.trust_remote_code,
        attn_implementation=options.attn_implementation,
    )
    if origin.adapted:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, origin.name).merge_and_unload()  # pyright: ignore[reportCallIssue]
    model = model.to(device).eval()
    weights = str(next(model.parameters()).dtype).removeprefix("torch.")
    described = f"transformers' generate on {_shown(device)}, {weights} weights"
    experts = set_answering_experts(model)
    if experts is not None:
        described += f", experts {experts}"
    return Answering(TransformersSampler(model, tokenizer, drawing), tokenizer, limit, described)


def make_judge(options: PairsArguments) -> Judge:
    """The judge that the options name.

    Raises:
        ValueError: There is no such judge, or its model can't be loaded.
    """
    name = options.reward_model_name_or_path
    if options.judge != REWARD_MODEL or name is None:
        return load_judge(str(options.judge))
    require_folder("reward_model_name_or_path", name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=options.trust_remote_code)
        model: Any = AutoModelForSequenceClassification.from_pretrained(
            name, dtype=torch.float32, trust_remote_code=options.trust_remote_code
        )
    except (OSError, KeyError) as error:
        raise ValueError(f"`reward_model_name_or_path={name}`: the model can't be loaded: {error}") from error
    return RewardModel(model.to(pick_device(options.use_cpu)), tokenizer, f"`reward_model_name_or_path={name}`")


def pick_device(use_cpu: bool) -> torch.device:
    """The first accelerator, or the CPU where there is none or it is asked for."""
    accelerator = None if use_cpu else torch.accelerator.current_accelerator(check_available=True)
    return torch.device("cpu") if accelerator is None else torch.device(accelerator.type, 0)


def _shown(device: torch.device) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else device.type


def _by_vllm(
    engine: Any, drawing: SamplingOptions, prompts: Sequence[Sequence[int]], rows: Sequence[int]
) -> list[list[Any]]:
    return vllm_answers(engine, prompts, rows, drawing)
