# make help lists what there is. Everything runs in its own virtual environment, .venv.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

# Python 3.11 or 3.12 that makes the environment.
PYTHON ?= python3
VENV ?= .venv
# requirements/cuda.txt on a machine with CUDA.
LOCK ?= requirements/cpu.lock
# More options for every pip install, such as an index to find packages in.
PIP_ARGS ?=
# no: install what the index gives for the locked versions, whatever its hash; for an index that builds its own wheels.
HASHES ?= yes
# Test processes; each computes on one thread.
WORKERS ?= 2
PYTEST_ARGS ?=
DEMO ?= demo
NOTEBOOKS ?= runs/notebooks
ROLLOUT ?= rollout
PORT ?= 5000

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL = $(PIP) install --quiet --quiet --no-compile --no-deps $(PIP_ARGS)
STAMP := $(VENV)/.installed-$(notdir $(LOCK))
SHIM := requirements/fbgemm-gpu-cpu-shim
CUDA_LIBRARIES := requirements/cuda-libraries.txt
# torch's own CPU build alone, with its hashes.
CPU_TORCH = <(sed -nE '/^torch==/,/[^\\]$$/{s/^(torch==[^ ]+)/\1+cpu/;p}' $(LOCK))
# A lock as pip shall read it.
pins = $(if $(filter yes,$(HASHES)),--require-hashes --only-binary=:all: -r $1,-r <(sed -E '/^ +--hash=/d; s/ *\\$$//' $1))
OTHERS = $(filter-out $(STAMP),$(wildcard $(VENV)/.installed-*))

export MLFLOW_DISABLE_TELEMETRY := true
export DO_NOT_TRACK := true

.PHONY: help setup lock lint format test slow gpu slurm spark demo rollout bench torture fuzz soak faults notebooks ui site clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' Makefile

setup: $(STAMP) ## make .venv with the locked packages and this one; does nothing when nothing changed

# Bytecode is compiled here, on all cores and whatever the shell says: without it every later start pays for it.
# Packages hold a few files for other versions of Python, which do not compile and are not meant to.
# torch's CPU build is asked for first: an index that has it may give no hash, and pip prefers what has one.
$(STAMP): $(LOCK) $(CUDA_LIBRARIES) pyproject.toml $(SHIM)/pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 11) <= v < (3, 13) or sys.exit(f"Trefoil wants Python 3.11 or 3.12, $(PYTHON) is {v[0]}.{v[1]}: make setup PYTHON=python3.11")'
	@test -z "$(OTHERS)" || { echo "$(VENV) was made from $(patsubst .installed-%,%,$(notdir $(OTHERS))): make clean first, or choose another: make setup LOCK=$(LOCK) VENV=.venv-other"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing $(LOCK) into $(VENV); one to three minutes the first time"
	@! grep -q '^fbgemm-gpu-cpu==' $(LOCK) || $(INSTALL) $(call pins,$(CPU_TORCH)) 2>/dev/null || true
	@$(INSTALL) $(call pins,$(LOCK))
	@! $(BIN)/python -c 'from importlib.metadata import requires; any("nvidia" in r for r in requires("torch")) or exit(1)' \
	  || $(INSTALL) $(call pins,$(CUDA_LIBRARIES))
	@! grep -q '^fbgemm-gpu-cpu==' $(LOCK) || $(INSTALL) --no-build-isolation ./$(SHIM)
	@$(INSTALL) --no-build-isolation --editable .
	@env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -m compileall -q -j 0 $(VENV)/lib >/dev/null 2>&1 || true
	@$(PIP) check
	@touch $@

lock: setup ## resolve pyproject.toml anew and rewrite the locks in requirements, with hashes
	$(BIN)/python requirements/lock.py -- $(PIP_ARGS)

lint: setup ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup ## put the code into ruff's form
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: lint ## set-up, lint and every test that is not slow
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) $(PYTEST_ARGS)

slow: setup ## the tests that the suite leaves out
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

slurm: setup ## two-node Slurm on this machine: TorchX jobs, a node that dies, a job requeued (as root; Debian)
	tests/slurm/cluster.sh install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow tests/slurm $(PYTEST_ARGS)

spark: setup ## ingest on Spark writes what the embedded engine writes (a JVM must be there)
	@command -v java >/dev/null || { echo "Spark runs on Java, and there is none: apt-get install default-jre-headless"; exit 1; }
	$(PIP) install --quiet $(PIP_ARGS) $(subst --only-binary=:all:,,$(call pins,requirements/spark.txt))
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow tests/data/test_ingest_spark.py $(PYTEST_ARGS)

# What the libraries' CUDA builds warn of differs from version to version, and is no error here.
gpu: setup ## what only a GPU can show: trains and serves as on CPU; skipped where there is none (LOCK=requirements/cuda.txt)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/gpu -rs -W default $(PYTEST_ARGS)

demo: setup ## simulated logs to a trained, exported and registered model, through TorchX on two ranks
	PATH="$(abspath $(BIN)):$$PATH" scripts/demo.sh $(DEMO)

rollout: setup ## staged unification on simulated logs: plan, waves, gates, promotion, a regression rolled back
	PATH="$(abspath $(BIN)):$$PATH" scripts/rollout.sh $(ROLLOUT)

bench: setup ## every benchmark in its quick form; each prints one JSON object as its last line
	@for file in benchmarks/[a-z]*.py; do name=$$(basename $$file .py); \
	  echo "== $$name"; $(BIN)/python -m benchmarks.$$name --quick; done

notebooks: setup ## figures of the runs in TREFOIL_HOME as .ipynb and HTML; without it, runs are made first (NOTEBOOKS)
	@export TREFOIL_HOME="$${TREFOIL_HOME:-$(NOTEBOOKS)}"; \
	if [ "$$TREFOIL_HOME" = "$(NOTEBOOKS)" ]; then \
	  OMP_NUM_THREADS=1 $(BIN)/python scripts/notebook_data.py --home "$(NOTEBOOKS)"; fi; \
	OMP_NUM_THREADS=1 $(BIN)/python scripts/notebooks.py --out "$$TREFOIL_HOME/pages"

# Runs of the crash campaign, cases of the fuzzing, minutes of the soak; SEED repeats or varies them.
RUNS ?= 100
CASES ?= 100000
MINUTES ?= 60
SEED ?= 0

torture: setup ## RUNS small training jobs killed at random moments and gone on with; what must be nought is
	nice -n 10 $(BIN)/python -m tests.faults.torture --runs $(RUNS) --seed $(SEED)

fuzz: setup ## CASES damaged files for every reader; the corpus of what was found is in tests/faults/corpus
	nice -n 10 $(BIN)/python -m tests.faults.fuzz --cases $(CASES) --seed $(SEED)

soak: setup ## MINUTES of training on end: memory, handles, threads and step time must not grow
	OMP_NUM_THREADS=1 nice -n 10 $(BIN)/python -m tests.faults.soak --minutes $(MINUTES)

faults: setup ## every test of faults, the slow ones too: disks, services, hostile files, crashes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "slow or not slow" tests/faults tests/tracking/test_server.py $(PYTEST_ARGS)

ui: setup ## MLflow's pages for the runs here, on http://127.0.0.1:5000 or another PORT
	@mkdir -p "$${TREFOIL_HOME:-runs}"
	@echo 'runs: http://127.0.0.1:$(PORT)/#/experiments?workflowType=machine_learning'
	$(BIN)/mlflow server --host 127.0.0.1 --port $(PORT) --workers 1 \
	  --backend-store-uri "sqlite:///$${TREFOIL_HOME:-runs}/mlflow.db"

site: setup ## the documentation as pages, in site/
	$(BIN)/python scripts/api_pages.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

clean: ## remove the environment, the demo and what tools left behind
	rm -rf $(VENV) $(DEMO) $(ROLLOUT) .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info $(SHIM)/build $(SHIM)/*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
