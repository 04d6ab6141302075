# Needs make and Python 3.11 or 3.12; another interpreter: make demo PYTHON=python3.12
PYTHON ?= python3
VENV := .venv
IN_VENV := $(VENV)/bin/python
TORCH := torch>=2.11,<2.14

.DEFAULT_GOAL := help
.PHONY: help demo test check clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-6s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/installed  ## install into .venv, then train, evaluate and decode a small early-exit model
	$(IN_VENV) run.py

# one thread each, since ranks share the cores; on eight cores: make test TEST_PROCESSES=8
TEST_PROCESSES ?= 2
test: $(VENV)/installed-test  ## install with the test extra, then run the whole suite
	OMP_NUM_THREADS=1 $(IN_VENV) -m pytest -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

check: $(VENV)/installed-dev  ## format, lint and types, as before a commit
	$(IN_VENV) -m ruff format --check .
	$(IN_VENV) -m ruff check .
	$(IN_VENV) -m mypy

clean:  ## remove .venv and caches, not outputs/
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache eellm.egg-info

$(IN_VENV):
	@$(PYTHON) -c 'import sys; sys.exit(None if (3, 11) <= sys.version_info[:2] <= (3, 12) else \
		"eellm needs Python 3.11 or 3.12, and $(PYTHON) is " + sys.version.split()[0] + ": make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)

# torch comes first and alone, so that a CPU build at hand is taken before anything else asks for a version
$(VENV)/torch: $(IN_VENV) pyproject.toml
	$(IN_VENV) -m pip install --quiet --upgrade pip
	$(IN_VENV) -m pip install --quiet "$(TORCH)"
	@touch $@

$(VENV)/installed: $(VENV)/torch
	$(IN_VENV) -m pip install --quiet -e .
	@touch $@

$(VENV)/installed-%: $(VENV)/torch
	$(IN_VENV) -m pip install --quiet -e ".[$*]"
	@touch $@ $(VENV)/installed
