"""Which tokens of a pair count, under three weightings: printed, and as a page with the transport plan.

python examples/inspect_weights.py HuggingFaceTB/SmolLM2-135M-Instruct weights.html
"""

import sys
from pathlib import Path

from otpo import OTPOConfig, OTPOTrainer
from otpo.data import load_demo_preferences
from otpo.explain import explain_rows, render_page
from otpo.explain.pieces import token_labels


def main(model: str, page: str) -> None:
    args = OTPOConfig(output_dir="runs/inspect", ot_reg=0.05, report_to="none", use_cpu=True, bf16=False)
    trainer = OTPOTrainer(model, args=args, train_dataset=load_demo_preferences("train", ["en"], count=4))
    explained = explain_rows(trainer, rows=[0, 3], reference=False, beside=["contrast", "diff"])
    for pair in explained:
        print(f"\n{pair.name}: {pair.prompt!r}")
        for place, side in enumerate((pair.chosen, pair.rejected)):
            weights = {"otpo": side.weights} | {name: both[place] for name, both in pair.beside.items()}
            print(f"\n{('chosen', 'rejected')[place]:<14}" + "".join(f"{name:>10}" for name in weights))
            for token, label in enumerate(token_labels(side.pieces)):
                print(f"{label!r:<14}" + "".join(f"{of[token]:>10.2f}" for of in weights.values()))
    Path(page).write_text(render_page(explained, facts={"model": model}), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
