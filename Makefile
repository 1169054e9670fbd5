# Every target sets up what it needs: a clone, a Python >= 3.11 and a C compiler are enough.
#
#   make test                       the suite, in .venv
#   make test PYTHON=python3.13     the same on another interpreter, in .venv-3.13 beside it
#   make test ARGS="-k pool -x"     ARGS goes to what the target runs
#   make test JOBS=0                in one process, as a debugger needs it

PYTHON ?= python3
ARGS   ?=
MARK   ?= not promise and not stress
DIST   ?= dist
JOBS   ?= 3

ifndef VENV
ifeq ($(PYTHON),python3)
VENV := .venv
else
VENV := .venv-$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
endif
endif

RUN       := $(VENV)/bin/python
BOOTSTRAP  = $(PYTHON) tools/bootstrap.py --venv $(VENV)
SOURCES    = runtime tools tests setup.py $(wildcard bench examples)
TYPED      = runtime tools setup.py $(wildcard tests/typing)

.DEFAULT_GOAL := help
.PHONY: help setup build run test soak stepkill model sanitize fuzz lint format types wheel smoke clean distclean

help: ## show this text
	@echo "usage: make TARGET [PYTHON=python3.13] [ARGS=\"...\"]"
	@sed -n 's/^\([a-z]*\):.*## /  \1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 14

setup: ## make the environment with all tools, and build in place
	@$(BOOTSTRAP) --extras cli,test

build: ## build runtime/*.pyx in place: only what changed, in seconds
	@$(BOOTSTRAP)

run: ## the main job on real input: a census of the standard library, checked against one process
	@$(BOOTSTRAP) --extras cli
	$(RUN) examples/census.py $(ARGS)

test: setup ## the test suite without storms and promises (MARK="..." chooses otherwise)
	$(RUN) -m pytest -m "$(MARK)" -n $(JOBS) --dist loadfile $(ARGS)

soak: setup ## the full counts of a promise, in slices: make soak PROMISE=1 MINUTES=20
	$(RUN) tools/soak.py $(if $(PROMISE),--promise $(PROMISE)) $(if $(MINUTES),--minutes $(MINUTES)) $(ARGS)

stepkill: setup ## SIGKILL at every instruction of the shared-memory primitives
	$(RUN) -m tools.stepkill $(ARGS) || test $$? -eq 77  # 77: not on this machine; it says why

model: setup ## the protocols of leases, blocks and pools, every order of their steps
	$(RUN) -m tools.model $(ARGS)

sanitize: setup ## ARGS=thread: shared primitives under ThreadSanitizer; ARGS="address undefined": the core's tests
	$(RUN) tools/sanitize.py $(ARGS) || test $$? -eq 77  # 77: not on this machine; it says why

fuzz: setup ## random input for each decoder (ARGS="--minutes 60")
	$(RUN) tools/fuzz.py $(ARGS)

lint: setup ## ruff and cython-lint
	$(RUN) -m ruff check $(SOURCES)
	$(RUN) -m ruff format --check $(SOURCES)
	PATH="$(abspath $(VENV))/bin:$$PATH" cython-lint runtime tools bench

format: setup ## let ruff rewrite the Python files as `make lint` wants them
	$(RUN) -m ruff check --fix $(SOURCES)
	$(RUN) -m ruff format $(SOURCES)

types: setup ## mypy, strict
	$(RUN) -m mypy $(TYPED)

wheel: setup ## in dist/: the sdist, and the wheel built from that sdist
	rm -rf $(DIST)
	$(RUN) -m build --outdir $(DIST) $(ARGS)

smoke: setup ## sdist and wheel in fresh environments, on each CPython >= 3.11 that is found
	$(RUN) tools/wheels.py $(ARGS)

clean: ## remove what was built
	rm -rf build dist *.egg-info
	find runtime -name '*.so' -delete
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

distclean: clean ## ... and the environments
	rm -rf .venv .venv-* .mypy_cache .pytest_cache .ruff_cache
