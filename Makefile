# Two commands to start with: `make test` and `make demo`. Both need Python 3.11+ and make, nothing else.

# The first interpreter found that is new enough; name another with `make test PYTHON=/path/to/python3.12`.
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable
# timm without what it asks for: torchvision from PyPI is built for CUDA. Beside a torch without, it does not load, and
# transformers breaks where it is installed so. The tests need nothing of it.
TIMM := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --no-deps timm

# Threads that wait sleep instead of spinning: small models run as fast, and a busy machine does not make them crawl.
test demo: export OMP_WAIT_POLICY = PASSIVE

.PHONY: help test demo lint format docs catalog clean

help:
	@echo "make demo     train small models on Python's own source code and compare four methods"
	@echo "make test     run the tests"
	@echo "make lint     check style, formatting and types"
	@echo "make format   put the code into the project's format"
	@echo "make docs     build the documentation into site/"
	@echo "make catalog  write src/tokenwise/catalog.json anew from the methods' classes"
	@echo "make clean    remove the environment and everything that was generated"

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest

demo: $(VENV)/.installed
	$(BIN)/python examples/demo/prepare.py demo/data
	$(BIN)/tokenwise compare examples/demo/plan.yaml --out demo/results

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

catalog: $(VENV)/.installed
	$(BIN)/python -m tokenwise.catalog

clean:
	rm -rf $(VENV) build dist site demo src/*.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps record what is installed, so that each step runs once and again only when the requirements change.
$(VENV)/.created:
	@test -n "$(PYTHON)" && $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "tokenwise needs Python 3.11 or newer, and $(or $(PYTHON),python3) is older or missing." >&2; \
		echo "Install one, or say where it is: make $(or $(MAKECMDGOALS),test) PYTHON=/path/to/python3.12" >&2; \
		exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed: $(VENV)/.created pyproject.toml constraints.txt
	$(INSTALL) .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.created pyproject.toml constraints.txt
	$(INSTALL) '.[test,ray]'
	$(TIMM)
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-docs: $(VENV)/.created pyproject.toml constraints.txt
	$(INSTALL) '.[docs]'
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-dev: $(VENV)/.created pyproject.toml constraints.txt
	$(INSTALL) '.[dev]'
	$(TIMM)
	@touch $@ $(VENV)/.installed $(VENV)/.installed-test $(VENV)/.installed-docs
