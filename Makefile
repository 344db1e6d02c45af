# Needs Python 3.10 or newer and make. The first target that needs it creates .venv.
#
# On Linux pip may choose the CUDA build of torch, a download of gigabytes. To get the CPU build,
# set PIP_EXTRA_INDEX_URL to PyTorch's index of CPU wheels before the first `make`.

PYTHON ?= python3
DEMO_ARGS ?=
TEST_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TORCH := $(shell sed -n 's/^\(torch==[^ ;]*\).*/\1/p' constraints.txt)

.DEFAULT_GOAL := help
.PHONY: help demo test lint docs venv clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-6s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo "  DEMO_ARGS and TEST_ARGS are passed on; PYTHON chooses the interpreter for .venv."

demo: $(STAMP) ## run the demo, e.g. make demo DEMO_ARGS="--tiny"
	$(BIN)/python -m examples.demo $(DEMO_ARGS)

test: $(STAMP) ## run the tests, on up to 4 cores, e.g. make test TEST_ARGS="-m 'not slow'"
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal $(TEST_ARGS)

lint: $(STAMP) ## check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy mec_embed

docs: $(STAMP) ## build the documentation in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

venv: $(STAMP) ## create or refresh .venv

# torch goes in first and alone: with its version settled, the second call keeps the build that
# the first one chose.
$(STAMP): pyproject.toml setup.py constraints.txt $(wildcard mec_embed/native/*)
	@$(PYTHON) -c 'import sys; sys.exit("mec_embed needs Python 3.10 or newer; set PYTHON=..." if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt "$(TORCH)"
	$(BIN)/python -m pip install -c constraints.txt -e '.[cpu,examples,bench,dev,fuxictr,deepctr,rechub]'
	$(BIN)/python -m pip install -c constraints.txt --no-deps torchrec fbgemm-gpu-cpu
	$(BIN)/python -m pip install -c constraints.txt tensordict torchmetrics pyre-extensions
	@touch $@

clean: ## remove .venv, caches and build output
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find mec_embed tests examples -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
