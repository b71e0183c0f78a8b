# The two commands of README.md: `make demo` and `make test`. Everything is installed into .venv.
PYTHON ?= python3
VENV ?= .venv
# More arguments of pip, such as PIP_ARGS="--no-cache-dir". The index decides which build of torch.
PIP_ARGS ?=
# The versions to install; .github/lowest.txt has the oldest that are tested.
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin

.PHONY: demo test lint conformance clean

demo: $(VENV)/.demo
	$(BIN)/python example_chat_completion.py

# One process a core, each with one thread; threads that wait must not hold up the other processes.
test: $(VENV)/.dev
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n auto \
		--dist loadfile --no-loadscope-reorder

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell
	$(BIN)/python -m pytest -q tests/test_layers.py tests/test_docs.py

# Public test suites against `llama3 serve`; CONTRIBUTING.md says which.
conformance: $(VENV)/.dev
	PIP_ARGS="$(PIP_ARGS)" $(BIN)/python conformance/run.py $(SUITES)

# One stamp for each extra, which is installed again when the requirements change.
$(VENV)/.demo $(VENV)/.dev: pyproject.toml $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP_ARGS) --disable-pip-version-check -q \
		-c $(CONSTRAINTS) -e '.[$(subst .,,$(@F))]'
	touch $@

clean:
	rm -rf $(VENV) .cache build *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
