# The commands of this project: `make` lists them. Each sets up .venv first, when that is missing or out of date.

PYTHON ?= python3
ARGS ?=

bin := .venv/bin
stamp := .venv/.stamp
pages := $(wildcard README.md docs/*.md docs/*/*.md)

.DEFAULT_GOAL := help
.PHONY: help demo test check chaos bench optimizers docs serve clean

help: ## list these commands
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-11s%s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(stamp) ## run the demo; ARGS="--help" shows what it takes
	@$(bin)/stepwell demo $(ARGS)

test: $(stamp) ## run the tests, two files at a time; ARGS="-k prodigy" picks some
	@$(bin)/python -m pytest -n 2 --dist loadfile $(ARGS)

check: $(stamp) ## format, lint, types, layers and the docs' examples; changes no file
	@$(bin)/ruff format --check
	@$(bin)/ruff check
	@$(bin)/mypy
	@$(bin)/lint-imports --no-logo
	@$(bin)/python -m pytest -q --doctest-glob='*.md' $(pages) || test $$? -eq 5 # 5: no page holds an example

chaos: $(stamp) ## train while processes are killed at random; ARGS="--kills 100 --seed 0"
	@$(bin)/python -m tests.chaos $(ARGS)

bench: $(stamp) ## run the benchmarks, about 20 minutes, into benchmarks/results; ARGS="--quick", or ARGS="step rules"
	@$(bin)/python benchmarks/run.py $(ARGS)

optimizers: $(stamp) ## write client/optimizers anew, after a rule or a field of one has changed
	@$(bin)/python .ci/write_optimizers.py

docs: $(stamp) ## build the documentation's site into site/: open site/index.html
	@$(bin)/python -m mkdocs build --strict

serve: $(stamp) ## show the site on 127.0.0.1:8000, built anew as pages change
	@$(bin)/python -m mkdocs serve --livereload --dev-addr 127.0.0.1:8000

clean: ## remove builds, the site, caches and the demo's output; .venv stays
	@rm -rf build dist site stepwell-demo .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	@find . -path ./.venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is the last thing a set-up writes and the first that the next one removes. Without it the last set-up did
# not finish, and .venv is made anew; with it, but older than the two files, .venv is brought up to date in place.
# PIP_CONSTRAINT and PIP_BUILD_CONSTRAINT pin what builds the package too: `-c` alone does not reach that (older pip
# reads the first name there, newer pip the second).
$(stamp): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Stepwell needs Python 3.11 or newer, and $(PYTHON) is not: make PYTHON=python3.12" >&2; exit 1; }
	@echo "Setting up .venv (the first time takes some minutes)"
	@test -f $@ || $(PYTHON) -m venv --clear .venv
	@rm -f $@
	@$(bin)/pip install -q -c constraints.txt torch
	@PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt $(bin)/pip install -q -c constraints.txt -e '.[dev]'
	@touch $@
