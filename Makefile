PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-done
DEMO := runs/demo
PEERS := $(VENV)/peers
PARALLEL := -n logical --maxprocesses 4 --dist worksteal # a process for each core; who is done takes over tests of others

# As oscar_common.cli does for the commands, for the tests that import torch themselves.
export GOMP_SPINCOUNT ?= 10000

.DEFAULT_GOAL := help
.PHONY: help setup chromium slurm demo test docs-check test-slow test-gpu test-slurm fuzz bench bench-store bench-scale bench-claims bench-corpus bench-stream bench-train bench-gpu bench-leaks check format clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

setup: $(STAMP) ## make a virtual environment in .venv with every dependency and detectron2

# The stamp is written last: an interrupted set-up is taken up again, a finished one costs nothing.
$(STAMP): pyproject.toml constraints.txt extract/oscar_extract/install_detectron2.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || \
	  { echo "error: $(PYTHON) is not Python 3.10 or newer; name one: make PYTHON=/path/to/python3 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "error: $(PYTHON) has no venv module; on Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@echo "==> setup 1/3: virtual environment in $(VENV)"
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@echo "==> setup 2/3: this project and its dependencies (PyTorch is large; a minute or two)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@echo "==> setup 3/3: detectron2"
	@PIP_CONSTRAINT=constraints.txt $(BIN)/python -m oscar_extract.install_detectron2
	@touch $@
	@echo "setup is done: oscar-extract, oscar-train and the other oscar-* commands are in $(BIN)"

chromium: ## install Debian's Chromium for the tests of pages
	$(if $(filter 0,$(shell id -u)),,sudo )apt-get update
	$(if $(filter 0,$(shell id -u)),,sudo )apt-get install -y --no-install-recommends chromium fonts-dejavu-core

slurm: ## install Debian's SLURM for the tests of clusters
	$(if $(filter 0,$(shell id -u)),,sudo )apt-get update
	$(if $(filter 0,$(shell id -u)),,sudo )apt-get install -y --no-install-recommends slurm-wlm munge

demo: setup ## real photos -> regions -> shards -> a small pre-trained Oscar -> runs/demo/report.html
	@echo "==> demo 1/4: photos and captions from installed packages into $(DEMO)"
	@$(BIN)/python tools/demo_photos.py $(DEMO)
	@echo "==> demo 2/4: detect objects, extract region features, write shards"
	$(BIN)/oscar-extract --pipeline demo
	@echo "==> demo 3/4: pre-train a small Oscar on the shards"
	$(BIN)/oscar-train --pipeline demo
	@echo "==> demo 4/4: report"
	@$(BIN)/python tools/demo_report.py $(DEMO)
	@echo "done: open $(DEMO)/report.html in a browser"

test: setup ## run the tests, except the slow ones
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PARALLEL) -m 'not slow and not gpu and not slurm'

docs-check: setup ## check the docs: command lines, flags, links, and examples in Python
	$(BIN)/python -m pytest -q tests/common/test_docs.py tests/integration/test_python.py

test-slow: setup ## run the slow tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PARALLEL) -m slow

test-gpu: setup ## run the tests that need a GPU; some minutes
	$(BIN)/python -m pytest -m gpu tests/gpu

# One after the other, as they share one cluster.
test-slurm: setup ## run the tests on a real SLURM, which it installs and starts on this machine; some minutes
	@command -v slurmctld >/dev/null || $(MAKE) slurm
	$(BIN)/python -m pytest -m slurm tests/slurm

fuzz: setup ## try 100,000 damaged tars, indexes and JSONs each; most of an hour
	OSCAR_FUZZ=100000 $(BIN)/python -m pytest -q tests/shards/test_fuzz.py

bench: setup ## measure extraction, stage by stage, and write bench/results; some minutes
	$(BIN)/python bench/extract.py --detector builtin
	$(BIN)/python bench/extract.py --detector builtin --precision bf16
	$(BIN)/python bench/extract.py --detector vg-r101 --batch-size 2
	$(BIN)/python bench/extract.py --detector vg-r101 --batch-size 2 --precision bf16

bench-store: setup ## measure verify and index of shards beside plain reading; a minute or two
	$(BIN)/python bench/store.py

bench-scale: setup ## plan and resume a job of 4.1M images and 6.5M texts; needs 20 GB of disk and some 20 minutes
	$(BIN)/python bench/scale.py

bench-claims: setup ## simulate 64 workers of one folder, some of which die, and count what they ask of its disk; some minutes
	$(BIN)/python bench/claims.py

bench-corpus: setup ## open a corpus of 4.1M images and 6.5M texts: time, memory, order; 4 GB of disk, some 10 minutes
	$(BIN)/python bench/corpus.py

# mosaicml-streaming wants older versions of numpy and transformers, so it has an environment of its own.
bench-stream: setup ## measure batches from shards beside webdataset, Oscar's TSV, MDS and litdata; some 20 minutes
	@test -x $(PEERS)/bin/pip || $(BIN)/python -m venv $(PEERS)
	@$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check \
	  "$$(grep ^torch== constraints.txt)" 'litdata>=0.2.76' 'mosaicml-streaming>=0.13'
	$(BIN)/python bench/stream.py --peers-python $(PEERS)/bin/python

# Real shards are better: make bench-train SHARDS=shards
bench-train: setup ## measure training steps beside the released ones and VisualBERT's; half an hour on two cores
	$(BIN)/python bench/train.py $(if $(SHARDS),--shards $(SHARDS))

bench-gpu: setup ## measure training and extraction on a GPU; six minutes; writes bench/results/gpu-CARD.json
	$(BIN)/python bench/gpu.py
	$(BIN)/python bench/page.py

bench-leaks: setup ## count what the texts that replace others give away; a minute
	$(BIN)/python bench/leaks.py

check: setup ## ruff (format and lint) and mypy (strict)
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

format: setup ## let ruff format the code and mend what it can
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

clean: ## remove caches and build artefacts; .venv and runs stay
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache *.egg-info */*.egg-info
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
