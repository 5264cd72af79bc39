# Two commands: `make demo` and `make test`. Each makes the virtual environment it needs in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
# torch first and pinned: left to pip, a dependency may bring a build with gigabytes of CUDA libraries.
TORCH := torch==2.13.0

# Without it, threads that wait for one another spin; with more threads than cores that costs up to fifty times.
export OMP_WAIT_POLICY ?= passive

.PHONY: demo test check format golden clean

demo: $(VENV)/.demo
	$(BIN)/kvferry demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n auto tests

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Only for a new version of the format, or a new case: golden frames are promises.
golden: $(VENV)/.dev
	$(BIN)/python tests/golden/make.py

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --constraint constraints.txt $(TORCH)
	touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml constraints.txt
	$(PIP) install --constraint constraints.txt --editable '.[demo]'
	touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml constraints.txt
	$(PIP) install --constraint constraints.txt --editable '.[dev]'
	touch $@ $(VENV)/.demo

clean:
	rm -rf $(VENV) demo-out
