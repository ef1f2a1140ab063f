"""Writes a Compass model as Qwen3-MoE, has transformers answer with it, and says how to serve it.

python examples/export_and_serve.py runs/demo/align served/demo
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

from otpo.cli.main import main as otpo


def main(model: str, out: str, question: str = "Which colour is the shirt?") -> None:
    code = otpo(["export", model, out, "--verify"])  # compares the logits of both models
    if code:
        raise SystemExit(code)
    served = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = served.generate(**inputs, max_new_tokens=32, do_sample=False)[0, inputs["input_ids"].size(1) :]
    print(f"{type(served).__name__} answers {tokenizer.decode(answer, skip_special_tokens=True)!r}")
    print(f"Serve it with:\n  vllm serve {out}\n  python -m sglang.launch_server --model-path {out}")


if __name__ == "__main__":
    main(*sys.argv[1:])
