# Every target sets up what it needs: a virtual environment with pinned versions, and the demo's trained model.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
MODEL  := .cache/models/smollm2-135m-instruct
TEXT   := tests/data/sotu-2000.txt
OUT    ?= out/smollm2-block8

# The library of kernels: cmake of the system, or pip's; headers of ONNX Runtime fetched once.
CMAKE   := $(or $(shell command -v cmake),$(BIN)/cmake)
ORT_INCLUDE_DIR ?= .cache/onnxruntime-headers/0.4.9
NATIVE  := $(CMAKE) -S runtime/native -DORT_INCLUDE_DIR=$(abspath $(ORT_INCLUDE_DIR))
# The runners without Python; ONNX Runtime's library is the Python wheel's unless ORT_LIBRARY names another.
RUNNER  := $(CMAKE) -S runtime/deploy/cpp -DORT_INCLUDE_DIR=$(abspath $(ORT_INCLUDE_DIR))
ORT_LIBRARY ?= $(shell ls $(CURDIR)/$(VENV)/lib/python3*/site-packages/onnxruntime/capi/libonnxruntime.so.* 2>/dev/null)

# A server for the tests of work on a device: the system's, or one that is unpacked and not installed.
SSHD    := .cache/sshd/path

.PHONY: help setup model native native-asan native-aarch64 runner test-native wheels demo test lint bench clean

help:           ## Show this list
	@grep -E '^[a-z0-9-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 12

setup: $(READY) native ## Make the virtual environment and build the kernels

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[hf,rtx,dev]'
	touch $(READY)

model: $(MODEL)/config.json ## Fetch the trained model of the demo and the tests (93 MB)

$(MODEL)/config.json: | $(READY)
	$(BIN)/python tools/fetch_smollm2.py

native: $(ORT_INCLUDE_DIR)/onnxruntime_c_api.h $(CMAKE) ## Build the kernels for ONNX Runtime
	$(NATIVE) -B .cache/native/release -DCMAKE_BUILD_TYPE=Release -DDEPTHWIRE_LIBRARY_DIR=$(CURDIR)/runtime/native/lib
	$(CMAKE) --build .cache/native/release --parallel

native-asan: $(ORT_INCLUDE_DIR)/onnxruntime_c_api.h $(CMAKE) ## Build them with the address and undefined-behaviour sanitizers
	$(NATIVE) -B .cache/native/asan -DCMAKE_BUILD_TYPE=RelWithDebInfo -DDEPTHWIRE_SANITIZE=ON
	$(CMAKE) --build .cache/native/asan --parallel

native-aarch64: $(ORT_INCLUDE_DIR)/onnxruntime_c_api.h $(CMAKE) ## Build them for aarch64 (Debian: g++-aarch64-linux-gnu)
	$(NATIVE) -B .cache/native/aarch64 -DCMAKE_BUILD_TYPE=Release \
	    -DCMAKE_TOOLCHAIN_FILE=$(CURDIR)/runtime/native/aarch64.cmake
	$(CMAKE) --build .cache/native/aarch64 --parallel
	$(RUNNER) -B .cache/native/runner-aarch64 -DCMAKE_BUILD_TYPE=Release \
	    -DCMAKE_TOOLCHAIN_FILE=$(CURDIR)/runtime/native/aarch64.cmake
	$(CMAKE) --build .cache/native/runner-aarch64 --parallel

runner: $(READY) native ## Build depthwire_run, which runs an artefact without Python; a second one with sanitizers
	$(RUNNER) -B .cache/native/runner -DCMAKE_BUILD_TYPE=Release -DORT_LIBRARY=$(ORT_LIBRARY)
	$(CMAKE) --build .cache/native/runner --parallel
	$(RUNNER) -B .cache/native/runner-asan -DCMAKE_BUILD_TYPE=Debug -DORT_LIBRARY=$(ORT_LIBRARY) -DDEPTHWIRE_SANITIZE=ON
	$(CMAKE) --build .cache/native/runner-asan --parallel

wheels: $(READY) $(ORT_INCLUDE_DIR)/onnxruntime_c_api.h $(CMAKE) ## Build the wheels: x86-64 and aarch64 with kernels, and without
	$(BIN)/python -m pip install --quiet --constraint constraints.txt auditwheel ziglang
	$(BIN)/python tools/build_wheels.py -o dist
	for wheel in dist/*manylinux*.whl; do $(BIN)/python -m auditwheel show $$wheel || exit 1; done

test-native: $(READY) native native-asan runner ## Run only the tests of the C++ code
	$(BIN)/pytest -p no:randomly tests/runtime/native tests/runtime/deploy/test_cpp_runner.py tests/runtime/deploy/test_cpp_tensorrt.py

.cache/onnxruntime-headers/0.4.9/onnxruntime_c_api.h:
	$(PYTHON) tools/fetch_ort_headers.py

$(SSHD):
	$(PYTHON) tools/fetch_sshd.py

# TensorRT's plugin code in Python and its stubs, for the tests: no TensorRT.
.cache/tensorrt-python: | $(READY)
	$(BIN)/python tools/fetch_tensorrt_python.py

$(BIN)/cmake: | $(READY)
	$(BIN)/python -m pip install --quiet cmake

demo: $(READY) $(MODEL)/config.json native ## Convert SmolLM2-135M to Block AttnRes, verify it, build an RTX engine
	$(BIN)/depthwire convert $(MODEL) --attn-res block:8 --batch 1 --seq-len 512 --text $(TEXT) --windows 4 \
	    --target rtx --cc SM86 --cc SM120 -o $(OUT)

test: $(READY) $(MODEL)/config.json $(SSHD) .cache/tensorrt-python native native-asan runner ## Lint, type-check and run every test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p depthwire
	$(BIN)/mypy tests benchmarks tools examples
	$(BIN)/pytest -n 2 --dist loadfile -p no:randomly

lint: $(READY)  ## Lint and type-check only
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p depthwire
	$(BIN)/mypy tests benchmarks tools examples

bench: $(READY) $(MODEL)/config.json native ## Print the figures of docs/benchmarks.md
	$(BIN)/python -m benchmarks.convert_cost
	$(BIN)/python -m benchmarks.lift_latency
	$(BIN)/python -m benchmarks.native_reads
	$(BIN)/python -m benchmarks.native_routing
	$(BIN)/python -m benchmarks.attn_res_overhead
	$(BIN)/python -m benchmarks.routing_speed
	$(BIN)/python -m benchmarks.pass_scaling

clean:          ## Remove the environment, the caches and the outputs
	rm -rf $(VENV) .cache out build dist runtime/native/lib *.egg-info
