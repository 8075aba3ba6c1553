# The commands of this project. Each sets up `.venv` by itself and does nothing where it is up to date.
# Arguments go through ARGS, as in `make train ARGS="--output runs/mine --seed 3"`.

SHELL := /bin/sh
.DEFAULT_GOAL := help
.PHONY: help train test test-long lint docs benchmark proto constraints clean

VENV := .venv
BIN := $(VENV)/bin
# pip would report as conflicts what is meant: torchrec without fbgemm-gpu, timm without torchvision.
INSTALL := $(BIN)/python -m pip --disable-pip-version-check -qq install --no-warn-conflicts
# torchvision, which timm asks for, has no build for every torch build; the reference optimizer in timm does not use it.
TIMM := timm==1.0.31
SETTINGS := pyproject.toml constraints.txt deploy/doctor.py Makefile

help:
	@echo "make train        set up, then train the built-in synthetic click log (ARGS=... adds arguments)"
	@echo "make test         set up, then lint, types, import direction and tests"
	@echo "make test-long    the tests that take minutes or install packages"
	@echo "make benchmark    NAME=train_step (or another file of benchmarks/): one JSON object as the last line"
	@echo "make proto        write the gRPC code anew after a change of parameter_server/control/control.proto"
	@echo "make docs         build the documentation into site/"
	@echo "make constraints  renew constraints.txt after a change of dependencies (needs uv)"
	@echo "make clean        remove .venv, site and caches"

train: $(VENV)/.train
	@$(BIN)/recforge train synthetic $(ARGS)

test: $(VENV)/.test lint
	@$(BIN)/python -m pytest -q -n 2 --dist loadfile $(ARGS)

lint: $(VENV)/.test
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo

test-long: $(VENV)/.test
	@$(BIN)/python -m pytest -q -m long --timeout 1800 $(ARGS)

benchmark: $(VENV)/.test
	@test -n "$(NAME)" || { echo "make benchmark needs NAME=, one of: $$(ls benchmarks | sed -n 's/^\([a-z].*\)\.py$$/\1/p' | tr '\n' ' ')" >&2; exit 2; }
	@$(BIN)/python -m benchmarks.$(NAME) $(ARGS)

docs: $(VENV)/.docs
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --site-dir site
	@echo "site/index.html"

proto: $(VENV)/.test
	@$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. --grpc_python_out=. parameter_server/control/control.proto

constraints:
	@uv pip compile --quiet --universal --python-version 3.10 --all-extras --no-annotate --no-header pyproject.toml -o .constraints
	@{ sed -n '/^#/p' constraints.txt; grep -vE '^(torch|triton|(nvidia|cuda)-[^ ]*)==' .constraints; } > .constraints.new
	@mv .constraints.new constraints.txt && rm .constraints

clean:
	rm -rf $(VENV) site .mypy_cache .ruff_cache .pytest_cache .import_linter_cache

# The stamps lie inside the environment, so that they go when it goes.
$(VENV)/.train: $(SETTINGS) | $(BIN)/python
	@echo "installing recforge into $(VENV) (a few minutes the first time)"
	@$(INSTALL) -c constraints.txt -e .
	@$(BIN)/recforge doctor --fix
	@touch $@

$(VENV)/.test: $(SETTINGS) | $(BIN)/python
	@echo "installing recforge and its test tools into $(VENV) (a few minutes the first time)"
	@$(INSTALL) -c constraints.txt -e '.[test]'
	@$(INSTALL) --no-deps $(TIMM)
	@$(BIN)/recforge doctor --fix
	@touch $(VENV)/.train $@

$(VENV)/.docs: $(SETTINGS) | $(VENV)/.train
	@$(INSTALL) -c constraints.txt -e '.[docs]'
	@touch $@

# fbgemm has wheels for these versions of Python and no others.
$(BIN)/python:
	@for python in $(or $(PYTHON),python3 python3.14 python3.13 python3.12 python3.11 python3.10); do \
	  if $$python -c 'import ensurepip, sys, venv; sys.exit(not (3, 10) <= sys.version_info < (3, 15))' 2>/dev/null; \
	  then exec $$python -m venv --clear $(VENV); fi; \
	done; \
	echo "recforge needs Python >= 3.10 (and < 3.15) with venv; found none. PYTHON=/path/to/python names one;" \
	  "on Debian: apt install python3-venv" >&2; \
	exit 1
