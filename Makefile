# Every target is one thin command. `make demo` and `make test` need only python3 (3.10 or later) and a network.
VENV ?= .venv
PYTHON ?= python3
RUN := $(VENV)/bin/python
# A process of tests a core; waiting threads sleep, for a process has threads of its own.
PYTEST = OMP_WAIT_POLICY=passive $(RUN) -m pytest -q -n auto --maxprocesses 8
SOURCES := $(shell find csrc -type f) lic_fast/_build.py
OPS := $(basename $(notdir $(wildcard lic_fast/ops/[a-z]*.py)))

.PHONY: demo test native test-interpret compile-kernels fuzz gpu bench lint clean

demo: native
	$(RUN) -m lic_fast.benchmarks.demo

test: native
	$(PYTEST)
	$(MAKE) test-interpret

# A virtual environment with torch, then lic_fast in place with all that tests, training and benchmarks need.
$(VENV)/.installed: pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet "setuptools>=77" torch
	$(RUN) -m pip install --quiet --no-build-isolation --editable ".[dev]"
	touch $@

native: $(VENV)/.installed lic_fast/_build_info.json

# Builds what this machine can: C++ where there is a compiler, CUDA where there is an nvcc; the rest runs without.
lic_fast/_build_info.json: $(SOURCES) | $(VENV)/.installed
	$(RUN) -m lic_fast build --libraries auto

# Triton kernels on the CPU, in a process of their own: the interpreter has to be on before triton is imported.
test-interpret: native
	TRITON_INTERPRET=1 $(PYTEST) -k triton $(OPS:%=tests/test_%.py) $(wildcard tests/test_triton_*.py)

compile-kernels: native
	$(RUN) -m pytest -q tests/test_compile_kernels.py tests/test_packaging.py

# A million damaged streams through the decoders under sanitizers; `make test` has a tenth of it.
fuzz: native
	LIC_FAST_FUZZ_CASES=1000000 $(RUN) -m pytest -q -rs -s tests/test_rans_fuzz.py

bench: native
	$(RUN) -m lic_fast bench

# For a machine with a CUDA GPU, torch, nvcc, pytest and compressai, and no network: builds in place, tests, measures.
gpu: export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
gpu:
	$(PYTHON) -m lic_fast build --libraries cuda
	$(PYTHON) -m lic_fast doctor
	$(PYTHON) -m pytest -q --ignore=tests/test_packaging.py
	$(PYTHON) -m lic_fast bench --device cuda

lint: $(VENV)/.installed
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $(filter csrc/%,$(SOURCES)) $(wildcard tests/fuzz/*)

clean:
	rm -rf build dist demo *.egg-info lic_fast/*.so lic_fast/_build_info.json lic_fast/_build.log
