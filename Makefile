PYTHON ?= python3
BIN := .venv/bin
# The links `modeling` and `conversion` lead into cmcr_hf, so folders are named: nothing is checked twice.
FOLDERS := $(wildcard cmcr_hf tests benchmarks)

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-gpu test-parity matrix lint format bench wheel clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

demo: .venv/.installed ## connect two small spaces offline and report what came of it
	$(BIN)/cmcr demo

# Two processes of one thread each; the tests of a file stay together, since they share what is slow to make.
test: .venv/.installed ## run the fast tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile

test-slow: .venv/.installed test-parity ## run the slow tests, and only these
	$(BIN)/python -m pytest -q -m slow

test-gpu: .venv/.installed ## run the fast tests of what computes as on a GPU, which is simulated
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --simulated-gpu \
		tests/modeling tests/training tests/evaluation tests/search tests/test_connect.py tests/test_connect_ulip.py

test-parity: .parity/.installed ## compare with open_clip and laion_clap, live in an environment of their own
	OMP_NUM_THREADS=1 CMCR_PARITY_FIGURES=tests/parity .parity/bin/python -m pytest -q -m slow tests/parity

matrix: ## run the fast tests under each supported Python that is here, and with the lowest versions allowed
	.ci/matrix

lint: .venv/.installed ## check style, format and types
	$(BIN)/ruff check $(FOLDERS)
	$(BIN)/ruff format --check $(FOLDERS)
	$(BIN)/mypy

format: .venv/.installed ## rewrite the sources in the house format
	$(BIN)/ruff check --fix-only $(FOLDERS)
	$(BIN)/ruff format $(FOLDERS)

bench: .venv/.installed ## measure speed against peers and floors; the tables are kept in runs/benchmarks
	$(BIN)/python -m benchmarks --output runs/benchmarks

wheel: .venv/.installed ## build the sdist, and from it the wheel, into dist/
	$(BIN)/python -m build --no-isolation

clean: ## remove the environment, the builds and the caches
	rm -rf .venv .matrix .parity dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find $(FOLDERS) -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.installed: pyproject.toml constraints.txt
	@echo "Installing cmcr_hf and its tools into .venv (this may take a minute) ..."
	@rm -f $@
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch -e ".[dev,test-s3]"
	@touch $@

# The compiled part of torchaudio is built for CUDA, and laion_clap needs none of it.
.parity/.installed: pyproject.toml constraints.txt tests/parity/constraints.txt
	@echo "Installing open_clip, laion_clap and what they need into .parity (this may take a minute) ..."
	@rm -f $@
	@.parity/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .parity
	@.parity/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt -c tests/parity/constraints.txt \
		torch -e ".[train,open-clip]" hypothesis pytest h5py librosa torchlibrosa braceexpand pandas requests scikit-learn webdataset wget
	@.parity/bin/python -m pip install -q --disable-pip-version-check -c tests/parity/constraints.txt --no-deps \
		laion_clap torchaudio
	@rm -f .parity/lib/python*/site-packages/torchaudio/lib/*.so
	@touch $@
