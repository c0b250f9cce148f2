# Each target sets up what it needs, on a machine that has nothing but Python (with venv), make and a C++ compiler.
#   make train ARGS="--preset 60m"     make test ARGS="-k scheduler"     make lint     make fuzz N=100     make clean

SHELL   := bash
PYTHON  ?= python3
# Test processes: one a core of the machine that CI has.
WORKERS ?= 2
# How many times more examples than in `make test` a property test gets under `make fuzz`.
N       ?= 20
ARGS    ?=

VENV := .venv
BIN  := $(VENV)/bin
PIP  := $(BIN)/python -m pip --quiet --no-input --disable-pip-version-check install -c constraints.txt
# setuptools comes from constraints.txt too, not from a build environment with whatever is newest.
INSTALL = $(PIP) setuptools && $(PIP) --no-build-isolation -e
# Parallel test processes must not each use every core: steps would run ten times slower.
PYTEST  = OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) --dist worksteal

.PHONY: train test matrix fuzz lint ruff mypy clean

train: $(VENV)/.base
	$(BIN)/qgalore train $(ARGS)

test: $(VENV)/.test
	$(PYTEST) $(ARGS)

# The suite under each of the settings that a product's rounding depends on: the instructions that ATen and oneDNN may
# use, and the threads. One process: pytest-xdist would set the threads. Another torch: make matrix PYTHON_TEST=path.
PYTHON_TEST ?= $(BIN)/python
matrix: $(VENV)/.test
	@PYTHON_TEST="$(PYTHON_TEST)" tests/matrix.sh $(ARGS)

# Property tests only, each run with fresh random examples.
fuzz: $(VENV)/.test
	$(PYTEST) -m "hypothesis or more" --fuzz $(N) $(ARGS)

lint: ruff mypy

ruff: $(VENV)/.test
	$(BIN)/ruff check
	$(BIN)/ruff format --check

# mypy does not follow setuptools' package-dir, so the package is laid out with links as it will be installed. From
# scratch each time: files come and go. The messages name the real paths.
mypy: $(VENV)/.test
	@rm -rf build/typed && mkdir -p build/typed/qgalore_compile
	@ln -s "$(CURDIR)"/qgalore_compile/* "$(CURDIR)"/passes "$(CURDIR)"/kernels build/typed/qgalore_compile/
	@set -o pipefail; $(BIN)/mypy build/typed/qgalore_compile examples \
	    | sed -E -e 's#^build/typed/qgalore_compile/(passes|kernels)/#\1/#' -e 's#^build/typed/##'

# What was built and cached; the environment stays.
clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -r {} +

# The stamps stand for finished installations: a missing or outdated one (an environment made by hand has none)
# installs again, a fresh one costs nothing. `make train` needs the package alone; tests and lint need the extras.
$(VENV)/.base: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing qgalore-compile into $(VENV) (the first time, torch is a large download)"
	@$(INSTALL) .
	@touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing qgalore-compile and its test and lint tools into $(VENV) (the first time, torch is a large download)"
	@$(INSTALL) '.[test,oracles,dev]'
	@touch $(VENV)/.base $@

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || \
	    { echo "'$(PYTHON)' not found: install Python 3.10 or newer, or name one: make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "$$($(PYTHON) -V 2>&1) is too old: Python 3.10 or newer is needed; name one: make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	    { echo "$(PYTHON) has no venv: install it (on Debian and Ubuntu, the package python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
