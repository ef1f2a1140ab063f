"""How many experts does each draw of calibration documents reach, and what does FP8 cost after it?

    python -m benchmarks.quantization_draws MODEL DATA

MODEL is any model that `otpo quantize` takes, DATA a dataset, 500 of whose documents are held out. The committed rows
are those of a tiny model whose experts are used unevenly, on two CPU cores:

    python examples/demo.py --until pretrain --output runs/demo
    python -m benchmarks.quantization_draws --make runs/uneven --tokenizer runs/demo/tokenizer
    otpo pretrain --model_name_or_path runs/uneven --dataset_name runs/demo/corpus.jsonl --sequence_length 256 \\
        --per_device_train_batch_size 4 --max_steps 250 --learning_rate 5e-3 --adam_beta2 0.98 --warmup_steps 20 \\
        --use_cpu --bf16 false --save_strategy no --output_dir runs/uneven-trained
    python -m benchmarks.quantization_draws runs/uneven-trained runs/demo/corpus.jsonl

`--make` writes `compass-tiny` with two experts a token and without the routers' losses. Each row is a draw of a number
of tokens by a seed: experts that have seen their share, experts that have seen a row, and the change of the loss over
full precision with each layer's largest input scale, as vLLM computes, and with each expert's own.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from benchmarks import harness
from moe_backbone import CompassForCausalLM
from moe_backbone.model.presets import preset
from moe_backbone.quantization.drawing import DRAWS, draw
from moe_backbone.quantization.observing import observe
from moe_backbone.quantization.reference import RoundedInputs, load_rounded
from moe_backbone.quantization.scales import input_scales, weight_scales
from moe_backbone.quantization.scheme import make_scheme
from moe_backbone.quantization.tapping import tapped
from moe_backbone.quantization.writing import quantized_tensors
from otpo.cli.quantizing.documents import batches, read_documents
from otpo.cli.quantizing.measuring import change, losses
from otpo.cli.quantizing.model import opened
from otpo.cli.quantizing.options import check, make_parser

BUDGETS, SEEDS, SHARE, BATCH = (500, 2_000, 20_000), 5, 16, 64


def make(folder: str, tokenizer_name: str) -> None:
    """A new model whose routers are left to themselves."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_name)
    torch.manual_seed(0)
    sizes = {"num_experts_per_tok": 2, "router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0}
    tokens = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = preset("compass-tiny", vocab_size=len(tokenizer), **sizes, **tokens)
    CompassForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def compare(model: str, data: str) -> list[dict[str, Any]]:
    """A row for each budget, draw and seed."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        words = [model, f"{folder}/fp8", "--dataset_name", data, "--test_split_size", "500", "--max_eval_rows", "500"]
        options = make_parser().parse_args([*words, "--max_train_rows", "4000", "--dtype", "float32"])
        check(options)
        with opened(options) as source:
            train, held_out = read_documents(options, source.tokenizer, source.model.config.vocab_size)
            found = observe(source.model, source.places, batches(train, BATCH))
            before = losses(source.model, held_out, BATCH)
            scheme = make_scheme("static")
            weights = weight_scales(source.tensors, source.targets, scheme.weights)
            written = quantized_tensors(source.tensors, source.targets, scheme, weights, None)
            load_rounded(source.model, source.places, source.targets, written, scheme.weights)
            reachable = int((found.rows_NLE.sum(0) > 0).sum())
            for budget in BUDGETS:
                for kind in DRAWS:
                    for seed in range(SEEDS):
                        drawn = draw(kind, found.rows_NLE, found.tokens_N, SHARE, budget, seed)
                        inputs = input_scales(found, drawn, scheme.input_activations)
                        row = {"tokens": budget, "draw": kind, "seed": seed, "reachable": reachable}
                        seen_LE = found.rows_NLE[drawn].sum(0)
                        row |= {"filled": int((seen_LE >= SHARE).sum()), "seen": int((seen_LE > 0).sum())}
                        for name, used in (("served", inputs.largest_of_layers()), ("own_scales", inputs)):
                            with tapped(source.model, source.places, RoundedInputs(scheme.input_activations, used)):
                                raised, error = change(before, losses(source.model, held_out, BATCH))
                            row |= {f"change_{name}": f"{raised:.6f}", f"error_{name}": f"{error:.6f}"}
                        rows.append(row)
                        print(row, flush=True)
    return rows


def main() -> None:
    """Makes a model, or compares the draws and writes their rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a model that `otpo quantize` takes")
    parser.add_argument("data", nargs="?", help="a dataset")
    parser.add_argument("--make", metavar="FOLDER", help="write a new model there, and nothing else")
    parser.add_argument("--tokenizer", metavar="FOLDER", help="of the new model")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/quantization_draws_cpu.csv"))
    args = parser.parse_args()
    if args.make:
        make(args.make, args.tokenizer)
        return
    rows = compare(args.model, args.data)
    machine = harness.describe_machine("transformers", "compressed-tensors")
    harness.write_rows(args.output, [row | machine for row in rows])


if __name__ == "__main__":
    main()
