# All targets run in .venv/, which is created from requirements.lock on first use.
PYTHON ?= python3
BIN := .venv/bin
UV := $(shell command -v uv || echo .uv/bin/uv)

.DEFAULT_GOAL := help
.PHONY: help setup demo test check docs screenshots cluster-up cluster-down test-cluster bench bench-gpu bench-flickr8k lock clean

help:  ## List the targets.
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: .venv/installed  ## Create .venv/ with the exact versions in requirements.lock.

.uv/bin/uv:
	$(PYTHON) -m venv .uv
	.uv/bin/pip install --quiet uv

.venv/installed: requirements.lock pyproject.toml | $(UV)
	$(UV) venv --quiet --allow-existing --python $(PYTHON) .venv
	$(UV) pip sync --quiet --python $(BIN)/python --require-hashes requirements.lock
	$(UV) pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $@

demo: setup  ## Run the whole flow on a small rendered dataset. WEIGHTS=IMAGENET1K_V1 (or a file) uses pretrained weights.
	@$(BIN)/captionlib demo $(if $(WEIGHTS),--weights $(WEIGHTS))

check: setup  ## Check format, lint, types and the import contract.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: setup  ## Build the documentation site in .site/; broken links are errors.
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

screenshots: demo  ## Take screenshots of the pages for docs/images/ with headless Chromium.
	@$(BIN)/python -m docs.screenshots .demo

test: check docs  ## Run all checks and all tests, one process per CPU.
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --maxprocesses 4 --dist worksteal

cluster-up: setup  ## Start a local cluster: make cluster-up ENGINE=flink (or spark, prism).
	@$(BIN)/python -m clusters up $(or $(ENGINE),flink)

cluster-down: setup  ## Stop all clusters that cluster-up started.
	@$(BIN)/python -m clusters down

test-cluster: setup  ## Test the stages on real Flink, Spark and Prism clusters, with injected faults.
	$(BIN)/pytest clusters/tests -v -o timeout=3600

bench: setup  ## Run all benchmarks, or only one: make bench NAME=extract-throughput.
	@$(BIN)/python -m benchmarks $(NAME)

bench-gpu: setup  ## Measure encoding and captioning on this machine's GPU.
	@$(BIN)/python -m benchmarks.gpu

bench-flickr8k: setup  ## Reproduce the Flickr8k results: DATA=folder WEIGHTS=file; NAME=ranking runs only that part, SEEDS=3 three seeds.
	@$(BIN)/python -m benchmarks.flickr8k $(or $(DATA),$(error set DATA to the folder of Flickr8k)) $(or $(WEIGHTS),IMAGENET1K_V1) $(NAME) --seeds $(or $(SEEDS),1)

lock: | $(UV)  ## Update requirements.lock after a change to pyproject.toml.
	$(UV) pip compile --quiet --universal --python-version 3.10 --generate-hashes --group dev --extra s3 --no-header \
		--output-file requirements.lock pyproject.toml

clean:  ## Remove everything that the other targets created.
	rm -rf .venv .uv .demo .bench .cluster .site dist
