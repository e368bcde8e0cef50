# `make demo` and `make test` set up everything they need in .venv; nothing is expected beforehand
# but Python 3.11 or newer and make.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
LOADED_BY := 4.57.6 5.17.0 5.23.0

DATA := benchmarks/data
RESULTS := benchmarks/results
LM_EVAL := build/venv-lm-eval

.PHONY: help demo artifacts check test test-all test-loading test-lm-eval eval eval-finance \
	eval-answers eval-ablations lm-eval blocked-moments slice-memory compile-time start-time reference clean

help:
	@echo "make demo          slice the default model for a chemistry scenario"
	@echo "make test          linters, type checks and tests"
	@echo "make test-all      make test, the slow tests, loading on three transformers versions, lm-eval"
	@echo "make check         linters and type checks alone"
	@echo "make artifacts     probe the default model again"
	@echo "make eval          every criterion and control, 10 to 50 % of heads and of all units removed"
	@echo "make eval-finance  the defaults on a scenario that no constant was set on"
	@echo "make eval-answers  questions answered by slim models"
	@echo "make eval-ablations  the defaults less one of their parts"
	@echo "make lm-eval       make demo's export in lm-evaluation-harness"
	@echo "make blocked-moments  what moments in blocks cost the re-fit of a wide MLP"
	@echo "make slice-memory  time and peak memory of slicing a 2 GB checkpoint"
	@echo "make compile-time  time from scores to plan"

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --editable '.[demo,onnx,dev]'
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
	$(MAKE) test-lm-eval

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

# All of these continue where they were interrupted.
EVAL := $(BIN)/spp eval --pools $(DATA)/pools
CHEMISTRY := --scenario $(DATA)/scenarios/chemistry.txt --wrong $(DATA)/scenarios/history.txt \
	--domain chemistry

# Every criterion with the re-fit; without it; FLAP with its own bias; other ways to compare layers.
eval: EVAL_CHEMISTRY = $(EVAL) $(CHEMISTRY) -o $(RESULTS)/eval-chemistry
eval: $(INSTALLED)
	$(EVAL_CHEMISTRY) --criterion all --units heads --units both
	$(EVAL_CHEMISTRY) --criterion all --compensate none --keep 0.8
	$(EVAL_CHEMISTRY) --criterion flap --compensate bias --units heads --units both --keep 0.8
	$(EVAL_CHEMISTRY) --criterion energy --criterion wanda-sp --criterion taylor \
		--comparable share --units heads --units both --keep 0.8
	$(EVAL_CHEMISTRY) --criterion energy --comparable standardised --units heads --units both --keep 0.8
	$(EVAL_CHEMISTRY) --criterion taylor --criterion llm-pruner --comparable raw \
		--units heads --units both --keep 0.8
	$(BIN)/python -m spp_bench.quality_tables $(RESULTS)/eval-chemistry

eval-finance: $(INSTALLED)
	$(EVAL) --scenario $(DATA)/scenarios/finance.txt --wrong $(DATA)/scenarios/history.txt \
		--domain finance --keep 0.8 --keep 0.7 --units heads --units both \
		-o $(RESULTS)/eval-finance

eval-answers: $(INSTALLED)
	$(EVAL) $(CHEMISTRY) --keep 0.8 --eval-set $(DATA)/eval/selected_domain/chemistry.json \
		--generate --no-curves -o $(RESULTS)/eval-answers

eval-ablations: $(INSTALLED)
	$(BIN)/spp probe --pools $(DATA)/pools --units heads -o build/artifacts-all --force
	$(BIN)/spp probe --pools $(DATA)/pools --units heads --select 6 -o build/artifacts-selected --force
	$(EVAL) $(CHEMISTRY) --keep 0.7 --ablations --other-artifacts all=build/artifacts-all \
		--other-artifacts selected=build/artifacts-selected --no-curves -o $(RESULTS)/eval-ablations

# An exported model in lm-evaluation-harness, in an environment without this project.
lm-eval: demo $(LM_EVAL)/.installed
	HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 $(LM_EVAL)/bin/lm_eval --model hf \
		--model_args pretrained=out/chemistry,trust_remote_code=True,dtype=float32 \
		--tasks spp_domains --include_path benchmarks/lm_eval --device cpu --batch_size 16

# Reads the checkpoints that test-loading builds.
test-lm-eval: $(LM_EVAL)/.installed
	$(LM_EVAL)/bin/python tests/lm_eval/check_lm_eval.py build/loading

$(LM_EVAL)/.installed:
	$(PYTHON) -m venv $(LM_EVAL)
	$(LM_EVAL)/bin/python -m pip install --quiet --disable-pip-version-check \
		lm_eval==0.4.13 torch==2.13.0 transformers==5.23.0 accelerate
	@touch $@

blocked-moments: $(INSTALLED)
	$(BIN)/python -m spp_bench.blocked_moments --json $(RESULTS)/blocked-moments.json

slice-memory: $(INSTALLED)
	mkdir -p build
	$(BIN)/python -m spp_bench.slice_memory --gigabytes 2 --dir build

compile-time: $(INSTALLED)
	$(BIN)/python -m spp_bench.compile_time

start-time: $(INSTALLED)
	$(BIN)/python -m spp_bench.start_time

reference: $(INSTALLED)
	$(BIN)/python -m spp_cli.reference > cli/README.md

clean:
	rm -rf build dist out .pytest_cache .mypy_cache .ruff_cache .hypothesis
