# make align: the main job.  make test: the tests.  make check: lint, format, types.
# Each sets up what it needs in .venv; a second run starts at once.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RECIPE ?= configs/shapes_align.yaml

.PHONY: align test check clean

align: $(VENV)/.installed
	$(BIN)/mmpo align $(RECIPE)

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n 2 --dist loadfile

check: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable .
	touch $@

# TORCH_INDEX: where a torch without CUDA comes from (https://download.pytorch.org/whl/cpu).
$(VENV)/.installed-test: $(VENV)/.installed
	$(if $(TORCH_INDEX),$(BIN)/pip install --quiet torch --index-url $(TORCH_INDEX))
	$(BIN)/pip install --quiet --editable '.[test,parity]'
	touch $@

clean:
	rm -rf $(VENV)
