"""What each of the processes runs that the tests of expert parallelism start; the first one writes a JSON result.

torchrun --nproc_per_node 2 expert_parallel_worker.py NAME FOLDER OPTIONS

The file is over 350 lines because all of these tests start one script, whose functions share data, options and losses.
"""

import json
import os
import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.distributed as dist
from adapted_models import adapted, engines_of_adapters, native_adapters  # noqa: F401 - started by their names
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

import moe_backbone  # noqa: F401 - makes Compass known to transformers

STEPS = 4


def gradient(leaf: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def layers(folder: Path, gathers: bool = False, **_: Any) -> Any:
    """The layer against the whole experts in this process, on routings of every kind; the worst relative errors."""
    import deepspeed
    from compass_helpers import compass_config

    from moe_backbone.expert_parallel.deepspeed_layer import ParallelExperts
    from moe_backbone.model.moe_block import CompassExperts

    deepspeed.init_distributed(dist_backend="gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    config = compass_config(num_experts=4, num_experts_per_tok=2)
    config._experts_implementation = "eager"
    layout = {"expert_storage": "fused_3d", "expert_w1_name": "gate_up_proj", "expert_w2_name": "down_proj"}
    spec: Any = SimpleNamespace(num_experts=4, expert_w3_name=None, **layout)
    routings = {
        "random": lambda tokens: torch.rand(tokens, 4).argsort(1)[:, :2],
        "an expert with no tokens": lambda tokens: torch.rand(tokens, 3).argsort(1)[:, :2],
        "all to one process": lambda tokens: torch.tensor([[2, 3]]).repeat(tokens, 1),
        "all to one expert": lambda tokens: torch.tensor([[1, 1]]).repeat(tokens, 1),
    }
    errors = {}
    for name, choose in routings.items():
        for tokens in ([7, 7], [12, 3], [5, 0], [0, 0], [1, 1]):
            torch.manual_seed(len(errors))
            whole = CompassExperts(config)
            for parameter in whole.parameters():
                parameter.data = 0.3 * torch.randn_like(parameter)
            batches = [(torch.randn(n, 32), choose(n), torch.rand(n, 2), torch.randn(n, 32)) for n in tokens]
            layer = ParallelExperts(whole, spec, size, rank)
            layer.ep_group = dist.group.WORLD
            if gathers:
                layer.gather(max(tokens) + len(errors) // 6 % 2)  # with and without tokens that make up the number

            def leaves(batch):
                return batch[0].clone().requires_grad_(), batch[1], batch[2].clone().requires_grad_()

            of_all = [leaves(batch) for batch in batches]
            outputs = [whole(*batch) for batch in of_all]
            total = sum((output * batch[3]).sum() for output, batch in zip(outputs, batches, strict=True))
            (total + sum(parameter.sum() * 0 for parameter in whole.parameters())).backward()
            mine = leaves(batches[rank])
            output = layer(*mine)
            output.backward(batches[rank][3])
            experts = slice(rank * 2, rank * 2 + 2)
            gate, up = whole.gate_up_proj.grad[experts].chunk(2, dim=1)
            pairs = {
                "output": (output, outputs[rank]),
                "hidden_states": (mine[0].grad, gradient(of_all[rank][0])),
                "top_k_weights": (mine[2].grad, gradient(of_all[rank][2])),
                "gate": (layer.experts.w1.grad, gate),
                "up": (layer.experts.w3.grad, up),
                "down": (layer.experts.w2.grad, whole.down_proj.grad[experts]),
            }
            for part, (got, want) in pairs.items():
                scale = want.abs().max() if want.numel() else torch.ones(())
                worst = (got - want).abs().max() if want.numel() else torch.zeros(())
                worst = (worst / scale.clamp(min=1e-6)).reshape(1)
                dist.all_reduce(worst, dist.ReduceOp.MAX)
                errors[f"{name}, {tokens}, {part}"] = float(worst)
    return errors


def agreement(folder: Path, **_: Any) -> Any:
    """What each process holds for the most tokens of two passes, where the last process is a group of its own."""
    from moe_backbone.expert_parallel.capacity import AgreedCapacity, host_group

    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    groups = [dist.new_group(ranks) for ranks in (list(range(size - 1)), [size - 1])]
    capacity = AgreedCapacity(host_group(groups[rank == size - 1], 60))
    found = []
    for tokens in (2 * rank + 2, 5 if rank == 0 else 3 * rank):
        capacity.agree(tokens)
        found.append(capacity.tokens)
    of_all: list[Any] = [None] * size
    dist.all_gather_object(of_all, found)
    return of_all


def engine(folder: Path, model: str, stage: int, **_: Any) -> Any:
    """Five steps of DeepSpeed's engine and what is saved then against the whole model; the worst relative errors."""
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    from moe_backbone.expert_parallel.deepspeed_config import expert_parallel_config
    from moe_backbone.expert_parallel.deepspeed_patch import patch_deepspeed
    from moe_backbone.expert_parallel.save import save_plain_model

    deepspeed.init_distributed(dist_backend="gloo")
    patch_deepspeed()
    rank, size = dist.get_rank(), dist.get_world_size()
    whole, spread = (AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).train() for _ in range(2))
    config = expert_parallel_config(whole.config.model_type, size, stage)
    config |= {"train_micro_batch_size_per_gpu": 2, "train_batch_size": 2 * size, "gradient_accumulation_steps": 1}
    config |= {"gradient_clipping": 0.0, "bf16": {"enabled": False}}
    adam = {"lr": 0.01, "eps": 1e-4, "weight_decay": 0.1}
    config["optimizer"] = {"type": "AdamW", "params": {**adam, "torch_adam": True}}
    trained, *_ = deepspeed.initialize(model=spread, model_parameters=list(spread.parameters()), config=config)
    optimizer = torch.optim.AdamW(whole.parameters(), **adam)
    modules = dict(trained.module.named_modules())
    ids = torch.randint(0, 60, (2 * size, 16), generator=torch.Generator().manual_seed(5)).split(2)
    errors: dict[str, float] = {}

    def note(name: str, got: torch.Tensor, want: torch.Tensor) -> None:
        worst = ((got - want).abs().max() / want.abs().max().clamp(min=1e-6)).detach().reshape(1)
        dist.all_reduce(worst, dist.ReduceOp.MAX)
        errors[name] = max(errors.get(name, 0.0), float(worst))

    for _ in range(5):
        outputs = [whole(batch, labels=batch, output_router_logits=True) for batch in ids]
        (sum(output.loss for output in outputs) / size).backward()
        output = trained(input_ids=ids[rank], labels=ids[rank], output_router_logits=True)
        trained.backward(output.loss)
        note("loss", output.loss, outputs[rank].loss)
        if getattr(output, "aux_loss", None) is not None:  # routers that a bias balances have none
            note("aux_loss", output.aux_loss, outputs[rank].aux_loss)
        wanted = {name: parameter.grad for name, parameter in whole.named_parameters()}
        for name, parameter in trained.module.named_parameters():
            got = safe_get_full_grad(parameter)
            experts, _, weight = name.rpartition(".experts.")
            if weight in ("w1", "w2", "w3"):
                layer = modules[experts]
                own = slice(layer.ep_rank * layer.num_local_experts, (layer.ep_rank + 1) * layer.num_local_experts)
                gate, up = wanted[f"{experts}.gate_up_proj"][own].chunk(2, dim=1)
                want = {"w1": gate, "w2": wanted[f"{experts}.down_proj"][own], "w3": up}[weight]
            else:
                want = wanted[name]
            if want is not None:
                note(f"gradient of {name}", got, want)
        trained.step()
        optimizer.step()
        optimizer.zero_grad()

    save_plain_model(trained.module, folder / "final")
    saved = AutoModelForCausalLM.from_pretrained(folder / "final", dtype=torch.float32).eval()
    with torch.no_grad():
        note("saved", saved(ids[rank]).logits, whole.eval()(ids[rank]).logits)
    return errors


def engines(folder: Path, stages: dict[str, int], **_: Any) -> Any:
    """[`engine`] of several models, one after the other in the same processes, each with its own stage."""
    return {model: engine(folder / Path(model).name, model, stage) for model, stage in stages.items()}


def native_engine(folder: Path, model: str, **_: Any) -> Any:
    """Loss and gradients with experts that transformers spreads against the whole model; the worst relative errors."""
    from moe_backbone.expert_parallel.native import native_expert_parallel_options, require_native_expert_parallelism

    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    options = native_expert_parallel_options(size, size)
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).train()
    spread = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, **options).train()
    require_native_expert_parallelism(spread, size)
    ids = torch.randint(0, 60, (2 * size, 16), generator=torch.Generator().manual_seed(5)).split(2)
    outputs = [whole(batch, labels=batch, output_router_logits=True) for batch in ids]
    (sum(output.loss for output in outputs) / size).backward()
    output = spread(input_ids=ids[rank], labels=ids[rank], output_router_logits=True)
    output.loss.backward()
    errors = {"loss": float((output.loss - outputs[rank].loss).abs())}
    for (name, want), value in zip(whole.named_parameters(), spread.parameters(), strict=True):
        grad: Any = value.grad
        grad = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
        if want.grad is not None:
            errors[f"gradient of {name}"] = float((grad - want.grad).abs().max() / want.grad.abs().max().clamp(1e-6))
    return errors


def tensor_parallel(folder: Path, model: str, **changes: Any) -> Any:
    """Loss and gradients under transformers' tensor parallelism against the whole model; the worst absolute errors."""
    from transformers.distributed import DistributedConfig

    dist.init_process_group("gloo")
    whole = AutoModelForCausalLM.from_pretrained(model, **changes).train()
    split = AutoModelForCausalLM.from_pretrained(
        model, distributed_config=DistributedConfig(tp_size=dist.get_world_size(), tp_plan="auto"), **changes
    ).train()
    ids = torch.randint(1, 60, (2, 9), generator=torch.Generator().manual_seed(5))
    expected, got = (each(ids, labels=ids) for each in (whole, split))
    expected.loss.backward()
    got.loss.backward()
    names = ("loss", "lm_loss", "mtp_loss", "aux_loss", "expert_load")
    errors = {name: float((getattr(got, name) - getattr(expected, name)).abs().max()) for name in names}
    for (name, want), value in zip(whole.named_parameters(), split.parameters(), strict=True):
        if want.grad is not None:
            grad: Any = value.grad
            grad = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
            errors[f"gradient of {name}"] = float((grad - want.grad).abs().max())
    return errors


def rows() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": (x := torch.randint(0, 60, (16,), generator=generator)), "labels": x} for _ in range(64)]


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    options: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "max_steps": STEPS,
        "logging_steps": 1,
        "save_steps": 2,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "learning_rate": 0.01,
        "adam_epsilon": 1e-4,
        "lr_scheduler_type": "linear",  # a rate that stands still would hide what a resumed run's is
        "disable_tqdm": True,
        **changes,
    }
    return TrainingArguments(**options)


def losses(trainer: Trainer) -> dict[int, float]:
    return {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}


class DieAt(TrainerCallback):
    """Ends a process without a word."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os._exit(17)


def train(
    folder: Path,
    model: str,
    ep_size: int = 2,
    stage: int = 2,
    resume: str | None = None,
    die_at: int | None = None,
    die_saving: bool = False,
    changes: dict[str, Any] | None = None,
    freeze: str | None = None,
    disturb: float = 0.0,
    kind: str | None = None,
    **_: Any,
) -> Any:
    """Losses of a Trainer, and the logits of what it saved, in a process of its own, against those of the engine."""
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    from accelerate import PartialState

    from moe_backbone.expert_parallel import save as expert_parallel_export
    from moe_backbone.expert_parallel.deepspeed_config import expert_parallel_config
    from moe_backbone.expert_parallel.deepspeed_trainer import with_expert_parallelism

    rank = PartialState(backend="gloo").process_index
    config = AutoModelForCausalLM.from_pretrained(model).config
    deepspeed = expert_parallel_config(config.model_type, ep_size, stage)
    changes = {"accelerator_config": {"use_configured_state": True}, **(changes or {})}
    args = arguments(folder, deepspeed=deepspeed, **changes)
    spread = prepared(model, freeze, disturb)
    if kind is not None:
        spread = adapted(spread, kind)
        spread.config.use_cache = False
    trainer = with_expert_parallelism(Trainer, ep_size)(
        model=spread, args=args, train_dataset=rows(), eval_dataset=rows()[:4]
    )
    if die_at is not None and rank == 1:
        trainer.add_callback(DieAt(die_at))
    if die_saving:
        publish = expert_parallel_export._publish

        def die(target: Path, *more: Any) -> None:
            if target.name == "checkpoint-4":
                os._exit(17)
            publish(target, *more)

        expert_parallel_export._publish = die
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(str(folder / "final"))
    engine = trainer.model_wrapped
    engine.eval()
    with torch.no_grad():
        logits = engine(input_ids=torch.stack([row["input_ids"] for row in rows()[:2]])).logits
    return {**outcome(trainer), "engine": type(engine).__name__, "logits": logits.flatten()[:50].tolist()}


def prepared(model: str, freeze: str | None = None, disturb: float = 0.0, **options: Any) -> Any:
    """A model whose weights with a name that matches `freeze` are frozen; where told, it is another one than on disk.

    What a checkpoint does not restore shows then.
    """
    made = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, **options)
    for name, parameter in made.named_parameters():
        if freeze and re.search(freeze, name):
            parameter.requires_grad_(False)
    if disturb:
        with torch.no_grad():
            for tensor in made.state_dict().values():
                tensor.mul_(1 + disturb).add_(disturb)  # adding alone moves no router's choice
    return made


def outcome(trainer: Trainer) -> dict[str, Any]:
    """Losses by step, those of evaluations, and the checkpoint that was the best."""
    evaluated = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    best = trainer.state.best_model_checkpoint
    return {"losses": losses(trainer), "evaluated": evaluated, "best": best and Path(best).name}


def native(
    folder: Path,
    model: str,
    ep_size: int = 2,
    resume: str | None = None,
    changes: dict[str, Any] | None = None,
    disturb: float = 0.0,
    die_saving: bool = False,
    kind: str | None = None,
    **_: Any,
) -> Any:
    """The same with experts that transformers spreads."""
    from moe_backbone.expert_parallel.native import (
        native_expert_parallel_options,
        require_native_expert_parallelism,
    )
    from moe_backbone.expert_parallel.native_trainer import with_native_checkpoints

    args = arguments(folder, **(changes or {}))
    spread = prepared(model, disturb=disturb, **native_expert_parallel_options(ep_size, args.world_size))
    running = require_native_expert_parallelism(spread, ep_size) if ep_size > 1 else ""
    if kind is not None:
        spread = adapted(spread, kind)
    trainer = with_native_checkpoints(Trainer)(model=spread, args=args, train_dataset=rows(), eval_dataset=rows()[:4])
    if die_saving and args.process_index == 1:
        save = trainer._save_rng_state

        def die(target: str) -> None:
            if target.endswith("checkpoint-4"):
                time.sleep(2)  # in which the first process could write its own
                os._exit(17)
            save(target)

        trainer._save_rng_state = die
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(str(folder / "final"))
    spread.eval()
    with torch.no_grad():
        logits = spread(input_ids=torch.stack([row["input_ids"] for row in rows()[:2]])).logits
    logits = logits.full_tensor() if hasattr(logits, "full_tensor") else logits
    return {**outcome(trainer), "running": running, "logits": logits.flatten()[:50].tolist()}


if __name__ == "__main__":
    name, target, options = sys.argv[1:]
    result = globals()[name](Path(target), **json.loads(options))
    if dist.get_rank() == 0:
        (Path(target) / "result.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()
