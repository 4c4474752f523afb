# `make ask` answers a question on a fresh machine; `make test` checks everything.
# Nothing is installed outside .venv; the embedded model goes to the user's cache (`agentctx paths`).

PYTHON ?= python3
QUESTION ?= What is the monthly rent?
SOURCES ?= examples

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# Stated in every install: without it pip prefers a newer torch with several GB of CUDA libraries
# to a CPU build that is already offered or installed.
TORCH := "torch>=2.11,<2.14"

.PHONY: ask test lint model bench-kernels install clean

ask: $(VENV)/.installed
	$(BIN)/agentctx models fetch smollm2
	$(BIN)/agentctx ask "$(QUESTION)" $(SOURCES)

test: lint model
	$(BIN)/python -m pytest

lint: $(VENV)/.tested
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy agentctx

model: $(VENV)/.tested
	$(BIN)/agentctx models fetch smollm2

# Options go into BENCH: make bench-kernels BENCH="--only decode --threads 2"
bench-kernels: $(VENV)/.installed
	$(BIN)/python benchmarks/kernels/table.py $(BENCH)

install: $(VENV)/.tested $(VENV)/.triton-3.6

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# Stamps: a second call installs nothing unless pyproject.toml changed.
$(VENV)/.created:
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) "pip>=25.1"
	@touch $@

$(VENV)/.installed: pyproject.toml | $(VENV)/.created
	@echo "installing agentctx and its dependencies into $(VENV); the first time takes minutes"
	$(PIP) $(TORCH) -e .
	@touch $@

$(VENV)/.tested: pyproject.toml | $(VENV)/.created
	@echo "installing agentctx, its extras and the test tools into $(VENV); the first time takes minutes"
	$(PIP) $(TORCH) -e ".[office,pdf-crypto,postgres]" --group test
	@touch $@ $(VENV)/.installed

# The oldest Triton that is supported, beside the installed one: its compiler is tested as well.
$(VENV)/.triton-3.6: | $(VENV)/.created
	test "$$(uname -s)" != Linux || $(PIP) --no-deps --target $(VENV)/triton-3.6 "triton==3.6.*"
	@touch $@
