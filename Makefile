# Every target sets up what it needs: a virtual environment with pinned versions, and the demo's trained model.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
MODEL  := .cache/models/smollm2-135m-instruct
TEXT   := tests/data/sotu-2000.txt
OUT    ?= out/smollm2-block8

.PHONY: help setup model demo test lint bench clean

help:           ## Show this list
	@grep -E '^[a-z]+: .*##|^[a-z]+: +##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 12

setup: $(READY) ## Make the virtual environment

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[hf,rtx,dev]'
	touch $(READY)

model: $(MODEL)/config.json ## Fetch the trained model of the demo and the tests (93 MB)

$(MODEL)/config.json: | $(READY)
	$(BIN)/python tools/fetch_smollm2.py

demo: $(READY) $(MODEL)/config.json ## Convert SmolLM2-135M to Block AttnRes, verify it, build an RTX engine
	$(BIN)/depthwire convert $(MODEL) --attn-res block:8 --batch 1 --seq-len 512 --text $(TEXT) --windows 4 \
	    --target rtx --cc SM86 --cc SM120 -o $(OUT)

test: $(READY) $(MODEL)/config.json ## Lint, type-check and run every test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p depthwire
	$(BIN)/mypy tests benchmarks tools
	$(BIN)/pytest -n 2 --dist loadfile -p no:randomly

lint: $(READY)  ## Lint and type-check only
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p depthwire
	$(BIN)/mypy tests benchmarks tools

bench: $(READY) $(MODEL)/config.json ## Print the figures of docs/benchmarks.md
	$(BIN)/python -m benchmarks.convert_cost
	$(BIN)/python -m benchmarks.lift_latency

clean:          ## Remove the environment, the caches and the outputs
	rm -rf $(VENV) .cache out build dist *.egg-info
