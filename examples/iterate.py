"""Rounds of a model's own pairs and alignment, from one YAML; after each, its answers to held-out prompts are counted.

    python examples/iterate.py examples/iterate.yaml

A round is `otpo pairs` and `otpo align`. A run that was killed goes on when the same command is given again, and is
refused where the plan, or rows, judges' files or local models that it names, have changed.
"""

import argparse
import sys

from transformers.utils import logging
from yaml import YAMLError

from otpo.cli.iterating import plan, rounds, steps, summary


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", help="YAML file, such as examples/iterate.yaml")
    logging.set_verbosity_error()
    try:
        wanted, folder = plan.open_plan(parser.parse_args(argv).plan)
    except (OSError, ValueError, YAMLError) as error:
        parser.error(str(error))
    rows, model = [rounds.first_row(folder, wanted)], wanted["model_name_or_path"]
    for number in range(1, wanted["rounds"] + 1):
        steps.console.rule(f"Round {number} of {wanted['rounds']}")
        rows.append(rounds.run_round(number, model, folder / f"round{number}", wanted))
        model = folder / f"round{number}" / "model"
    summary.show(rows, folder)
    steps.console.print(f"model       {model}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
