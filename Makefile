# Two commands do everything on a fresh machine: `make run` and `make test`.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

.PHONY: run quickstart test test-all lint bench faults clean compiler
.DEFAULT_GOAL := run

compiler:
	@command -v c++ >/dev/null 2>&1 || command -v g++ >/dev/null 2>&1 || command -v clang++ >/dev/null 2>&1 || { \
	  echo "error: no C++ compiler found; install one and run make again (Debian/Ubuntu: apt install g++; Fedora: dnf install gcc-c++; macOS: xcode-select --install)" >&2; exit 1; }

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: hybridlm needs Python 3.11 or newer; found $$($(PYTHON) --version). Set PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "error: could not make a virtual environment (Debian/Ubuntu: apt install python3-venv)" >&2; exit 1; }

# A stamp per level of installation, renewed when the sources that are compiled or the dependencies change.
NATIVE := CMakeLists.txt $(wildcard src/hybridlm/native/csrc/*)

$(VENV)/.base: pyproject.toml constraints.txt $(NATIVE) | compiler $(BIN)/python
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e .
	@touch $@

# The package is in place by now: naming it again only adds what an extra needs, and compiles nothing.
$(VENV)/.train: $(VENV)/.base
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt "hybridlm[train]"
	@touch $@

$(VENV)/.dev: $(VENV)/.train
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt "hybridlm[dev]"
	@touch $@

run: $(VENV)/.base  ## stream text from the model in models/ (installs the base package, no torch)
	$(BIN)/hybridlm generate models/hybridlm-tiny-q8_0.gguf "The history of the steam engine begins" --echo --max-tokens 120 --stats

quickstart: $(VENV)/.train  ## corpus -> tokenizer -> training -> evaluation -> quantised file -> text, in minutes
	$(BIN)/hybridlm quickstart --out runs/quickstart

lint: $(VENV)/.dev
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/mypy

test: $(VENV)/.dev lint  ## the fast tier
	$(BIN)/pytest

test-all: $(VENV)/.dev lint  ## every marker, the counts that the documentation names
	$(BIN)/pytest -m "slow or soak or browser or arm or gpu or not slow" -rs

bench: $(VENV)/.base
	$(BIN)/hybridlm bench models/hybridlm-tiny-q8_0.gguf

MINUTES ?= 60
EVERY ?= 60
faults: $(VENV)/.train  ## train through faults (MINUTES=60 EVERY=60), held against an undisturbed run
	$(BIN)/python benchmarks/faults.py --minutes $(MINUTES) --every $(EVERY) $(FAULTS)

clean:
	rm -rf build $(VENV) .pytest_cache .mypy_cache .ruff_cache
