# `make quick`, `make table2` and `make test` are all a newcomer needs; each installs what it needs into .venv first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: quick table2 gaussians protocol test test-slow bench lint clean

quick: .venv/installed
	@PATH="$(CURDIR)/$(BIN):$$PATH" snakemake --cores all results/quick.md

table2: .venv/installed
	@PATH="$(CURDIR)/$(BIN):$$PATH" snakemake --cores all results/table2.md

gaussians: .venv/installed
	@PATH="$(CURDIR)/$(BIN):$$PATH" snakemake --cores all results/gaussians.md

# The measured tables of docs/protocol.md, from the digits and from the published records of the audit and of table 2: minutes.
protocol: .venv/installed
	@PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=1 $(BIN)/python -m eval.report.protocol

# tests/slurm has the machine for itself: its jobs take all cores.
test: .venv/installed
	@export PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=1 && \
	$(BIN)/python -m pytest -n auto --dist loadgroup --durations=50 --ignore tests/slurm && \
	$(BIN)/python -m pytest --durations=20 tests/slurm

test-slow: .venv/installed
	@PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=1 $(BIN)/python -m tests.slow

# BENCH=--large adds 50,000 rows.
bench: .venv/installed
	@PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=1 $(BIN)/python -m perf $(BENCH)

lint: .venv/installed
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("distillbench needs Python 3.11 or newer; try: make PYTHON=python3.12 ...") if sys.version_info < (3, 11) else 0'
	@echo "installing into .venv (once; several minutes, mostly torch)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@

clean:
	rm -rf .venv .snakemake
