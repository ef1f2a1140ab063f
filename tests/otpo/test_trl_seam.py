"""What TRL's loss is handed is read; a release that reads something else is refused before it trains.

The first tests compare what `otpo.trl_seam` says of TRL, transformers and accelerate with their installed sources. One
that fails names the function of the seam that has to follow. The file is over 350 lines because it names what each of
them leans on, as the seam itself does.
"""

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.data_loader import DataLoaderShard, prepare_data_loader
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_load_full_state_dict
from helpers import make_pairs, options
from peft import PeftModel
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer
from trl.trainer import dpo_trainer
from trl.trainer.utils import add_fused_lm_head, get_config_model_id

from otpo import OTPOTrainer, trl_seam

# By function of the seam: what reads the thing there, and the lines that it has, in this order.
READ_BY: dict[str, tuple[Callable, list[str]]] = {
    "policy_argument_names": (DPOTrainer._compute_loss, ["_non_model_keys", "labels=labels, fused_lm_head=True"]),
    "policy_arguments": (
        DPOTrainer._compute_loss,
        [
            '_non_model_keys = {"completion_mask", "ref_chosen_logps", "ref_rejected_logps"}',
            'model_kwargs["use_cache"] = False',
            "if self.aux_loss_enabled:",
            'model_kwargs["output_router_logits"] = True',
            'labels = inputs["input_ids"].masked_fill(completion_mask == 0, -100)',
            "outputs = model(**model_kwargs, labels=labels, fused_lm_head=True)",
        ],
    ),
    "dpo_loss": (
        DPOTrainer._compute_loss,
        [
            'mode = "train" if self.model.training else "eval"',
            "outputs = model(**model_kwargs, labels=labels, fused_lm_head=True)",
            "per_token_logps = outputs.log_probs[:, -seq_len:]",
            "if self.precompute_ref_logps:",
            'inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]',
            "zip(self.loss_types, self.loss_weights, strict=True)",
            "aux_loss = outputs.aux_loss",
            "loss = loss + self.router_aux_loss_coef * aux_loss",
            "self._metrics[mode]",
            "self._total_train_tokens",
            "outputs = model(**model_kwargs)",
            "return (loss, outputs) if return_outputs else loss",
        ],
    ),
    "require_known_loss": (
        DPOTrainer._compute_loss,
        ["self.ld_alpha is None", 'self.f_divergence_type == "reverse_kl"', "self.beta", "self.use_weighting"],
    ),
    "reference_logps": (
        DPOTrainer.compute_ref_log_probs,
        [
            "if self.ref_model is None and is_peft_model(self.model):",
            "torch.no_grad()",
            "self.accelerator.autocast()",
            "model(**model_kwargs, labels=labels, fused_lm_head=True).log_probs",
        ],
    ),
    "policy_as_reference": (
        PeftModel.disable_adapter,
        ["is_prompt_learning", "is_adaption_prompt", "self.base_model.disable_adapter_layers()"],
    ),
    "summed": (
        DPOTrainer.compute_ref_log_probs,
        [
            # What is read of `_ReferenceOfItsOwn` in the trainer's place.
            "self.accelerator.device",
            "self.ref_model is None",
            "disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs)",
            "self.accelerator.autocast()",
            "fused_lm_head=True).log_probs",
            "if self.ld_alpha is None:",
            "self.ld_alpha *",
            "return ref_logps.chunk(2",
        ],
    ),
    "scores_rows": (
        add_fused_lm_head,
        [
            'backbone_attr = "base_model"',
            "def _fused_forward(",
            "getattr(self, backbone_attr)(*args, **kwargs)",
            "backbone_outputs.last_hidden_state",
            "labels = shift_labels",
            "self.get_output_embeddings()",
            "mask = labels != -100",
            "hidden_states[mask] if compact",
            "labels[mask] if compact",
            "x.new_zeros(mask.shape).masked_scatter(mask, x)",
            "model.forward = types.MethodType(_fused_forward, model)",
        ],
    ),
    "row_arguments": (
        add_fused_lm_head,
        [
            "if shift_labels is None:",
            "labels = shift_labels",
            'backbone_outputs.router_logits, num_experts, num_experts_per_tok, kwargs.get("attention_mask")',
        ],
    ),
    "on_device": (DPOTrainer._compute_loss, ["outputs.log_probs", "outputs.aux_loss", "outputs.entropy"]),
    "bring_router_logits_to_head": (DPOTrainer._compute_loss, ['model_kwargs["output_router_logits"] = True']),
    "mode_of": (DPOTrainer.log, ['mode = "train" if self.model.training else "eval"']),
    "collected_metrics": (
        DPOTrainer.log,
        ["sum(val) / len(val) for key, val in self._metrics[mode].items()", "self._metrics[mode].clear()"],
    ),
    "pairs_without_repeats": (
        Accelerator.gather_for_metrics,
        ["self.gradient_state.end_of_dataloader", "self.gradient_state.remainder > 0"],
    ),
    "loader_of_process": (
        prepare_data_loader,
        [
            "new_batch_sampler = dataloader.batch_sampler",
            "if (num_processes != 1 or state.distributed_type == DistributedType.MEGATRON_LM)",
            "dataloader = DataLoaderShard(",
            "batch_sampler=new_batch_sampler,",
        ],
    ),
    "copy_without_waiting": (
        DataLoaderShard.__iter__,
        ["while True:", "send_to_device(current_batch, self.device, non_blocking=self._non_blocking)"],
    ),
    "has_own_sampler": (Trainer.get_train_dataloader, ["sampler_fn=self._get_train_sampler"]),
    "loss_factor": (
        Trainer.training_step,
        ["loss = loss / self.current_gradient_accumulation_steps", "self.accelerator.backward(loss, **kwargs)"],
    ),
    "loads_on_one_device": (
        DPOTrainer.__init__,
        [
            "model_init_kwargs = dict(args.model_init_kwargs or {})",
            'args.distributed_state.distributed_type in ["MULTI_GPU", "DEEPSPEED"]',
            "ref_model_init_kwargs = dict(args.model_init_kwargs or {})",
        ],
    ),
    "before_sharding": (
        DPOTrainer.__init__,
        ["self.ref_model = ref_model", "self.ref_model = prepare_deepspeed(self.ref_model, self.accelerator)"],
    ),
    "load_converted_weights": (
        Trainer._load_from_checkpoint,
        [
            "model.load_state_dict(state_dict, False)",
            "load_result = load_sharded_checkpoint(model, resume_from_checkpoint, strict=is_sagemaker_mp_enabled())",
        ],
    ),
    "shards_parameters": (DeepSpeedPlugin, ["zero_stage: int = field("]),
    "count_without_waiting": (DeepSpeedPlugin, ["self.deepspeed_config = self.hf_ds_config.config"]),
    "use_one_gpu": (Trainer, ["self.args._n_gpu = 1", "if self.args.n_gpu > 1:"]),
    "new_model": (PreTrainedModel, ["def _from_config(cls, config, **kwargs)"]),
    "leave_boolean_buffers_to_ranks": (DistributedDataParallel, ["_ddp_params_and_buffers_to_ignore"]),
    "without_length_limit": (
        DPOTrainer._prepare_dataset,
        ['if args.max_length is not None and args.truncation_mode == "keep_start":', "dataset.filter("],
    ),
    "reference_digest": (DPOTrainer._precompute_ref_logps, ["model_hash = self._precompute_model_hash"]),
    "model_of_reference_pass": (
        DPOTrainer._precompute_ref_logps,
        ["self.is_deepspeed_enabled", "self._precompute_engine is None", "prepare_deepspeed("],
    ),
    "model_name": (get_config_model_id, ["_name_or_path"]),
    "keep_outputs_as_they_are": (
        FullyShardedDataParallelPlugin.set_mixed_precision,
        [
            "MixedPrecisionPolicy as MixedPrecision",
            'dtype_args["output_dtype"] = dtype',
            "self.mixed_precision_policy =",
        ],
    ),
    "keeps_buffers": (
        fsdp2_load_full_state_dict,
        ["meta_sharded_sd.items()", "device_mesh = sharded_param.device_mesh"],
    ),
    "whole_states": (
        Trainer.save_model,
        ["self.is_fsdp_enabled", 'if "FULL_STATE_DICT" in str(self.accelerator.state.fsdp_plugin.state_dict_type):'],
    ),
    "autocast_dtype": (Accelerator.mixed_precision.fget, ["self.state.mixed_precision"]),
    "has_images": (DPOTrainer.__init__, ["self._is_vision_dataset"]),
    "require_rows_of_tokens": (DPOTrainer.__init__, ["self._is_vision_dataset"]),
    "layout_obstacle": (DPOTrainer.__init__, ["self._is_vision_dataset"]),
    "have_experts_run_by": (PreTrainedConfig, ["def _experts_implementation(self, value: str | dict | None):"]),
    "implementations": (
        PreTrainedModel.__init__,
        ["self.config._attn_implementation", "self.config._experts_implementation"],
    ),
}


# Of `trl_seam.LateMetrics`: all that TRL does with what is not known yet, besides adding it to its lists.
READ_LATE = [
    *("gather_for_metrics(aux_loss).mean().item()", "gather_for_metrics(entropy_sum).sum()"),
    *("(entropy_sum / total_tokens).item() if total_tokens > 0 else 0.0", "self._total_train_tokens += num_tokens_in"),
    *(
        'self._metrics[mode]["num_tokens"] = [self._total_train_tokens]',
        "chosen_mean_logits[chosen_mask.bool()].sum()",
    ),
    "total_chosen_logits / total_chosen_tokens if total_chosen_tokens > 0 else 0.0",
    "(correct_tokens.sum() / total_sum).item() if total_sum > 0 else 0.0",
    *("agg_chosen_rewards.mean().item()", "gather(chosen_logps).mean().item()"),
]


def test_late_metrics_are_read_as_the_seam_says():
    source, place = inspect.getsource(DPOTrainer._compute_loss), 0
    for line in READ_LATE:
        place = source.find(line, place)
        assert place >= 0, f"`DPOTrainer._compute_loss` has no {line!r} there: see `otpo.trl_seam.LateMetrics`"
    for line in ("torch.tensor(self.label_smoothing, device=device)", "logps[chosen_mask.bool()].mean()"):
        assert line in source, f"`DPOTrainer._compute_loss` has no {line!r}: see `otpo.trl_seam._WithoutWaits`"
    cut = inspect.getsource(Accelerator.gather_for_metrics)
    assert "return tensor[: self.gradient_state.remainder]" in cut, "see `otpo.trl_seam._LateAccelerator`"


NEWLY_READ = {
    ".item() if total_tokens > 0 else 0.0": ".item() if total_tokens > 1 else 0.0",
    "agg_margins.mean().item()": "agg_margins.median().item()",
}


@pytest.mark.parametrize("old", NEWLY_READ)
def test_another_use_of_a_late_number_is_refused(old, model_folder, tmp_path, monkeypatch):
    changed = with_other_names(DPOTrainer._compute_loss, old, NEWLY_READ[old])
    monkeypatch.setattr(DPOTrainer, "_compute_loss", changed)
    trainer = OTPOTrainer(model_folder, args=options(tmp_path, max_steps=1), train_dataset=make_pairs())
    trainer._reads_late = True
    with pytest.raises(RuntimeError, match=r"fails on what `OTPOTrainer` hands it: .*install 'trl>=1.16,<1.17'"):
        trainer.train()


def test_every_function_of_the_seam_is_compared():
    functions = {
        name
        for name, value in vars(trl_seam).items()
        if inspect.isfunction(value) and value.__module__ == trl_seam.__name__ and not name.startswith("_")
    }
    assert functions == READ_BY.keys()


@pytest.mark.parametrize("name", READ_BY)
def test_installed_sources_read_what_the_seam_says(name):
    reader, lines = READ_BY[name]
    source, place = inspect.getsource(reader), 0
    for line in lines:
        found = source.find(line, place)
        assert found >= 0, (
            f"`{reader.__qualname__}` has no {line!r} (any more, or not in that order): see `otpo.trl_seam.{name}`"
        )
        place = found


def test_the_epoch_reaches_a_batch_sampler_that_is_wrapped():
    """See `otpo.trl_seam.loader_of_process`."""
    source = inspect.getsource(DataLoaderShard.set_epoch)
    assert "self.batch_sampler.set_epoch(epoch)" in source
    assert "self.batch_sampler.batch_sampler.sampler.set_epoch(epoch)" in source


@pytest.mark.parametrize("name", trl_seam.OVERRIDDEN)
def test_signatures_are_those_that_are_overridden(name):
    found = tuple(inspect.signature(getattr(DPOTrainer, name)).parameters)[1:]
    assert found == trl_seam.OVERRIDDEN[name], f"`DPOTrainer.{name}` has changed: see `otpo.trl_seam.OVERRIDDEN`"
    assert tuple(inspect.signature(getattr(OTPOTrainer, name)).parameters)[1:] == found


@pytest.mark.parametrize("name", trl_seam.CLASS_ATTRIBUTES)
def test_class_attributes_are_those_of_trl(name):
    assert type(getattr(DPOTrainer, name)) is type(getattr(OTPOTrainer, name)), "see `otpo.trl_seam.CLASS_ATTRIBUTES`"


@pytest.mark.parametrize("module", trl_seam.IMPORTED_ELSEWHERE)
def test_names_that_the_commands_import_are_there(module):
    for name in trl_seam.IMPORTED_ELSEWHERE[module]:
        assert hasattr(import_module(module), name), f"{module}.{name} is gone: see `otpo.trl_seam`"


def private_names(path: Path) -> Iterator[str]:
    """Undocumented modules and private attributes of other packages that a file of ours leans on."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module in trl_seam.IMPORTED_ELSEWHERE:
            known = trl_seam.IMPORTED_ELSEWHERE[node.module]
            yield from (f"{node.module}.{alias.name}" for alias in node.names if alias.name not in known)
        elif isinstance(node, ast.ImportFrom) and re.match(
            r"trl\.|transformers\.\w+\.|accelerate\.(?!utils)", node.module or ""
        ):
            yield str(node.module)
        elif isinstance(node, ast.Attribute) and re.match(r"_[a-z]", node.attr):
            owner = node.value
            if node.attr == "_asdict":  # of a named tuple, public all the same
                continue
            if isinstance(owner, ast.Name) and owner.id in (
                "self",
                "cls",
                "os",
                "parser",
            ):  # the last two are Python's
                continue
            of_super = isinstance(owner, ast.Call) and isinstance(owner.func, ast.Name) and owner.func.id == "super"
            if not (of_super and node.attr in trl_seam.OVERRIDDEN):
                yield node.attr


def test_nothing_else_private_is_leaned_on():
    folder = Path(trl_seam.__file__).parent
    files = [path for path in folder.rglob("*.py") if path.name != "trl_seam.py"]
    found = {str(path.relative_to(folder)): sorted(set(private_names(path))) for path in files}
    # torch's own count of writes to a tensor, which autograd goes by. Options of torch's compiler are listed by its
    # package.
    assert {name: names for name, names in found.items() if names} == {
        "training/lent.py": ["_version"],
        "layouts/compiled.py": ["_inductor"],
    }


@pytest.mark.parametrize(
    ("asked", "synchronized"),
    [({}, False), ({"timers": {"throughput": {"synchronized": True}}}, True), (None, None)],
)
def test_deepspeed_counts_samples_without_waiting_unless_it_is_asked_to(asked, synchronized):
    plugin = None if asked is None else SimpleNamespace(deepspeed_config=asked)
    trl_seam.count_without_waiting(SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin)))
    if plugin is not None:
        from_config = pytest.importorskip("deepspeed.utils.config").get_timers_config
        assert from_config(plugin.deepspeed_config).synchronized is synchronized


def test_one_gpu_is_what_transformers_reads(tmp_path):
    args = TrainingArguments(str(tmp_path), use_cpu=True)
    args._n_gpu = 4
    trl_seam.use_one_gpu(args)
    assert args.n_gpu == 1


@pytest.mark.parametrize("auxiliary", [False, True])
def test_the_policy_is_called_as_trl_calls_it(auxiliary, model_folder, moe_folder, tmp_path):
    calls = []

    class Recorded(DPOTrainer):
        def _compute_loss(self, model, inputs, return_outputs):
            def record(**arguments):
                ours = trl_seam.policy_arguments(inputs, router_logits=self.aux_loss_enabled)
                names = trl_seam.policy_argument_names(inputs, router_logits=self.aux_loss_enabled)
                calls.append((arguments, ours, names))
                return model(**arguments)

            return super()._compute_loss(record, inputs, return_outputs)

    args = DPOConfig(str(tmp_path), max_steps=1, use_cpu=True, bf16=False, report_to="none")
    folder = moe_folder if auxiliary else model_folder
    trainer = Recorded(folder, args=args, train_dataset=make_pairs())
    assert trainer.aux_loss_enabled == auxiliary
    trainer.train()
    (theirs, ours, names), *_ = calls
    assert theirs.keys() == ours.keys() == names, "see `otpo.trl_seam.policy_arguments`"
    for key, value in theirs.items():
        assert torch.equal(value, ours[key]) if isinstance(value, torch.Tensor) else value == ours[key], key


def test_other_arguments_are_refused(model_folder, tmp_path, monkeypatch):
    """A release that calls its model with one more would train another model than the one that was scored."""
    old = 'model_kwargs["use_cache"] = False'
    changed = with_other_names(DPOTrainer._compute_loss, old, f'{old}; model_kwargs["new"] = 1')
    monkeypatch.setattr(DPOTrainer, "_compute_loss", changed)
    trainer = OTPOTrainer(model_folder, args=options(tmp_path, max_steps=1), train_dataset=make_pairs())
    with pytest.raises(RuntimeError, match=r"other arguments than `trl_seam.policy_arguments` does; .*\['new'\]"):
        trainer.train()


RENAMED = {
    "self.precompute_ref_logps": "self.precompute_reference",
    'inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]': 'inputs["chosen_logps"], inputs["rejected_logps"]',
    "self.beta": "self.args.beta",
    "self.loss_types": "self.args.loss_type",
}


def with_other_names(method, old: str, new: str):
    """TRL's own method, reading another name."""
    source = textwrap.dedent(inspect.getsource(method))
    assert old in source, f"TRL no longer reads {old}"
    scope: dict = {}
    exec(source.replace(old, new), vars(dpo_trainer), scope)
    return scope[method.__name__]


@pytest.mark.parametrize("old", RENAMED)
def test_a_renamed_attribute_is_not_a_wrong_loss(old, model_folder, other_model_folder, tmp_path, monkeypatch):
    reference = AutoModelForCausalLM.from_pretrained(other_model_folder)
    args = options(tmp_path, max_steps=1, beta=0.1, ot_reg=0.05, loss_type=["sigmoid", "sft"])
    trainer = OTPOTrainer(model_folder, reference, args, train_dataset=make_pairs())
    monkeypatch.setattr(DPOTrainer, "precompute_reference", False, raising=False)
    monkeypatch.setattr(DPOTrainer, "_compute_loss", with_other_names(DPOTrainer._compute_loss, old, RENAMED[old]))
    with pytest.raises(RuntimeError, match=r"`DPOTrainer._compute_loss` .* trl 1\..*install 'trl>=1.16,<1.17'"):
        trainer.train()


def test_every_step_asks_whether_its_inputs_are_read(model_folder, other_model_folder, tmp_path, monkeypatch):
    """After the first loss, which is checked by its value."""
    reference = AutoModelForCausalLM.from_pretrained(other_model_folder)
    trainer = OTPOTrainer(model_folder, reference, options(tmp_path, max_steps=1), train_dataset=make_pairs())
    trainer.train()
    monkeypatch.setattr(DPOTrainer, "precompute_reference", False, raising=False)
    changed = with_other_names(DPOTrainer._compute_loss, "self.precompute_ref_logps", "self.precompute_reference")
    monkeypatch.setattr(DPOTrainer, "_compute_loss", changed)
    with pytest.raises(RuntimeError, match="has not used the reference's ref_chosen_logps and ref_rejected_logps"):
        trainer.train()


def test_the_check_leaves_no_trace(model_folder, tmp_path):
    """Neither in the metrics nor in the options nor in the random generators."""
    trainer = OTPOTrainer(model_folder, args=options(tmp_path, max_steps=1), train_dataset=make_pairs())
    state, before = torch.get_rng_state(), {name: vars(trainer)[name] for name in ("beta", "loss_types", "ld_alpha")}
    batch = trainer.data_collator([trainer.train_dataset[0]])
    trainer.compute_loss(trainer.model, batch)
    assert torch.equal(state, torch.get_rng_state())
    assert {name: vars(trainer)[name] for name in before} == before
    found = trainer._metrics["train" if trainer.model.training else "eval"]
    assert len(found["rewards/margins"]) == 1


class NoSelection(TorchDispatchMode):
    """Raises where the number of true entries of a mask is asked for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket.__name__ not in ("nonzero", "index", "masked_select", "masked_scatter"), func
        return func(*args, **(kwargs or {}))


def test_labelled_positions_are_not_counted():
    """The lines of TRL's head that `scores_rows` names, for labels all of which are there."""
    labels = trl_seam._AllLabelled.of(torch.tensor([[4, 5, 6]]))
    states = torch.randn(1, 3, 2, requires_grad=True)
    with NoSelection():
        labels = labels.to(states.device)
        mask = labels != -100
        chosen, targets = states[mask], labels[mask]
        scores = chosen.sum(1)
        back = scores.new_zeros(mask.shape).masked_scatter(mask, scores)
    assert type(targets) is type(chosen) is type(back) is torch.Tensor
    assert targets.tolist() == [4, 5, 6] and chosen.shape == (3, 2)
    torch.testing.assert_close(back, states.sum(2))
