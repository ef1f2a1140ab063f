"""The model of `otpo pretrain`: a new one of a preset or a checkpoint's, its tokenizer and its configuration."""

import json
import math
import os
from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any, get_args

import torch
from transformers import AutoTokenizer
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRotaryEmbedding

from moe_backbone import PRESETS, CompassConfig, CompassForCausalLM, preset
from moe_backbone.model.config_checks import check_config, describe_longer_rows, one_line_refusals
from moe_backbone.packed_attention import NAME as TORCH_VARLEN
from moe_backbone.packed_attention import choose_attention
from moe_backbone.planning.counting import count_parameters
from moe_backbone.pretraining.documents import Stage
from moe_backbone.pretraining.trainer import PretrainingConfig
from moe_backbone.pretraining.weight_types import float16_refusal, round_weights
from otpo.cli.launching.engine import requested_engines
from otpo.cli.launching.expert_parallel import model_options
from otpo.cli.models.compass import computing_dtype, weights_dtype
from otpo.cli.models.experts import read_request, set_experts
from otpo.cli.models.loading import require_folder
from otpo.trl_seam import new_model
from otpo_kernels.flash import flash_kernels

from .options import ModelArguments, PretrainArguments
from .weights import choose_dtype

_VOCABULARY_MULTIPLE = 64
_SET_ELSEWHERE = {f"{token}_token_id": "the tokenizer" for token in ("pad", "bos", "eos")}
_SET_ELSEWHERE |= {"dtype": "the option `dtype`", "model_type": "Compass", "return_dict": "the training"}
_WORDS = {"True": True, "False": False, "None": None}  # as Python writes what JSON writes small


def make_model(
    data: PretrainArguments, args: PretrainingConfig, model: ModelArguments, tokenizer: Any, stage: Stage | None
) -> CompassForCausalLM:
    """A new model of the preset, or the checkpoint's, with the options that the stage and the command line change."""
    experts = read_request(data)
    name = data.previous_stage or model.model_name_or_path
    revision = None if data.previous_stage else model.model_revision
    rope = None if stage is None else stage.rope_parameters
    config = make_config(name, revision, data.preset, rope, data.config_overrides)
    overrides = parse_overrides(data.config_overrides)
    fit_to_tokenizer(config, tokenizer, new=name is None, sized="vocab_size" in overrides)
    if rope is not None:
        overridden = "rope_parameters" in overrides
        source = f"`config_overrides`; the stage says {rope}" if overridden else "of the stage"
        data.notes["positions"] = f"{config.rope_parameters} ({source})"
    longer = describe_longer_rows(config, args.sequence_length)
    if longer:
        data.notes["length"] = longer
        config.max_position_embeddings = args.sequence_length
    dtype, reason = choose_dtype(data, args, model, config)
    data.resolved["dtype"] = dtype
    if reason is not None:
        data.notes["weights"] = f"{dtype}, {reason}"
    attention, why = model.attn_implementation, None
    if attention == "auto":
        attention, why = choose_attention(config, args.device, computing_dtype(args, dtype, config))
    if attention == TORCH_VARLEN:
        data.notes["attention"] = f"{attention}, {flash_kernels(args.device, config.head_dim)}"
    else:
        data.notes["attention"] = attention if why is None else f"{attention}, since {why}"
    options: Any = {"attn_implementation": attention, "dtype": dtype}
    spread = model_options(data)
    # Made in float32 and rounded, a seed gives the model that it gives in float32, and routers lose nothing.
    engines = requested_engines(args.deepspeed, args.fsdp, os.environ)
    kind = weights_dtype(dtype, config)
    if kind == torch.float16 and not engines:  # which may keep float32 copies; the trainer looks again
        raise float16_refusal()
    rounded = kind == torch.bfloat16 and data.expert_parallel_size == 1 and not engines
    if rounded:
        options["dtype"] = "float32"
    if name is None and spread:  # transformers spreads experts as it loads a model
        name = f"{args.output_dir}/initial"
        with args.main_process_first(local=False):
            if args.process_index == 0:
                new_model(CompassForCausalLM, config, **options).save_pretrained(name)
    if name is None:
        compass: Any = new_model(CompassForCausalLM, config, **options)
    else:
        where = {"revision": revision} if revision else {}
        try:
            compass = CompassForCausalLM.from_pretrained(name, config=config, **options, **where, **spread)
        except RuntimeError as error:  # behind transformers' report of the weights
            if "ignore_mismatched_sizes" not in str(error):
                raise
            changed = f" as `config_overrides={data.config_overrides}` changes it" if overrides else ""
            raise ValueError(
                f"`model_name_or_path={name}`: its weights are of other sizes than its configuration{changed}, as the "
                "report above says. Leave the sizes as they are, or make a new model (`preset`)."
            ) from error
    if rounded:
        round_weights(compass)
        compass.config.dtype = torch.bfloat16
    told = set_experts(experts, [compass], args.device.type, args.mixed_precision != "no")
    data.notes["experts"] = f"{describe_sizes(config)}, {told}"
    return compass


def make_config(
    source: str | None, revision: str | None, new: str | None, rope: dict[str, Any] | None, overrides: str | None
) -> CompassConfig:
    """A preset's configuration or a checkpoint's, with what a stage and the user change.

    Args:
        source: Folder or name of the checkpoint; None for a new model.
        revision: The checkpoint's on the Hub.
        new: The preset of a new model.
        rope: The stage's rotary positions; None for the model's.
        overrides: The option `config_overrides`, which wins over the stage.

    Raises:
        ValueError: There is no such preset, the checkpoint is of another kind, or a value can't be.
    """
    changes = {} if rope is None else {"rope_parameters": dict(rope)}
    changes |= parse_overrides(overrides)
    if source is None:
        preset(new or "")  # refuses an unknown name before anything is said about the overrides
        values = PRESETS[new or ""]
    else:
        try:
            values, _ = CompassConfig.get_config_dict(source, revision=revision)
        except OSError as error:
            text = " ".join(str(error).split())
            raise ValueError(f"`model_name_or_path={source}`: there is no configuration to read: {text}") from error
        if values.get("model_type") != CompassConfig.model_type:
            raise ValueError(
                f"`model_name_or_path={source}`: its `model_type` is {values.get('model_type')!r}; `otpo pretrain` "
                f"trains {CompassConfig.model_type!r} alone."
            )
    try:
        with one_line_refusals():
            config = CompassConfig.from_dict({**values, **changes})
            check_config(config)
            Qwen3MoeRotaryEmbedding(config=config)  # pyright: ignore - refuses lists of another length
            return config
    except ValueError as error:
        raise ValueError(f"`config_overrides={overrides}`: {error}" if overrides else str(error)) from error


def fit_to_tokenizer(config: CompassConfig, tokenizer: Any, new: bool, sized: bool) -> None:
    """Gives a configuration the tokenizer's special tokens and, that of a new model, a vocabulary of its size.

    A tokenizer without a padding token leaves the model without one: rows are padded all the same, and to pad with the
    end of text would say that it is not to be learnt.

    Args:
        config: It is changed.
        tokenizer: Has an end-of-text token.
        new: Whether the model is a new one.
        sized: Whether the user sets `vocab_size`.
    """
    if new and not sized:
        config.vocab_size = -(-len(tokenizer) // _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE
    for token in ("pad", "bos", "eos"):
        setattr(config, f"{token}_token_id", getattr(tokenizer, f"{token}_token_id"))
    others = {name: token for name, token in tokenizer.special_tokens_map.items() if name != "pad_token"}
    if tokenizer.pad_token in others.values():  # whose row would never be learnt
        config.pad_token_id = None


def load_tokenizer(name: str | None, revision: str | None, option: str) -> Any:
    """The tokenizer of that name or folder.

    Raises:
        ValueError: There is none or it can't be read, or it has no end-of-text token.
    """
    if name is None:
        raise ValueError(f"A new model (`preset`) needs a tokenizer: set `{option}`.")
    require_folder(option, name)
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`{option}={name}`: there is no tokenizer to read: {' '.join(str(error).split())}"
        ) from error
    if tokenizer.eos_token_id is None:
        raise ValueError(f"The tokenizer {name} has no end-of-text token. Set its `eos_token` and save it.")
    return tokenizer


def describe_sizes(config: CompassConfig) -> str:
    """How many experts there are, and what of the model a token takes."""
    return (
        f"{config.num_experts}, {config.num_experts_per_tok} a token, {config.num_shared_experts} shared, "
        f"{count_parameters(config).active:,} parameters active"
    )


def parse_overrides(text: str | None) -> dict[str, Any]:
    """`name=value,name=value` as a mapping, values read as JSON; what is no JSON is text.

    Raises:
        ValueError: It is of another form, there is no such option, or a value is no number that can be used.
    """
    changes: dict[str, Any] = {}
    for name, value in _assignments(text or ""):
        if name in changes:
            raise ValueError(f"`config_overrides={text}` sets `{name}` twice.")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"`config_overrides={text}`: `{name}` must be a finite number, got {value}.")
        if name in _SET_ELSEWHERE:
            raise ValueError(f"`config_overrides={text}`: `{name}` is set by {_SET_ELSEWHERE[name]}. Leave it out.")
        whole = isinstance(value, int) and not isinstance(value, bool)
        changes[name] = float(value) if whole and _holds_floats_alone(name) else value
    return changes


def _assignments(text: str) -> Iterator[tuple[str, Any]]:
    known, left = CompassConfig.__dataclass_fields__, text.strip(", ")
    while left:
        part = left.partition(",")[0]
        name, sign, left = (word.strip() for word in left.partition("="))
        if not sign or name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f" Did you mean `{near[0]}`?" if near else ""
            raise ValueError(
                f"`config_overrides={text}`: {part!r} is no `name=value` of an option of CompassConfig.{hint}"
            )
        if left.startswith(("{", "[", '"')):  # commas inside belong to the value
            try:
                value, end = json.JSONDecoder().raw_decode(left)
            except json.JSONDecodeError as error:
                raise ValueError(f"`config_overrides={text}`: the value of `{name}` is not JSON: {error}.") from error
            left = left[end:].lstrip()
            if left and not left.startswith(","):
                raise ValueError(f"`config_overrides={text}`: {left!r} stands behind the value of `{name}`.")
        else:
            word, _, left = left.partition(",")
            value = _read_word(word.strip())
        yield name, value
        left = left.strip(", ")


def _holds_floats_alone(name: str) -> bool:
    """Whether an option takes a float and no whole number, which users write all the same where it is one."""
    kind = CompassConfig.__annotations__.get(name)
    kinds = get_args(kind) or (kind,)
    return float in kinds and int not in kinds


def _read_word(word: str) -> Any:
    if word in _WORDS:
        return _WORDS[word]
    try:
        return json.loads(word)
    except json.JSONDecodeError:
        return word
