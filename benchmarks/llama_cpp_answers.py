"""Does llama.cpp answer an exported Compass model as transformers does?

    pip install llama-cpp-python
    PYTHONPATH=tests python -m benchmarks.llama_cpp_answers LLAMA_CPP

LLAMA_CPP is the folder of llama.cpp's sources, as in `vendor/llama.cpp` of llama-cpp-python's source distribution.
Tiny random models are exported by `otpo export --format gguf` and read by llama.cpp on the CPU in float32. llama.cpp's
converter knows tokenizers by a checksum of what they make of one text. The tokenizer of these models is made on the
spot, so the script tells the converter that it is Qwen2's; tokens are handed over as numbers, and no text is compared.
Each model is a row of `benchmarks/results/llama_cpp_answers_cpu.csv`.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from compass_helpers import YARN, compass_model
from helpers import make_tokenizer
from llama_cpp import Llama, __version__  # pyright: ignore[reportMissingImports]
from transformers import AutoModelForCausalLM

from benchmarks import harness
from otpo.cli.main import main as otpo

MODELS = {
    "default": {},
    "tied, with an MTP layer": {"tie_word_embeddings": True, "num_mtp_layers": 1},
    "YaRN": {"rope_parameters": {**YARN, "original_max_position_embeddings": 64}},
    "Mixtral": {"use_qk_norm": False},
}
SIZES = {"hidden_size": 64, "head_dim": 32, "moe_intermediate_size": 64, "num_experts": 4, "initializer_range": 0.1}
PROMPTS, TOKENS = 5, 24
CONVERTER = """\
import runpy, sys
sys.path[:0] = [{folder!r}, {folder!r} + "/gguf-py"]
from conversion import base
for found in list(vars(base).values()):
    if isinstance(found, type) and "get_vocab_base_pre" in vars(found):
        found.get_vocab_base_pre = lambda self, tokenizer: "qwen2"
sys.argv[0] = {folder!r} + "/convert_hf_to_gguf.py"
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def compare(folder: Path, gguf: Path) -> tuple[float, float, int]:
    """The largest difference of logits, their spread, and the number of greedy tokens that are equal."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    llama = Llama(str(gguf), logits_all=True, n_ctx=512, verbose=False, type_k=0, type_v=0)  # a cache in float32
    difference, spread, equal = 0.0, 0.0, 0
    for seed in range(PROMPTS):
        ids = torch.randint(5, 320, (1, 7 + 6 * seed), generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            want = model(ids).logits[0].numpy()
            greedy = model.generate(ids, max_new_tokens=TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0)
        llama.reset()
        llama.eval(ids[0].tolist())
        difference = max(difference, float(np.abs(llama.scores[: ids.size(1)] - want).max()))
        spread = float(want.std())
        llama.reset()
        stream = llama.generate(ids[0].tolist(), temp=0.0, repeat_penalty=1.0, top_k=1)
        equal += sum(next(stream) == token for token in greedy[0, ids.size(1) :].tolist())
    return difference, spread, equal


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("llama_cpp", metavar="LLAMA_CPP")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/llama_cpp_answers_cpu.csv"))
    args = parser.parse_args()
    sources, rows = Path(args.llama_cpp).resolve(), []
    tokenizer = make_tokenizer()
    print(f"llama-cpp-python {__version__}, {PROMPTS} prompts of 7 to {1 + 6 * PROMPTS} tokens")
    with tempfile.TemporaryDirectory() as root:
        converter = Path(root) / "convert.py"
        converter.write_text(CONVERTER.format(folder=str(sources)))
        for number, (name, changes) in enumerate(MODELS.items()):
            folder, gguf = Path(root) / str(number), Path(root) / f"{number}.gguf"
            sizes = {**SIZES, "vocab_size": len(tokenizer), "max_position_embeddings": 512}
            compass_model(**{**sizes, **changes}).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            words = ["--format", "gguf", "--outtype", "f32", "--converter", str(converter)]
            if otpo(["export", str(folder), str(gguf), *words]):
                raise SystemExit(f"{name}: not exported")
            difference, spread, equal = compare(folder, gguf)
            numbers = {"difference": f"{difference:.2g}", "spread": f"{spread:.2g}", "equal": equal}
            rows.append({"model": name, **numbers, "tokens": PROMPTS * TOKENS, "llama-cpp-python": __version__})
            print(
                f"{name}: logits differ by {difference:.2g} at most, their spread is {spread:.2g}; "
                f"{equal} of {PROMPTS * TOKENS} greedy tokens are equal"
            )
    machine = harness.describe_machine("transformers")
    harness.write_rows(args.output, [row | machine for row in rows])


if __name__ == "__main__":
    main()
