# `make demo` finds a lottery ticket, `make test` runs the test suite; both set up .venv/ first.
# PYTHON=... chooses the interpreter, ARGS=... adds arguments to pytest.

# The first Python that runs (a pyenv shim may not) and is new enough.
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)
BIN := .venv/bin

.PHONY: help setup ffcv demo test science nightly endurance bench-check kernel-budgets check lint types imports wheel clean

help:
	@echo "make demo         find tickets for LeNet-300-100 on the digits that come with scikit-learn"
	@echo "make test         run the test suite"
	@echo "make check        lint, types and import order"
	@echo "make setup        make .venv/ with everything installed; make ffcv tries FFCV again"
	@echo "make science | nightly | endurance      the long tests"
	@echo "make bench-check | kernel-budgets       the speed regression check; what the compiler makes of the kernels"
	@echo "make wheel | clean"

setup: .venv/.ready
	@:

# The stamp: installs again when pyproject.toml or constraints.txt has changed.
.venv/.ready: pyproject.toml constraints.txt
	@$(BIN)/python -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 || { \
		python="$(PYTHON)"; \
		test -n "$$python" || { echo "fastlth needs Python 3.11 or newer; set PYTHON=/path/to/python3" >&2; exit 1; }; \
		$$python -c 'import ensurepip, venv' >/dev/null 2>&1 || { \
			echo "$$python cannot make a virtual environment: install its venv module (Debian, Ubuntu: apt-get install python3-venv)" >&2; exit 1; }; \
		echo "Making .venv with $$($$python --version)"; \
		$$python -m venv --clear .venv; }
	@echo "Installing fastlth and what it needs into .venv (PyTorch is large: this takes minutes)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,lint,report]'
	@$(MAKE) --no-print-directory ffcv
	@touch $@
	@echo "Ready: $(BIN)/fastlth --help"

# FFCV is optional and built from source. System libraries are installed only when already root; any failure is one
# line, and set-up goes on.
ffcv:
	@export DEBIAN_FRONTEND=noninteractive; \
	has_ffcv() { $(BIN)/python -c 'import ffcv' >/dev/null 2>&1; }; \
	header=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("include") + "/Python.h")'); \
	can_build() { command -v c++ && pkg-config --exists opencv4 libturbojpeg && test -f "$$header"; }; \
	needs="g++ pkg-config libopencv-dev libturbojpeg0-dev"; \
	case "$$header" in /usr/include/*) needs="$$needs $$(basename "$$(dirname "$$header")")-dev";; esac; \
	failed=; \
	has_ffcv && exit 0; \
	if ! can_build >/dev/null 2>&1 && test "$$(id -u)" = 0 && command -v apt-get >/dev/null; then \
		echo "Installing FFCV's system libraries: $$needs"; \
		{ apt-get update -qq && apt-get install -y -qq --no-install-recommends $$needs; } >.venv/apt.log 2>&1 </dev/null \
			|| failed=" (apt-get failed, see .venv/apt.log)"; \
	fi; \
	if ! can_build >/dev/null 2>&1; then \
		echo "Going on without FFCV$$failed. To have it, install $$needs (Debian's names), then run: make ffcv"; exit 0; \
	fi; \
	echo "Building FFCV"; \
	{ $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt ffcv && $(BIN)/python -c 'import ffcv'; } \
		>.venv/ffcv.log 2>&1 || echo "Going on without FFCV: it did not build or load, see .venv/ffcv.log. To try again: make ffcv"

demo: setup
	$(BIN)/fastlth find-ticket lenet-300-100 digits

test: setup
	$(BIN)/python -m pytest -q $(ARGS)

science: setup
	$(BIN)/python -m pytest -q -rP -m science -n 2 --dist loadfile $(ARGS)

nightly: setup
	$(BIN)/python -m pytest -q -s -m nightly $(ARGS)

endurance: setup
	$(BIN)/python -m pytest -q -m endurance $(ARGS)

bench-check: setup
	$(BIN)/fastlth bench --check

kernel-budgets: setup
	$(BIN)/python -m benchmarks.aot

check: lint types imports

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .

types: setup
	$(BIN)/mypy

imports: setup
	$(BIN)/lint-imports

wheel: setup
	$(BIN)/python -m build --wheel --no-isolation

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find fastlth kernels tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
