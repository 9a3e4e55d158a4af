# Everything runs in .venv, which `make install` creates. PYTHON may name another interpreter (3.11 or newer).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TOOLS := $(VENV)/.tools
PPO := .venv-ppo

.PHONY: install quickstart test differential bench mutants check format docs clean

install: $(INSTALLED)

# torch first and exactly: asked for by another package, pip would fetch another build.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Accord needs Python 3.11 or newer; name one with: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(TOOLS): $(INSTALLED)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

quickstart: $(INSTALLED)
	$(BIN)/accord quickstart

test: $(TOOLS)
	$(BIN)/ruff check src tests benchmarks scripts
	$(BIN)/python -m pytest -n logical --dist loadfile --no-loadscope-reorder

# The losses against TRL's, on the same inputs; `make test` runs these too once TRL is there.
differential: $(TOOLS)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	$(BIN)/python -m pytest tests/differential

# Speed and memory against TRL at the same work; WORK=dpo for some of it.
bench: $(TOOLS) $(if $(filter-out p pp ppo%,$(WORK)),,$(PPO)/.installed)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	$(BIN)/python -m benchmarks.speed --work "$(WORK)"

# The last TRL that had PPO, which is not the one that the rest is compared with.
$(PPO)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(PPO)
	grep -v '^trl==' constraints.txt > $(PPO)/constraints.txt
	$(PPO)/bin/pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(PPO)/bin/pip install --quiet --disable-pip-version-check -c $(PPO)/constraints.txt -e . trl==1.12.0
	touch $@

mutants: $(TOOLS)
	$(BIN)/python scripts/mutants.py

check: $(TOOLS)
	$(BIN)/ruff check src tests benchmarks scripts
	$(BIN)/ruff format --check src tests benchmarks scripts
	$(BIN)/pyright

format: $(TOOLS)
	$(BIN)/ruff check --fix src tests benchmarks scripts
	$(BIN)/ruff format src tests benchmarks scripts

docs: $(INSTALLED)
	$(BIN)/python scripts/generate_docs.py

clean:
	rm -rf $(PPO) build dist .pytest_cache .ruff_cache .hypothesis
