# Targets that need .venv create it. NPROC and ARGS are passed to the trainer, WORKERS and ARGS to pytest, DATA (the
# directory of cifar-10-batches-py) to the experiments:
#   make train NPROC=4 ARGS="norm=local trainer.max_epochs=5"
#   make experiments DATA=DIR
#   make test WORKERS=4 ARGS=tests/test_module.py
PYTHON ?= python3
NPROC ?= 2
WORKERS ?= 2
ARGS ?=
DATA ?= data
BIN := .venv/bin
READY := .venv/.ready

.DEFAULT_GOAL := help
.PHONY: help train test test-all check bench experiments docs clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

train: $(READY) ## train the default network with SyncBN on 2 ranks (digits, under 2 minutes)
	$(BIN)/torchrun --standalone --nproc-per-node=$(NPROC) -m train $(ARGS)

test: check ## lint, type-check and run the tests (under 10 minutes)
	$(BIN)/python -m pytest --numprocesses=$(WORKERS) --dist=worksteal $(ARGS)

test-all: check ## the same, with the slow tests as well (15 minutes)
	$(BIN)/python -m pytest --numprocesses=$(WORKERS) --dist=worksteal -m "slow or not slow" $(ARGS)

check: $(READY) ## lint, format check and type check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY) ## measure synchronization on this CPU: rows in benchmarks/, pictures in docs/ (10 minutes)
	$(BIN)/python scripts/bench_layer.py
	$(BIN)/python scripts/bench_model.py
	$(BIN)/python scripts/bench_overlap.py
	$(BIN)/python scripts/bench_memory.py
	$(BIN)/python scripts/accuracy_numerics.py
	$(BIN)/python scripts/scaling_model.py

experiments: $(READY) ## repeat every experiment: rows in benchmarks/experiments/, pages in docs/experiments/ (90 minutes)
	@for script in $(filter-out %/lab.py %/figures.py %/convnet.py,$(wildcard scripts/experiments/*.py)); do \
		$(BIN)/python $$script --data "$(DATA)" || exit 1; \
	done

docs: $(READY) ## build the site in docs/_build/html, without network
	@$(BIN)/python -c 'import furo, myst_parser' 2>/dev/null || \
		$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	$(BIN)/python -m sphinx --fail-on-warning --keep-going -d docs/_build/cache docs docs/_build/html $(ARGS)

clean: ## remove the environment, caches and run directories
	rm -rf .venv build docs/_build *.egg-info .pytest_cache .mypy_cache .ruff_cache outputs multirun
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt --editable '.[train,dev]'
	@# the trainer is no part of the distribution: this environment finds it in the checkout, from any directory
	@echo '$(CURDIR)' > "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/syncbn-checkout.pth"
	@# pip would compile on one core; some packages contain files for other Python versions, which do not compile
	$(BIN)/python -m compileall -qq -j 0 -x '/(tests|pip|mypy|setuptools)/' .venv || true
	@touch $@
