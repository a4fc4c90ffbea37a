# Set-up and checks. `make demo` and `make test` need only Python >= 3.10, make, and a C++ compiler for the kernels.

PYTHON ?= python3
# auto: compile the kernels for whose compilers are there; cpu, cuda: insist on them; python: do not compile.
MAS_FAST_BUILD ?= auto
PYTEST_ARGS ?=
# Tests run in a process for each core, up to four: each imports torch and transformers.
PYTEST := OMP_NUM_THREADS=1 $(abspath .venv/bin)/pytest -p no:benchmark -n auto --maxprocesses 4 --dist worksteal
DEMO_ARGS ?= --out demo_results
BENCH_ARGS ?= --out bench_results --small --compare benchmarks/results

VENV := .venv
BIN := $(abspath $(VENV)/bin)
# Stamps say that a step is done; a step runs again when one of its prerequisites has changed.
STAMPS := $(VENV)/.stamps
INSTALLED := $(STAMPS)/installed-$(MAS_FAST_BUILD)
PYTHON_ONLY := $(abspath build/python-only)
NATIVE := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: help install demo test test-installed test-python-only bench bench-ops lint format clean
.DEFAULT_GOAL := help

help:
	@echo "make demo     run the demo on handwritten digits; results in demo_results/"
	@echo "make test     run the tests with compiled kernels, then from a Python-only wheel"
	@echo "make bench    compare with the loop and vmap(grad), in minutes; ratios beside the committed ones"
	@echo "make bench-ops  time each op beside this machine's last saved run of them"
	@echo "make lint     check style, types and format"
	@echo "make format   rewrite the sources in the project's format"
	@echo "make install  only set up $(VENV): pinned dependencies and the package, editable"
	@echo "make clean    remove $(VENV) and everything that was built"
	@echo "Settings: PYTHON=$(PYTHON) MAS_FAST_BUILD=$(MAS_FAST_BUILD) PYTEST_ARGS='$(PYTEST_ARGS)'"

install: $(INSTALLED)

$(STAMPS)/venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and f"PYTHON must be >= 3.10, got {sys.version}")'
	$(PYTHON) -m venv $(VENV)
	mkdir -p $(STAMPS) && touch $@

# The package itself comes along without kernels: their build needs the dependencies that are being installed here.
$(STAMPS)/dependencies: pyproject.toml $(STAMPS)/venv
	MAS_FAST_BUILD=python $(BIN)/pip install --disable-pip-version-check --editable '.[dev]'
	rm -f $(STAMPS)/installed-*
	touch $@

# The build's own output goes to a log; shown are its failure, or its lines on what was compiled or is missing.
$(INSTALLED): $(STAMPS)/dependencies setup.py CMakeLists.txt mas_fast/__init__.py $(NATIVE)
	rm -f $(STAMPS)/installed-* && mkdir -p build
	MAS_FAST_BUILD=$(MAS_FAST_BUILD) $(BIN)/pip install --verbose --disable-pip-version-check --no-build-isolation \
	  --no-deps --editable . > build/install.log 2>&1 || { cat build/install.log; exit 1; }
	@grep -E '^ *(mas_fast: |- )' build/install.log
	touch $@

demo: $(INSTALLED)
	$(BIN)/python -m mas_fast demo $(DEMO_ARGS)

test: test-installed test-python-only

test-installed: $(INSTALLED)
	@echo "== tests of the package as installed (MAS_FAST_BUILD=$(MAS_FAST_BUILD))"
	MAS_FAST_TEST_BUILD=$(MAS_FAST_BUILD) $(PYTEST) $(PYTEST_ARGS)

# A wheel as a machine without a compiler gets it. Tests run outside of the tree, so that they import the wheel, which
# test_build.py sees to. Those of the benchmark's commands and experiments, which are no part of it, have run before.
test-python-only: $(INSTALLED)
	@echo "== tests of the Python-only wheel"
	rm -rf $(PYTHON_ONLY) && mkdir -p $(PYTHON_ONLY)
	MAS_FAST_BUILD=python $(BIN)/pip wheel --quiet --disable-pip-version-check --no-build-isolation --no-deps \
	  --wheel-dir $(PYTHON_ONLY) .
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $(PYTHON_ONLY)/site $(PYTHON_ONLY)/*.whl
	cd $(PYTHON_ONLY) && MAS_FAST_TEST_BUILD=python MAS_FAST_TEST_SITE=$(PYTHON_ONLY)/site \
	  PYTHONPATH=$(PYTHON_ONLY)/site PYTHONSAFEPATH=1 \
	  $(PYTEST) --config-file $(CURDIR)/pyproject.toml --rootdir $(CURDIR) $(CURDIR)/tests \
	  $(foreach part,bench continual,--ignore $(CURDIR)/tests/test_$(part).py) $(PYTEST_ARGS)

# In a folder of their own: one of them brings packages named test and benchmarks along.
$(STAMPS)/peers: pyproject.toml $(INSTALLED)
	rm -rf $(VENV)/peers
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $(VENV)/peers \
	  $$($(BIN)/python -m benchmarks.peers)
	touch $@

bench: $(STAMPS)/peers
	$(BIN)/python -m benchmarks $(BENCH_ARGS)

# Saves each run in benchmarks/baselines, and shows it beside the one before, if there is one of this machine's kind.
bench-ops: $(INSTALLED)
	$(BIN)/pytest benchmarks/test_ops.py -W ignore::pytest_benchmark.logger.PytestBenchmarkWarning \
	  --benchmark-storage=file://benchmarks/baselines --benchmark-autosave --benchmark-compare \
	  --benchmark-columns=median,iqr,rounds --benchmark-sort=name

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format --dry-run -Werror

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format -i

clean:
	rm -rf $(VENV) build dist mas_fast.egg-info demo_results bench_results
	rm -f mas_fast/_kernels.so mas_fast/_kernels.dylib mas_fast/_C.*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -rf .pytest_cache .mypy_cache .ruff_cache .benchmarks
