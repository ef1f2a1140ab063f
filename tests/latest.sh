#!/usr/bin/env bash
# The tests of the seams to TRL and DeepSpeed with their newest releases, in .venv-latest; `make test-latest` runs this.
#
# Requirements are those of pyproject.toml without their upper bounds, which are what is tried here. Torch stays that of
# constraints.txt: its builds for GPUs are large, and the seams rely on nothing private of it.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=.venv-latest
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"

newest=()
while IFS= read -r requirement; do newest+=("$requirement"); done < <("$venv/bin/python" - <<'PYTHON'
import re
import tomllib

with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
tools = ("build", "lm_eval", "pyright", "ruff")  # no test of the seams needs them
for requirement in project["dependencies"] + project["optional-dependencies"]["dev"]:
    if not requirement.startswith(tools):
        print(re.sub(r",\s*<[^;,]*", "", requirement))
PYTHON
)
torch=$(grep '^torch==' constraints.txt)
"$venv/bin/python" -m pip install --quiet --upgrade "${newest[@]}" "$torch"
"$venv/bin/python" -m pip install --quiet --no-deps --no-build-isolation -e .
"$venv/bin/python" -m pip list 2>/dev/null | grep -E '^(accelerate|datasets|deepspeed|peft|torch|transformers|trl) '

OTPO_UNTESTED_DEEPSPEED=1 OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 "$venv/bin/python" -m pytest -q "$@" \
    tests/otpo/test_trl_seam.py tests/otpo/test_trainer_equals_dpo.py tests/otpo/test_resuming_experts.py \
    tests/moe_backbone/test_expert_parallel.py tests/moe_backbone/test_expert_parallel_presets.py \
    tests/moe_backbone/test_expert_parallel_resume.py
