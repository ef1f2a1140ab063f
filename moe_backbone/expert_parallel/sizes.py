"""Sizes of expert parallelism: which ones fit a run, and the line that says which one runs."""

import os


def check_expert_parallel(ep_size: int, num_experts: int, world_size: int, gpus_per_node: int | None = None) -> None:
    """Raises a `ValueError` where a run can't spread its experts over this many processes.

    Args:
        ep_size: Processes that share the experts.
        num_experts: Experts of each layer.
        world_size: Processes of the run.
        gpus_per_node: Processes on a machine; None for what the launcher says (`LOCAL_WORLD_SIZE`).
    """
    node = gpus_per_node or int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    fitting = [n for n in range(1, min(node, num_experts) + 1) if node % n == num_experts % n == 0]
    remedy = f"Set `expert_parallel_size` to one of {fitting}."
    if ep_size < 1:
        raise ValueError(f"`expert_parallel_size` must be at least 1, got {ep_size}. {remedy}")
    if num_experts % ep_size:
        raise ValueError(f"`expert_parallel_size={ep_size}` does not divide the {num_experts} experts. {remedy}")
    if node % ep_size:
        raise ValueError(
            f"`expert_parallel_size={ep_size}` does not divide the {node} process(es) of a machine. Experts are "
            f"shared inside a machine, whose links are fast; across machines the data alone is. {remedy}"
        )


def describe_expert_parallel(ep_size: int, local_experts: int, layers: int, engine: str) -> str:
    """The line that a run prints about its spread experts.

    Args:
        ep_size: Processes that share the experts.
        local_experts: Experts of each layer in each process.
        layers: Layers with spread experts.
        engine: What spreads them.
    """
    total = local_experts * ep_size
    return f"{local_experts} of {total} in each process, over {ep_size} process(es), in {layers} layers; {engine}"
