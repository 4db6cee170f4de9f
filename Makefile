# Every target makes what it needs: a fresh clone and `make demo` or `make test` are enough.
# The first interpreter that runs and is new enough: a version manager's shim may be there and refuse to start.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3 python; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$p" && break; done)
BIN := .venv/bin
export TOKENIZERS_PARALLELISM = false

.PHONY: help install demo test check docs bench clean
help: ## Show this help
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

.venv/.made: requirements/dev.txt requirements/peers.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements/dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements/peers.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

install: .venv/.made ## Make .venv with the pinned versions

demo: install ## Train quickstart (about ten minutes), judge it, draw a sheet of prompts
	@sh scripts/demo.sh $(BIN)/sfumato

test: install ## Run the tests
	$(BIN)/python -m pytest

check: install ## Format, lint, types, layers, docs
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/mkdocs build --strict --quiet --site-dir .site

docs: install ## Serve the documentation at localhost
	$(BIN)/mkdocs serve

bench: install ## Measure what the README claims
	$(BIN)/python benchmarks/scenes.py
	$(BIN)/python benchmarks/attention.py
	$(BIN)/python benchmarks/networks.py
	$(BIN)/python benchmarks/quickstart.py

clean: ## Remove what was made, except runs
	rm -rf .venv .site build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
