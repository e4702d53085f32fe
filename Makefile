# `make demo` and `make test` set up what they need on a fresh machine; run again, they install nothing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
SET ?=

.PHONY: demo test setup lint notebooks lab clean

demo: $(INSTALLED)
	$(BIN)/ttkit run --profile demo $(SET)

test: lint
	$(BIN)/python -m pytest

lint: $(INSTALLED)
	$(BIN)/ruff check ttkit tests
	$(BIN)/ruff format --check ttkit tests
	$(BIN)/mypy ttkit

# The committed notebooks and figures: the default run, copied into place.
notebooks: demo
	$(BIN)/ttkit publish runs/demo

lab: $(INSTALLED)
	$(BIN)/jupyter lab notebooks

setup: $(INSTALLED)

# torch comes first and by its pin: left to a resolver it may be replaced by another build.
$(INSTALLED): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "ttkit needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	@echo "setting up $(VENV): about two minutes, once"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q "$$(grep '^torch==' requirements.lock)"
	$(BIN)/python -m pip install -q -r requirements.lock
	$(BIN)/python -m pip install -q --no-deps -e .
	@touch $@

clean:
	rm -rf $(VENV) runs
