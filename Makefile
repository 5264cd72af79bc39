# Two commands: `make demo` and `make test`. Each makes the virtual environment it needs in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
# torch first and pinned: left to pip, a dependency may bring a build with gigabytes of CUDA libraries.
TORCH := torch==2.13.0
VLLM_NEEDS := tests/integrations/vllm/requirements.txt

# Without it, threads that wait for one another spin; with more threads than cores that costs up to fifty times.
export OMP_WAIT_POLICY ?= passive

.PHONY: demo test check format golden clean

demo: $(VENV)/.demo
	$(BIN)/kvferry demo

# loadgroup: tests that share one of vLLM's engines stay together.
test: $(VENV)/.vllm
	$(BIN)/python -m pytest -n auto --dist loadgroup tests

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

# A wheel of 340 MB, and small ones. Where it cannot be had, the tests that need it skip and say so.
$(VENV)/.vllm: $(VENV)/.dev $(VLLM_NEEDS)
	$(PIP) install --no-deps --requirement $(VLLM_NEEDS) \
		&& touch $@ || echo "vLLM could not be installed: the tests of its engine will skip"

clean:
	rm -rf $(VENV) demo-out
