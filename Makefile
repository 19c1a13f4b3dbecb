# make repro: set up and run the whole pipeline.   make test: set up and pass the tests.
PYTHON ?= $(shell command -v python3 || command -v python)
PORT ?= 5000
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
READY := .venv/ready
# An environment whose Python is gone, or that was moved here from elsewhere, is made again.
STALE := $(shell test ! -e $(READY) || { .venv/bin/python -c '' && \
	head -n 3 .venv/bin/dvc | grep -qF "$(CURDIR)/.venv/bin/python"; } 2>/dev/null || rm -rf .venv)

.DEFAULT_GOAL := help
.PHONY: help setup repro test bench lab mlflow docs lock clean

help:            ## what there is to make
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/:[^#]*##/\t/' | expand -t 10

setup: $(READY)  ## create .venv and install everything that is locked

# uv installs the lock in a fraction of pip's time, and compiles it, as pip does, for where PYTHONDONTWRITEBYTECODE is set;
# pip, which honours every local configuration, is the fallback.
$(READY): requirements.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "semid needs Python 3.11, 3.12 or 3.13 on the PATH, or make PYTHON=/path/to/python"; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
		{ echo "semid needs Python 3.11, 3.12 or 3.13, and $(PYTHON) is another: make PYTHON=/path/to/python"; exit 1; }
	@.venv/bin/python -m pip --version >/dev/null 2>&1 || { rm -rf .venv; "$(PYTHON)" -m venv .venv; }
	.venv/bin/python -m pip install -q "$$(grep '^uv==' requirements.lock)"
	VIRTUAL_ENV="$(CURDIR)/.venv" .venv/bin/python -m uv pip install -q --compile-bytecode -r requirements.lock || \
		.venv/bin/python -m pip install -q -r requirements.lock
	.venv/bin/python -m pip install -q --no-deps --no-build-isolation -e .
	@touch $(READY)

# With a SOURCE the pictures are others: params.yaml is changed, and dvc repro goes on with it.
OTHER := $(if $(SOURCE),exp run -S "collection.source=$(SOURCE)" $(if $(DATA),-S "collection.path='$(abspath $(DATA))'"))

repro: setup     ## run the pipeline: dvc repro (SOURCE=flickr8k DATA=folder: on other pictures)
	SEMID_PIPELINE="$${SEMID_PIPELINE:-$$(date +%Y-%m-%dT%H:%M:%S)}" dvc $(or $(OTHER),repro)

# Else Ray's workers give way to all other tests, and OpenMP's idle threads spin.
test: setup      ## everything that must pass
	python tests/gate.py
	ruff check nbs experiments semid tests docs.py
	mypy
	RAY_worker_niceness=0 OMP_WAIT_POLICY=PASSIVE pytest -n 2 --dist loadfile --no-loadscope-reorder --durations 20

# One after the other, for they measure. Real data is looked for where each notebook's parameters say.
bench: setup     ## measure again, for hours (BENCH=registry: only that)
	for one in $(or $(BENCH),$(basename $(notdir $(wildcard experiments/benchmarks/*.ipynb)))); do \
		papermill --log-level ERROR --cwd experiments/benchmarks "experiments/benchmarks/$$one.ipynb" \
			"experiments/runs/bench_$$one.ipynb" || exit 1; done

lab: setup       ## explore in JupyterLab
	jupyter lab

mlflow: setup    ## look at the runs (PORT=5000)
	MLFLOW_DISABLE_TELEMETRY=true mlflow ui --backend-store-uri "$${MLFLOW_TRACKING_URI:-sqlite:///$(CURDIR)/mlflow.db}" --port $(PORT)

docs: setup      ## README.md and the site in site/, from the notebooks
	python docs.py

lock: setup      ## resolve requirements.lock anew for Python 3.11 to 3.13
	python -m uv pip compile -q --universal --python-version 3.11 --extra all --no-emit-index-url --no-header \
		--no-annotate pyproject.toml -o requirements.lock

clean:           ## remove what can be made again, but not .venv
	rm -rf site _site_src .mypy_cache .ruff_cache .pytest_cache experiments/runs/*.ipynb
