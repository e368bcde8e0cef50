# `make demo` and `make test` set up everything they need in .venv; nothing is expected beforehand
# but Python 3.11 or newer and make.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
LOADED_BY := 4.57.6 5.17.0 5.23.0

.PHONY: help demo artifacts check test test-all test-loading quality quality-finance slice-memory \
	compile-time start-time reference clean

help:
	@echo "make demo          slice the default model for a chemistry scenario"
	@echo "make test          linters, type checks and tests"
	@echo "make test-all      make test, the slow tests, and loading on three transformers versions"
	@echo "make check         linters and type checks alone"
	@echo "make artifacts     probe the default model again"
	@echo "make quality       perplexity against dense, with controls"
	@echo "make slice-memory  time and peak memory of slicing a 2 GB checkpoint"
	@echo "make compile-time  time from scores to plan"

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --editable '.[demo,dev]'
	@touch $@

demo: $(INSTALLED)
	$(BIN)/spp export --scenario benchmarks/data/scenarios/chemistry.txt -o out/chemistry --force

artifacts: $(INSTALLED)
	$(BIN)/spp probe --pools benchmarks/data/pools \
		--domains chemistry,finance,history,math,philosophy,technology \
		-o spp_export/assets/smollm2-135m-instruct --force

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: check
	$(BIN)/python -m pytest -m "not slow and not gpu"

test-all: check
	$(BIN)/python -m pytest
	$(MAKE) test-loading

# Checkpoints written once, loaded by every supported transformers in an environment of its own.
test-loading: $(INSTALLED)
	rm -rf build/loading
	$(BIN)/python tests/loading/build_loading.py build/loading
	for version in $(LOADED_BY); do \
		$(PYTHON) -m venv build/venv-$$version && \
		build/venv-$$version/bin/python -m pip install --quiet --disable-pip-version-check \
			torch==2.13.0 transformers==$$version accelerate numpy && \
		build/venv-$$version/bin/python tests/loading/check_loading.py build/loading && \
		PYTHONPATH=. build/venv-$$version/bin/python \
			tests/loading/check_loading.py build/loading --registered || exit 1; \
	done

quality: $(INSTALLED)
	$(BIN)/python -m spp_bench.quality --json benchmarks/results/quality-smollm2-135m.json

slice-memory: $(INSTALLED)
	mkdir -p build
	$(BIN)/python -m spp_bench.slice_memory --gigabytes 2 --dir build

compile-time: $(INSTALLED)
	$(BIN)/python -m spp_bench.compile_time

start-time: $(INSTALLED)
	$(BIN)/python -m spp_bench.start_time

# A scenario that no constant of the method was set on.
quality-finance: $(INSTALLED)
	$(BIN)/python -m spp_bench.quality --keep 0.8 \
		--scenario benchmarks/data/scenarios/finance.txt --pool benchmarks/data/pools/finance \
		--wrong benchmarks/data/scenarios/chemistry.txt \
		--json benchmarks/results/quality-smollm2-135m-finance.json

reference: $(INSTALLED)
	$(BIN)/python -m spp_cli.reference > cli/README.md

clean:
	rm -rf build dist out .pytest_cache .mypy_cache .ruff_cache .hypothesis
