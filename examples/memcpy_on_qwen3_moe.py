"""One step of a Mixture-of-Experts model, by transformers' `grouped_mm` and by `memcpy`: same loss, times beside it.

    python examples/memcpy_on_qwen3_moe.py Qwen/Qwen3-30B-A3B

Any Mixture-of-Experts model of transformers will do. Without a GPU the moves run in torch: times tell nothing then.
"""

import sys
import time

import torch
from transformers import AutoModelForCausalLM

import moe_backbone  # noqa: F401 - makes "memcpy" known to transformers


def main(name: str) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, experts_implementation="grouped_mm").to(device)
    ids = torch.randint(model.config.vocab_size, (1, 256), generator=torch.Generator().manual_seed(0)).to(device)
    for experts in ("grouped_mm", "memcpy"):
        model.set_experts_implementation(experts)
        for _ in range(3):  # the first one compiles and tunes
            model.zero_grad()
            begin = time.perf_counter()
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            told = loss.item()  # waits for the device
            if device == "cuda":
                torch.cuda.synchronize()
        print(f"{experts:<12} loss {told:.5f}  {1e3 * (time.perf_counter() - begin):.1f} ms on {device}")


if __name__ == "__main__":
    main(*sys.argv[1:])
