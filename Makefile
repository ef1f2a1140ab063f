# Two commands on a fresh machine: `make demo` and `make test`. Each makes .venv when it is not there.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test test-fast test-latest lint fix docs data ablation-quick clean

demo: $(VENV)/installed
	$(BIN)/python examples/demo.py

# Small models gain nothing from threads, so each worker gets one. Workers take neighbouring tests, which share what is
# costly to set up, and the one that is done first takes over half of what is left.
test: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -q

# While working: the first case of each test that is not marked lengthy. What has grown over two seconds is printed.
test-fast: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -q --first-cases \
		-m "not slow and not gpu and not lengthy" --durations 10 --durations-min 2

# The seams to TRL and DeepSpeed with the newest releases, past the upper bounds of pyproject.toml.
test-latest:
	PYTHON=$(PYTHON) tests/latest.sh

fix: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# The site, in build/site; `mkdocs serve` shows it while pages are written.
docs: $(VENV)/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

data: $(VENV)/installed
	$(BIN)/python -m otpo.data.ecommerce.generate

ablation-quick: $(VENV)/installed
	OMP_NUM_THREADS=2 $(BIN)/python -m benchmarks.ablation --matrix benchmarks/ablation/quick.yaml \
		--output runs/ablation_quick

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) .venv-latest runs dist build
