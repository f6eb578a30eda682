# The one door to this project. Every target sets up what it needs in .venv, on a clean machine with Python 3.11 and make.
#
#   make demo          see it work: three made-up scans, three verdicts (no torch)
#   make test          all tests; installs torch
#   make test-daemon   the tests of the daemon alone, without torch
#   make check         ruff and mypy
#   make bench         speed, as ratios measured side by side
#   make screenshots   pictures of the page, in screenshots-out/ (needs Chromium)
#   make serve         run the daemon on this machine's loopback
#   make sbom          software bill of materials of what the lock installs (CycloneDX), rescan-cpu.cdx.json or rescan-gpu.cdx.json
#   make locks         pin the dependencies again (after a change of pyproject.toml)
#   make clean         remove .venv and what tools left behind
#
# ENGINE=cpu or ENGINE=gpu overrides the choice made here: gpu where an NVIDIA GPU answers.

PYTHON ?= python3
ENGINE ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)
# Outside the locks: which build of torch fits depends on the machine (README, "Training"); torchio needs torch.
TORCH ?= torch==2.13.0
NEEDS_TORCH := torchio==1.2.1
PYTEST_ARGS ?=

BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check
LOCKED := $(INSTALL) --require-hashes
STAMP := .venv/.rescan-$(ENGINE)
# The variants of ONNX Runtime overwrite each other in one folder.
OTHER_RUNTIME := $(if $(filter gpu,$(ENGINE)),onnxruntime,onnxruntime-gpu)

.DEFAULT_GOAL := help
.PHONY: help demo test test-daemon check bench screenshots serve sbom locks clean
.DELETE_ON_ERROR:

help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' Makefile

demo: $(STAMP)-demo
	@$(BIN)/rescan demo

serve: $(STAMP)-demo
	@$(BIN)/rescan serve

test: $(STAMP)-training
	@$(BIN)/python -m pytest $(PYTEST_ARGS)

test-daemon: $(STAMP)-dev
	@RESCAN_TEST_WITHOUT_TORCH=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

check: $(STAMP)-training
	@echo "ruff: style and mistakes"
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --check .
	@echo "mypy: types, strict"
	@$(BIN)/mypy --no-error-summary
	@echo "check passed"

bench: $(STAMP)-training
	@$(BIN)/python -m tests.bench

screenshots: $(STAMP)-dev
	@$(BIN)/python -m tests.browser.screenshots screenshots-out

sbom: $(STAMP)-dev
	@$(BIN)/cyclonedx-py requirements locks/$(ENGINE).txt --pyproject pyproject.toml --of JSON --validate \
	    --output-reproducible -o rescan-$(ENGINE).cdx.json 2>/dev/null
	@echo "rescan-$(ENGINE).cdx.json"

locks:
	@.ci/lock

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist *.egg-info

# --- What each target needs ---------------------------------------------------------------------------------------------

$(STAMP)-base: pyproject.toml locks/build.txt locks/$(ENGINE).txt
	@test -x $(BIN)/python || { echo "making .venv"; $(PYTHON) -m venv .venv; }
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python %d.%d is too old: use 3.11 or newer, as in make PYTHON=python3.11" % sys.version_info[:2])'
	@echo "installing the daemon ($(ENGINE)); a minute or two the first time"
	@$(BIN)/python -m pip uninstall -qqq -y $(OTHER_RUNTIME) 2>/dev/null || true
	@$(LOCKED) -r locks/build.txt -r locks/$(ENGINE).txt
	@$(INSTALL) --no-deps --no-build-isolation -e .
	@touch $@

$(STAMP)-demo: $(STAMP)-base locks/demo.txt
	@echo "installing the demo's anatomy"
	@$(LOCKED) -r locks/demo.txt
	@touch $@

$(STAMP)-dev: $(STAMP)-demo locks/dev.txt
	@echo "installing the tools for tests"
	@$(LOCKED) -r locks/dev.txt
	@touch $@

$(STAMP)-training: $(STAMP)-dev
	@echo "installing $(TORCH)"
	@$(INSTALL) $(TORCH)
	@$(INSTALL) $(NEEDS_TORCH)
	@touch $@
