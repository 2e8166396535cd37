# Everything runs in .venv/, which is made from the lock on first use.
PYTHON ?= python3
BIN := .venv/bin
UV := $(shell command -v uv || echo .uv/bin/uv)

.DEFAULT_GOAL := help
.PHONY: help setup demo test check docs cluster-up cluster-down test-cluster bench bench-flickr8k lock clean

help:  ## Show this list.
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: .venv/installed  ## Install everything into .venv/, in exactly the versions of the lock.

.uv/bin/uv:
	$(PYTHON) -m venv .uv
	.uv/bin/pip install --quiet uv

.venv/installed: requirements.lock pyproject.toml | $(UV)
	$(UV) venv --quiet --allow-existing --python $(PYTHON) .venv
	$(UV) pip sync --quiet --python $(BIN)/python --require-hashes requirements.lock
	$(UV) pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $@

demo: setup  ## The whole flow on drawn scenes; WEIGHTS=IMAGENET1K_V1 or a file for learned weights.
	@$(BIN)/captionlib demo $(if $(WEIGHTS),--weights $(WEIGHTS))

check: setup  ## Format, lint, types and the import contract.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: setup  ## Build the documentation site into .site/, with strict links.
	$(BIN)/mkdocs build --quiet

test: check docs  ## All checks and all tests, in a process for each CPU.
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --maxprocesses 4 --dist worksteal

cluster-up: setup  ## Start a cluster of processes here: make cluster-up ENGINE=flink, spark or prism.
	@$(BIN)/python -m clusters up $(or $(ENGINE),flink)

cluster-down: setup  ## Stop the clusters that cluster-up started.
	@$(BIN)/python -m clusters down

test-cluster: setup  ## The flow on real Flink, Spark and Prism, and what becomes of it when things are killed.
	$(BIN)/pytest clusters/tests -v -o timeout=3600

bench: setup  ## Measure every bar, or one: make bench NAME=extract-throughput.
	@$(BIN)/python -m benchmarks $(NAME)

bench-flickr8k: setup  ## Flickr8k from photographs to the table: DATA=folder WEIGHTS=file, NAME=ranking for a part.
	@$(BIN)/python -m benchmarks.flickr8k $(or $(DATA),$(error DATA: the folder of Flickr8k)) $(or $(WEIGHTS),IMAGENET1K_V1) $(NAME)

lock: | $(UV)  ## Write the lock anew after a change of pyproject.toml.
	$(UV) pip compile --quiet --universal --python-version 3.10 --generate-hashes --group dev --extra s3 --no-header \
		--output-file requirements.lock pyproject.toml

clean:  ## Remove what make has made.
	rm -rf .venv .uv .demo .bench .cluster .site dist
