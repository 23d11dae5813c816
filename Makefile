# `make demo` and `make test` do all their own set-up in .venv; they need Python >= 3.10 and make.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-all lint figures clean

.venv/demo: pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; assert sys.version_info >= (3, 10), 'Python 3.10 or newer is needed, this is ' + sys.version"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[demo]'
	touch $@

.venv/installed: .venv/demo
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

demo: .venv/demo
	$(BIN)/mst-fx demo

test: .venv/installed
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m "not gpu and not slow"

test-all: .venv/installed
	MST_FUZZ=40 $(BIN)/python -m pytest -n 2 --dist loadgroup -m "not gpu"

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/codespell

figures: .venv/installed
	$(BIN)/python -m benchmarks.figures

clean:
	rm -rf .venv demo-out
