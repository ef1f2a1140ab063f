"""The tables of docs/performance.md, each made from a committed CSV, and that of the presets.

`python -m benchmarks.pages` prints them;
tests/docs/test_numbers.py compares the page with them, so that a new measurement can't leave an old number there.
"""

from collections.abc import Callable
from functools import partial

from benchmarks.committed import Row, read, table
from benchmarks.layer_pages import expert_layers, gated_layers, gathering_products, layer_sentences, sonic_layers
from benchmarks.preference_step import report as steps
from moe_backbone.model.presets import PRESETS, preset
from moe_backbone.planning.counting import count_parameters

SHAPES = {
    "qwen3-1.7b": "Qwen3-1.7B's shape",
    "compass-small": "compass-small",
    "qwen3-30b-a3b-4-layers": "four layers of Qwen3-30B-A3B's shape",
}
LAYOUTS = {
    "otpo-padded": "padded",
    "otpo-packed": "packed",
    "otpo-packed-compiled": "packed, compiled",
    "otpo-shared-prompt": "shared prompts",
    "otpo-shared-prompt-compiled": "shared prompts, compiled",
}
CASES = {
    "compass-small": "compass-small",
    "compass-v3 block": "one layer of compass-v3's width",
    "only fits spread": "three such layers, SGD",
}


def preference_steps() -> str:
    """TRL's step and our fastest one, in each comparison."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in read("preference_step_h100.csv", "preference_step_h200_x2.csv"):
        if row["status"] == "ok":
            found.setdefault(steps.case_of(row), []).append(row)
    rows = []
    for case in found.values():
        trl = next(row for row in case if row["contender"] == "trl")
        ours = max((row for row in case if row["contender"] in LAYOUTS), key=lambda row: int(row["tokens_per_s"]))
        machine = f"{trl['gpus']} x {trl['gpu'].split()[1]}" + (
            "" if trl["engine"] == "single" else {"ddp": ", DDP", "zero3": ", ZeRO-3"}[trl["engine"]]
        )
        training = "LoRA" if trl["adapter"] == "lora" else "every weight"
        if trl["checkpointing"] == "no":
            training += ", no checkpointing"
        speeds = [f"{float(row['ms']):,.0f} ms, {int(row['tokens_per_s']):,}/s" for row in (trl, ours)]
        times = f"{float(ours['speedup']):.2f}"
        rows.append(
            (
                SHAPES[trl["shape"]],
                f"{trl['lengths']}, {training}",
                machine,
                *speeds,
                LAYOUTS[ours["contender"]],
                times,
            )
        )
    head = (
        "model",
        "rows, trained",
        "GPUs",
        "TRL: step, tokens",
        "ours: step, tokens",
        "our layout",
        "times TRL's tokens/s",
    )
    return table(head, rows)


def token_weights() -> str:
    """What the weights of eight pairs cost."""
    wanted = [("1024", "1.0", "0.2"), ("1024", "0.1", "1.0"), ("1024", "0.02", "0.2"), ("2048", "1.0", "0.2")]
    wanted += [("8192", "0.02", "0.2")]
    found = {
        (row["length"], row["reg"], row["reg_m"], row["method"]): row
        for row in read("transport_h100.csv")
        if row["pairs"] == "8" and row["hidden"] == "4096"
    }
    rows = []
    for key in wanted:
        pot, plain, ours = (found[*key, method] for method in ("pot", "plain torch", "triton"))
        times = [f"{float(row['ms']):,.1f} ms" for row in (pot, plain)]
        rows.append((*key, *times, f"{float(ours['ms']):,.2f} ms", ours["iterations"]))
    head = (
        "tokens",
        "`ot_reg`",
        "`ot_reg_m`",
        "POT, pair by pair",
        "plain torch, batched",
        "otpo's kernels",
        "sweeps",
    )
    return table(head, rows)


def row_moves() -> str:
    """What each operation of memcpy reaches of a plain copy's rate, and over torch's best."""
    rows = []
    for row in read("memcpy_h100.csv"):
        if row["shape"] == "anchor" and row["contender"] == "memcpy" and row["share_of_roof"]:
            share = f"{float(row['share_of_roof']):.0%}"
            name = "permute and unpermute, forward and backward" if row["operation"] == "whole" else row["operation"]
            rows.append((name, f"{float(row['ms']):.3f} ms", share, f"{float(row['speedup_over_torch']):.1f}"))
    return table(("operation", "time", "of a plain copy's rate", "times torch's best"), rows)


def pretraining(file: str = "pretraining_h100.csv") -> str:
    """`otpo pretrain` as it is typed."""
    names = {
        "compass-small": "compass-small",
        "compass-v3-width": "two layers of compass-v3's width, 4 experts",
        "compass-v3-width-4-layers": "four layers of compass-v3's width, 4 experts",
        "qwen3-30b-a3b-4-layers": SHAPES["qwen3-30b-a3b-4-layers"],
    }
    ways = {
        "grouped_mm": "`grouped_mm`, nothing compiled",
        "grouped_mm-float32": "`grouped_mm`, nothing compiled, `--dtype float32`",
        "default-bfloat16": "default, `--dtype bfloat16`",
        "default-float32": "default, `--dtype float32`",
        "transformers": "transformers' class and Trainer, float32 weights",
    }
    rows = [
        (
            names[row["shape"]],
            ways.get(row["variant"], row["variant"]),
            f"{float(row['ms']):.0f} ms",
            f"{int(row['tokens_per_s']):,}",
            f"{float(row['mfu']):.2f}",
            f"{int(row['peak_mib']) / 1024:.1f} GiB",
            f"{float(row['speedup']):.2f}",
        )
        for row in read(file)
        if row["status"] == "ok"
    ]
    return table(("model", "how", "step", "tokens/s", "MFU", "peak", "times the first"), rows)


def spread_experts() -> str:
    """Experts spread over two GPUs."""
    contenders = ("data parallel", "deepspeed.moe.MoE", "AutoEP as it comes", "ours")
    found = {(row["case"], row["contender"]): row for row in read("expert_parallel_h100_x2.csv")}
    rows = []
    for case, name in CASES.items():
        cells = [found.get((case, contender)) for contender in contenders]
        rows.append((name, *("" if row is None else _tokens(row) for row in cells)))
    return table(("tokens/s", *contenders), rows)


def gathered_experts() -> str:
    """The same with layers that wait for nobody and are compiled."""
    rows = []
    found = {(row["contender"], row["case"]): row for row in read("expert_parallel_h200_x2.csv")}
    for contender in dict.fromkeys(name for name, _ in found):
        cells = [_tokens(found[contender, case]) for case in CASES if (contender, case) in found]
        rows.append((contender, *cells))
    return table(("tokens/s", *(CASES[case] for case in CASES if any(case == of for _, of in found))), rows)


def _tokens(row: Row) -> str:
    return f"{int(row['tokens_per_s']):,}" if row["status"] == "ok" else row["status"]


def start_up() -> str:
    """From data to the first step."""
    rows = [
        (f"{int(row['rows']):,} x {row['tokens']}", row["contender"], f"{float(row['seconds']):.1f} s")
        for row in read("start_up_100000x600_cpu.csv", "start_up_1000000x100_cpu.csv")
    ]
    return table(("pairs x tokens", "trainer", "until the first step"), rows)


def plans() -> str:
    """How far `otpo plan` is from real runs; memory where it plans no bound."""
    found = read("planning_h200.csv")
    exact = [row for row in found if "True" not in (row["compiled"], row["packed"])]
    ratios = [float(row["ms_measured"]) / float(row["ms_predicted"]) for row in found]
    worst = max(abs(float(row["peak_error"])) for row in exact)
    times = f"{min(ratios):.2f} to {max(ratios):.2f} times"
    peaks = f"within {worst:.1%} of the plan in all {len(exact)} settings"
    return f"{peaks}; steps of {len(found)} settings took {times}\n"


def sentences() -> dict[str, str]:
    """Words of docs/performance.md that hold numbers, by what they are about."""
    rows = read("preference_step_h100.csv")
    rows = [row for row in rows if row["checkpointing"] == "yes"]
    found = {(row["shape"], row["lengths"], row["adapter"], row["contender"]): row for row in rows}
    small = found["compass-small", "full", "full", "otpo-shared-prompt"]["speedup"]
    trl, ours = (found["qwen3-1.7b", "ragged", "full", name] for name in ("trl", "otpo-packed-compiled"))
    compiled = [row for row in rows if row["contender"].endswith("compiled") and row["shape"] == "qwen3-1.7b"]
    first = sorted(float(row["first_step_s"]) for row in compiled)
    return {
        "auto on small models": f"compass-small that is {float(small):.2f} times TRL's rate",
        "medians": f"{float(trl['ms']) / float(ours['ms']):.1f} times as fast",
        "first step": f"took up to {first[-1]:.0f} s",
        "padded rows": f"**{steps.overhead(rows)}**",
        **layer_sentences(),
    }


def presets() -> str:
    """The models that have a name, for docs/compass.md."""
    rows = []
    for name in PRESETS:
        config = preset(name)
        counts = count_parameters(config)
        shared = f" and {config.num_shared_experts} shared" if config.num_shared_experts else ""
        kinds = f"{config.num_experts}, top-{config.num_experts_per_tok}{shared}"
        mtp = _short(counts.mtp) if counts.mtp else "none"
        limit = f"{config.max_position_embeddings:,}"
        rows.append((f"`{name}`", _short(counts.total), _short(counts.active), mtp, kinds, limit))
    return table(("preset", "parameters", "active", "in MTP layers", "experts", "longest row"), rows)


def _short(count: int) -> str:
    """A number of parameters as 245.4B, 0.97B or 1.5M."""
    if count < 1e8 / 2:
        return f"{count / 1e6:.1f}M"
    return f"{count / 1e9:.1f}B" if count > 1e9 else f"{count / 1e9:.2f}B"


TABLES: dict[str, Callable[[], str]] = {
    "preference steps": preference_steps,
    "token weights": token_weights,
    "row moves": row_moves,
    "expert layers": expert_layers,
    "gated layers": gated_layers,
    "SonicMoE": sonic_layers,
    "gathering products": gathering_products,
    "pretraining": pretraining,
    "pretraining with FlashAttention-4": partial(pretraining, "pretraining_h200.csv"),
    "spread experts": spread_experts,
    "gathered experts": gathered_experts,
    "start-up": start_up,
    "plans": plans,
    "presets": presets,
}

if __name__ == "__main__":
    for name, make in TABLES.items():
        print(f"{name}\n\n{make()}")
