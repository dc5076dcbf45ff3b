# make install | run | week | test | check | bench | docs | lock | clean
#
# PYTHON       the interpreter that .venv is made of: 3.11 or 3.12
# TORCH_INDEX  index of torch's build, e.g. https://download.pytorch.org/whl/cpu (about 200 MB);
#              empty: whatever pip finds, on Linux usually the CUDA build of several GB
# CONFIG       the run's TOML of make run and make week: configs/demo.toml
# ARGS         more arguments for the command, e.g. make test ARGS="tests/test_config.py -x"

FITS := import sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))
PYTHON ?= $(firstword $(shell for name in python3.11 python3.12 python3; do \
	$$name -c '$(FITS)' 2>/dev/null && command -v $$name; done) python3.11)
TORCH_INDEX ?=
CONFIG ?= configs/demo.toml
ARGS ?=
VENV := .venv
STAMP := $(VENV)/installed
DEV := $(VENV)/installed-dev
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
fetch = $(PIP) install --quiet --no-compile $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -c requirements.lock $(1)

.PHONY: help install run week test check bench docs lock clean
.DELETE_ON_ERROR:

help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' Makefile

install: $(STAMP)

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c '$(FITS)' 2>/dev/null || \
		{ echo "DES needs Python 3.11 or 3.12 with venv; name one: make install PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(call fetch,setuptools)
	$(call fetch,--no-build-isolation -e .)
	@# On all cores, where pip would use one; a template that is no Python is no matter.
	@$(VENV)/bin/python -m compileall -qq -j 0 $(VENV)/lib || true
	@rm -f $(DEV)
	@touch $@

# What only tests and checks need; the pipeline runs without it.
$(DEV): $(STAMP)
	$(call fetch,--no-build-isolation -e .[dev])
	@touch $@

run: install
	$(VENV)/bin/des run -c $(CONFIG) $(ARGS)

# Seven days, each judged, registered and gone on from.
week: install
	$(VENV)/bin/des run -c $(CONFIG) --set run.name=week --from 2026-01-01 --to 2026-01-07 $(ARGS)

# Two files at a time (tests/conftest.py says which go together); with ARGS a plain pytest.
test: $(DEV)
	$(VENV)/bin/python -m pytest $(or $(ARGS),-n 2 --dist loadfile --no-loadscope-reorder --durations 25)

check: $(DEV)
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

# DES beside TorchRec, a parameter server and DDP: five minutes; ARGS=--sweep or --marks for more.
bench: install
	$(PIP) install --quiet --no-deps -r benchmarks/requirements.txt
	$(VENV)/bin/python benchmarks/peers.py $(or $(ARGS),--quick)

docs: install
	$(VENV)/bin/python docs/config.py > docs/config.md

# A new lock: the newest versions that pyproject.toml allows, in an environment of its own.
lock:
	rm -rf build/lock
	$(PYTHON) -m venv build/lock
	build/lock/bin/python -m pip install --quiet $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -e .[dev]
	{ sed -n '/^#/p' requirements.lock; \
	  build/lock/bin/python -m pip freeze --all --exclude-editable | grep -v '^pip==' | sed 's/+[a-z0-9]*$$//' | LC_ALL=C sort -f; \
	} > build/requirements.lock
	mv build/requirements.lock requirements.lock

clean:
	rm -rf build dist ./*.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +
	@echo "kept: $(VENV) and runs/, your results"
