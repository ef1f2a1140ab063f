# Two commands on a fresh machine: `make demo` and `make test`. Each makes .venv when it is not there.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test lint data ablation-quick clean

demo: $(VENV)/installed
	$(BIN)/python examples/demo.py

# Small models gain nothing from threads, so each worker gets one.
test: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -q

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

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
	rm -rf $(VENV) runs dist build
