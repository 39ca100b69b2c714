# From a bare clone, with Python 3.11+ and a C++ compiler and nothing else:
#
#   make quickstart   train float, ternary and binary models on real text, pack them, prove them equal, generate
#   make test         the tests            make lint   ruff and mypy       make coverage   tests, with coverage
#   make bench        kernel timings       make clean  forget everything built here
#
# PYTHON=python3.13 make ...      another interpreter, for a new environment
# make quickstart QUICKSTART_FLAGS=--short      with a tenth of the training
# make test PYTEST_FLAGS="-k packing"           any pytest flags

PYTHON ?= python3
VENV ?= .venv
QUICKSTART_FLAGS ?=
PYTEST_FLAGS ?=
# Most of the time goes into compiling small programs, each on one core; the tests of a file share programs.
PARALLEL ?= -n 2 --dist loadfile
BENCH_FLAGS ?=
COVERAGE_MINIMUM ?= 0

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

# An editable install sees Python edits by itself; only packaging and C++ sources ask for a new one.
SOURCES := pyproject.toml $(wildcard setup.py kernels/csrc/*)

.PHONY: quickstart test coverage lint bench clean
.DELETE_ON_ERROR:

quickstart: $(VENV)/.installed
	$(BIN)/python -m experiments.quickstart --workdir runs/quickstart $(QUICKSTART_FLAGS)

test: $(VENV)/.installed-for-development
	$(BIN)/python -m pytest $(PARALLEL) $(PYTEST_FLAGS)

coverage: $(VENV)/.installed-for-development
	$(BIN)/python -m pytest $(PARALLEL) --cov --cov-fail-under=$(COVERAGE_MINIMUM) $(PYTEST_FLAGS)

lint: $(VENV)/.installed-for-development
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.installed
	$(BIN)/python -m bitnet_kernels.bench $(BENCH_FLAGS)

clean:
	rm -rf $(VENV) build dist runs/quickstart *.egg-info .coverage .coverage.* .mypy_cache .ruff_cache .pytest_cache
	rm -f kernels/bitnet_kernels/*.so
	find bitnet_jax kernels experiments tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if v >= (3, 11) else "error: got Python %d.%d, expected 3.11 or newer; set PYTHON=/path/to/python3" % v)'
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "error: $(PYTHON) cannot create an environment; on Debian: apt install python3-venv" >&2; exit 1; }

$(VENV)/.installed: $(SOURCES) | $(BIN)/python
	$(PIP) install --editable ".[plots]"
	@touch $@

# One install serves both stamps, so that `make test` before `make quickstart` builds the library once.
$(VENV)/.installed-for-development: $(SOURCES) | $(BIN)/python
	$(PIP) install --editable ".[plots,test,lint]"
	@touch $(VENV)/.installed $@
