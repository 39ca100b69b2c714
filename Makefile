# From a clean clone, with only Python 3.11+ and a C++ compiler:
#
#   make quickstart   train float, ternary and binary models on real text, pack them, prove them equal, generate
#   make test         the quick tests      make lint   ruff and mypy
#   make docs         the documentation, into site/, offline
#   make test-all     the slow tests too (sanitizers, emulated machines, soaks, killed processes), with coverage
#   make bench        kernel timings       make clean  remove all build products
#   make tpu-compile  compile for TPUs without one, in a separate environment (700 MB, 15 minutes)
#   make plan-100b    compile the update of a 100B model for TPUs likewise, and write its plan (an hour)
#   make gpu-compile  compile the GPU kernels for an H200 without one, likewise (1 GB, minutes, Python 3.12)
#   make gpu-checks   on a machine with an NVIDIA GPU: every check that needs one (12 minutes, Python 3.12)
#
# PYTHON=python3.13 make ...      another interpreter, for a new environment
# make quickstart QUICKSTART_FLAGS=--short      a quarter of the training
# make test PYTEST_FLAGS=--extended             the tests of continuous integration
# make test PYTEST_FLAGS="-k packing"           any pytest flags
# make test CONSTRAINTS=requirements/ci-py311.txt   a new environment with the versions of continuous integration
# make lock                                     update that file to the newest versions, see CONTRIBUTING.md

PYTHON ?= python3
VENV ?= .venv
TPU_VENV ?= .venv-tpu
GPU_VENV ?= .venv-gpu
CONSTRAINTS ?=
QUICKSTART_FLAGS ?=
PYTEST_FLAGS ?=
# Most of the time is spent compiling small programs, each on one core; tests in the same file share programs.
PARALLEL ?= -n 2 --dist loadfile
BENCH_FLAGS ?=
TPU_FLAGS ?=
COVERAGE_MINIMUM ?= 0

BIN := $(VENV)/bin
INSTALL := CONSTRAINTS=$(CONSTRAINTS) $(BIN)/python requirements/install.py

# An editable install picks up Python edits; only packaging and C++ sources require a reinstall.
SOURCES := pyproject.toml $(wildcard setup.py kernels/csrc/*)

.PHONY: quickstart test test-all coverage lint docs bench lock tpu-compile plan-100b gpu-compile gpu-checks clean
.DELETE_ON_ERROR:

quickstart: $(VENV)/.installed
	$(BIN)/python -m experiments.quickstart --workdir runs/quickstart $(QUICKSTART_FLAGS)

test: $(VENV)/.installed-for-development
	$(BIN)/python -m pytest $(PARALLEL) $(PYTEST_FLAGS)

test-all:
	$(MAKE) coverage COVERAGE_MINIMUM=90 PYTEST_FLAGS="--run-slow $(PYTEST_FLAGS)"

coverage: $(VENV)/.installed-for-development
	$(BIN)/python -m pytest $(PARALLEL) --cov --cov-fail-under=$(COVERAGE_MINIMUM) $(PYTEST_FLAGS)

lint: $(VENV)/.installed-for-development
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# NO_MKDOCS_2_WARNING silences a notice about future versions of mkdocs that does not concern this site.
docs: $(VENV)/.installed-for-development
	NO_MKDOCS_2_WARNING=1 JAX_PLATFORMS=cpu $(BIN)/mkdocs build --strict --quiet

bench: $(VENV)/.installed
	$(BIN)/python -m bitnet_kernels.bench $(BENCH_FLAGS)

# Updates requirements/ci-py*.txt of this Python to the newest versions that pyproject.toml allows.
lock:
	$(PYTHON) requirements/lock.py

# The TPU compiler is libtpu, in the version required by jax[tpu] of this version. With it installed JAX looks for a
# TPU, hence the separate environment.
tpu-compile: $(TPU_VENV)/.installed
	$(TPU_VENV)/bin/python -m bitnet_kernels.ahead_of_time --chip v5e --chip v5p --chip v6e --chip v7x \
	  --json experiments/studies/chip_compile/tpu.json
	$(TPU_VENV)/bin/python -m experiments.tpu_compile $(TPU_FLAGS)

plan-100b: $(TPU_VENV)/.installed
	$(TPU_VENV)/bin/python -m experiments.plan_100b $(TPU_FLAGS)

$(TPU_VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(TPU_VENV)
	$(TPU_VENV)/bin/python -m pip --disable-pip-version-check install jax==0.10.2 libtpu==0.0.42.1 --editable .
	@touch $@

# The compiler for NVIDIA GPUs is part of JAX's CUDA plugin and needs no GPU, driver or CUDA libraries.
gpu-compile: $(GPU_VENV)/.installed
	$(GPU_VENV)/bin/python -m bitnet_kernels.ahead_of_time --chip h200 \
	  --json experiments/studies/chip_compile/gpu.json

$(GPU_VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if v >= (3, 12) else "error: got Python %d.%d, expected 3.12 or newer for a jax with Mosaic GPU; set PYTHON=/path/to/python3" % v)'
	$(PYTHON) -m venv $(GPU_VENV)
	$(GPU_VENV)/bin/python -m pip --disable-pip-version-check install "jax>=0.11" --editable .
	version=$$($(GPU_VENV)/bin/python -c "import jax; print(jax.__version__)"); \
	  $(GPU_VENV)/bin/python -m pip --disable-pip-version-check install --no-deps \
	  jax-cuda13-plugin==$$version jax-cuda13-pjrt==$$version
	@touch $@

# With the CUDA libraries, which gpu-compile does without.
gpu-checks: $(GPU_VENV)/.installed
	$(GPU_VENV)/bin/python -m pip --disable-pip-version-check install "jax[cuda13]" pytest
	$(GPU_VENV)/bin/python -m experiments.gpu_checks

clean:
	rm -rf $(VENV) $(TPU_VENV) $(GPU_VENV) build dist site runs/quickstart *.egg-info .coverage .coverage.* .mypy_cache .ruff_cache .pytest_cache
	rm -f kernels/bitnet_kernels/*.so
	find bitnet_jax kernels experiments tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if v >= (3, 11) else "error: got Python %d.%d, expected 3.11 or newer; set PYTHON=/path/to/python3" % v)'
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "error: $(PYTHON) cannot create an environment; on Debian: apt install python3-venv" >&2; exit 1; }

$(VENV)/.installed: $(SOURCES) | $(BIN)/python
	$(INSTALL) plots tokenizers
	@touch $@

# One install updates both stamps, so that `make test` before `make quickstart` builds the library once.
$(VENV)/.installed-for-development: $(SOURCES) | $(BIN)/python
	$(INSTALL) plots test lint docs
	@touch $(VENV)/.installed $@
