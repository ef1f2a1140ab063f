"""Adapters on models of experts, and what the processes of their tests of expert parallelism run."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def adapted(model: Any, kind: str, **changes: Any) -> Any:
    """A model with an adapter of no zeros on its attention ("attention"), its experts, or both ("all")."""
    from peft import LoraConfig, get_peft_model

    options: dict[str, Any] = {"r": 3, "lora_alpha": 7, "target_modules": []}
    options["target_modules"] = ATTENTION if kind in ("attention", "all") else []
    options["target_parameters"] = EXPERTS if kind in ("experts", "all") else None
    torch.manual_seed(3)
    model = get_peft_model(model, LoraConfig(**{**options, **changes}))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn_like(parameter)
    return model


def engines_of_adapters(folder: Path, cases: list[tuple[str, int, str]], gathers: bool = False, **_: Any) -> Any:
    """Losses, gradients and weights of adapters in five steps of DeepSpeed's engine against the whole model.

    The worst relative errors of each case: a model, a stage of ZeRO, and what has the adapter. Rows are sent to their
    experts, or all tokens are gathered.
    """
    import deepspeed

    from moe_backbone.expert_parallel.deepspeed_patch import patch_deepspeed

    deepspeed.init_distributed(dist_backend="gloo")
    patch_deepspeed()
    return [_engine_of_adapter(*case, gathers) for case in cases]


def _engine_of_adapter(model: str, stage: int, kind: str, gathers: bool) -> dict[str, float]:
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

    from moe_backbone.expert_parallel.adapters import SpreadAdapter
    from moe_backbone.expert_parallel.deepspeed_config import expert_parallel_config
    from moe_backbone.expert_parallel.deepspeed_trainer import gather_tokens, separate_experts

    rank, size = dist.get_rank(), dist.get_world_size()
    whole, spread = (
        adapted(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).train(), kind) for _ in range(2)
    )
    config = expert_parallel_config(whole.config.model_type, size, stage)
    config |= {"train_micro_batch_size_per_gpu": 2, "train_batch_size": 2 * size, "gradient_accumulation_steps": 1}
    config |= {"gradient_clipping": 0.0, "bf16": {"enabled": False}}
    adam = {"lr": 0.01, "eps": 1e-4, "weight_decay": 0.1}
    optimizer, given = (
        torch.optim.AdamW([p for p in each.parameters() if p.requires_grad], **adam) for each in (whole, spread)
    )
    separate_experts(given, spread, size)
    trained, *_ = deepspeed.initialize(model=spread, optimizer=given, config=config)  # pyright: ignore
    if gathers:
        gather_tokens(trained.module, 2 * 16 + 1)  # with a token that makes up the number
    modules = dict(trained.module.named_modules())
    ids = torch.randint(0, 60, (2 * size, 16), generator=torch.Generator().manual_seed(5)).split(2)
    errors: dict[str, float] = {}

    def note(name: str, got: torch.Tensor, want: torch.Tensor) -> None:
        worst = ((got - want).abs().max() / want.abs().max().clamp(min=1e-6)).detach().reshape(1)
        dist.all_reduce(worst, dist.ReduceOp.MAX)
        errors[name] = max(errors.get(name, 0.0), float(worst))

    def local(name: str, of_whole: torch.Tensor) -> torch.Tensor:
        """What this process holds of a factor."""
        wrapper: Any = modules[name.rpartition(".lora_")[0]]
        if not isinstance(wrapper, SpreadAdapter):
            return of_whole
        factor: Any = modules[name.removesuffix(".weight")]
        experts = wrapper.num_experts
        assert factor.weight.numel() * size == of_whole.numel() or stage == 3
        return factor.part(of_whole, size, rank, experts)

    for _ in range(5):
        outputs = [whole(batch, labels=batch, output_router_logits=True) for batch in ids]
        with whole.disable_adapter(), torch.no_grad():
            reference = whole(ids[rank]).logits
        (sum(output.loss for output in outputs) / size).backward()
        with trained.module.disable_adapter(), torch.no_grad():
            note("reference", trained(input_ids=ids[rank]).logits, reference)
        output = trained(input_ids=ids[rank], labels=ids[rank], output_router_logits=True)
        trained.backward(output.loss)
        note("loss", output.loss, outputs[rank].loss)
        wanted = {name: parameter for name, parameter in whole.named_parameters() if parameter.requires_grad}
        found = {name: parameter for name, parameter in trained.module.named_parameters() if parameter.requires_grad}
        assert wanted.keys() == found.keys()
        for name, parameter in found.items():
            if wanted[name].grad is not None:
                note(f"gradient of {name}", safe_get_full_grad(parameter), local(name, wanted[name].grad))
        trained.step()
        optimizer.step()
        optimizer.zero_grad()
        for name, parameter in found.items():
            note(f"weight of {name}", safe_get_full_fp32_param(parameter), local(name, wanted[name].data))
    trained.destroy()
    return errors


def native_adapters(folder: Path, cases: list[tuple[str, str]], **_: Any) -> Any:
    """Losses, gradients and weights of adapters in five steps with experts that transformers spreads, likewise."""
    from accelerate import PartialState

    PartialState(cpu=True)
    return [_native_adapter(*case) for case in cases]


def _native_adapter(model: str, kind: str) -> dict[str, float]:
    from moe_backbone.expert_parallel.native import native_expert_parallel_options
    from moe_backbone.expert_parallel.native_adapters import _trained, spread_native_adapters, whole_tensor

    rank, size = dist.get_rank(), dist.get_world_size()
    whole = adapted(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).train(), kind)
    options = native_expert_parallel_options(size, size)
    spread = adapted(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, **options).train(), kind)
    spread_native_adapters(spread)
    adam = {"lr": 0.01, "eps": 1e-4, "weight_decay": 0.1}
    optimizers = [
        torch.optim.AdamW([p for p in each.parameters() if p.requires_grad], **adam) for each in (whole, spread)
    ]
    ids = torch.randint(0, 60, (2 * size, 16), generator=torch.Generator().manual_seed(5)).split(2)
    errors: dict[str, float] = {}

    def note(name: str, got: torch.Tensor, want: torch.Tensor) -> None:
        worst = ((got - want).abs().max() / want.abs().max().clamp(min=1e-6)).detach().reshape(1)
        dist.all_reduce(worst, dist.ReduceOp.MAX)
        errors[name] = max(errors.get(name, 0.0), float(worst))

    for _ in range(5):
        outputs = [whole(batch, labels=batch, output_router_logits=True) for batch in ids]
        (sum(output.loss for output in outputs) / size).backward()
        with whole.disable_adapter(), spread.disable_adapter(), torch.no_grad():
            note("reference", spread(ids[rank]).logits, whole(ids[rank]).logits)
        output = spread(ids[rank], labels=ids[rank], output_router_logits=True)
        output.loss.backward()
        note("loss", output.loss, outputs[rank].loss)
        wanted = {name: parameter for name, parameter in whole.named_parameters() if parameter.requires_grad}
        found = _trained(spread)
        assert list(wanted) == [name for name, *_ in found]
        for name, parameter, factor in found:
            if wanted[name].grad is not None:
                if factor is None:  # as transformers' Trainer does
                    dist.all_reduce(parameter.grad)
                    parameter.grad /= size
                note(f"gradient of {name}", whole_tensor(parameter.grad, factor), wanted[name].grad)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        for name, parameter, factor in found:
            note(f"weight of {name}", whole_tensor(parameter.detach(), factor), wanted[name].data)
    return errors
