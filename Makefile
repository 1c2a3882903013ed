# Two commands do all the set-up: `make sweep` and `make test`. Each makes its own .venv.
PYTHON ?= python3
BIN := .venv/bin
# pip knows where wheels may lie on this machine; uv has to be told.
FIND_LINKS := $(shell $(PYTHON) -m pip config get global.find-links 2>/dev/null)
INSTALL = $(if $(FIND_LINKS),UV_FIND_LINKS="$(FIND_LINKS)") $(BIN)/uv pip install -q --compile-bytecode --python $(BIN)/python -c constraints.txt

# A process a core, each with one thread: most tests wait for a process of their own.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

.PHONY: sweep test compile-triton36 analysis lint format clean

sweep: .venv/run.stamp
	$(BIN)/python -m ablate +sweep=attn_ratio

test: .venv/dev.stamp
	$(PYTEST)
	TRITON_INTERPRET=1 $(PYTEST) -m interpret tests/kernels

# The kernels of another Triton than the one installed, as torch 2.11 brings it, assembled.
compile-triton36: .venv/dev.stamp
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --upgrade --target .venv/triton36 triton==3.6.0
	PYTHONPATH=.venv/triton36 $(PYTEST) -m compile tests/kernels

# Every page, picture, notebook and table again, from the frames in analysis/results alone.
analysis: .venv/dev.stamp
	$(BIN)/python analysis/build.py

lint: .venv/dev.stamp
	$(BIN)/ruff format --check ablate tests analysis
	$(BIN)/ruff check ablate tests analysis
	$(BIN)/mypy

format: .venv/dev.stamp
	$(BIN)/ruff format ablate tests analysis
	$(BIN)/ruff check --fix ablate tests analysis

.venv/uv.stamp:
	$(PYTHON) -c 'import sys; sys.exit("ablate needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; set PYTHON=...") if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check uv
	touch $@

.venv/run.stamp: .venv/uv.stamp pyproject.toml constraints.txt
	$(INSTALL) -e .
	touch $@

.venv/dev.stamp: .venv/uv.stamp pyproject.toml constraints.txt
	$(INSTALL) -e '.[dev]'
	touch $@ .venv/run.stamp

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache dist build
