# The two commands of README.md: `make demo` and `make test`. Everything goes into .venv.
PYTHON ?= python3
VENV ?= .venv
# For example PIP_ARGS="--no-cache-dir"; which build of torch pip takes is the index's matter.
PIP_ARGS ?=
BIN := $(VENV)/bin

.PHONY: demo test lint clean

demo: $(VENV)/.demo
	$(BIN)/python example_chat_completion.py

test: $(VENV)/.dev
	$(BIN)/python -m pytest

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layers.py

# What is installed, by extra; installed again when the requirements change.
$(VENV)/.demo $(VENV)/.dev: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP_ARGS) --disable-pip-version-check -q \
		-c constraints.txt -e '.[$(subst .,,$(@F))]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
