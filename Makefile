# `make demo` and `make test` work on a fresh machine: Python 3.11 or newer, make, and a package index that pip can reach.

PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
WORKDIR ?= runs/demo
DEMO ?= hgrn2:tiny

# Each stamp is a set of packages installed; it is made anew when pyproject.toml or setup.py changes.
$(VENV)/base: pyproject.toml setup.py
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=...")'
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --editable .
	touch $@

$(VENV)/test: $(VENV)/base
	$(RUN) -m pip install --quiet --editable '.[test]'
	touch $@

# jax's CUDA plugin, of jax's own version, and ptxas, beside the environment: jax takes a plugin in it for a GPU.
build/gpu-compile: $(VENV)/test
	$(RUN) -c 'import jax; v = jax.__version__; print(f"jax-cuda13-plugin=={v}\njax-cuda13-pjrt=={v}\nnvidia-cuda-nvcc\nnvidia-nvvm")' \
	  | $(RUN) -m pip install --quiet --no-deps --target=$@ --requirement=/dev/stdin
	touch $@

.PHONY: demo test test-slow test-wheel test-gpu-compile test-gpu lint clean

# Train a tiny model on the embedded corpus, let it write, and say what it has learnt. HGRN2 is among the fastest families to
# learn from so few tokens, and to train (docs/benchmarks.md); DEMO=gla:tiny takes another.
demo: $(VENV)/base
	$(RUN) train.py --config=$(DEMO) --workdir=$(WORKDIR)
	$(RUN) -m zoo.generate --workdir=$(WORKDIR) --prompt='def main(' --max_tokens=300 --temperature=0.7 --seed=1
	$(RUN) -m zoo.evaluate --workdir=$(WORKDIR) --tasks=perplexity

test: lint
	JAX_PLATFORMS=cpu $(RUN) -m pytest -n 2 --dist worksteal --durations=10

# These run for longer than they compile: with LLVM's optimisations, which tests/conftest.py switches off.
# PART=3/16: one of sixteen parts, 0/16 to 15/16.
test-slow: $(VENV)/test
	JAX_PLATFORMS=cpu XLA_FLAGS=--xla_backend_optimization_level=3 $(RUN) -m pytest -n 2 -m slow --durations=10 --part=$(or $(PART),0/1)

# The wheel in an empty environment, outside the checkout: train, evaluate, generate, the example.
test-wheel: $(VENV)/test
	JAX_PLATFORMS=cpu $(RUN) -m pytest -m wheel

# Compile the Hopper kernels without a GPU (Linux; 500 MB of packages).
test-gpu-compile: build/gpu-compile
	PYTHONPATH=build/gpu-compile JAX_PLATFORMS=cpu $(RUN) -m pytest -m gpu_compile

# On a Hopper GPU, with jax[cuda13] in the environment: what holds its kernels to the references.
test-gpu: $(VENV)/test
	JAX_PLATFORMS=cuda,cpu XLA_FLAGS= XLA_PYTHON_CLIENT_PREALLOCATE=false $(RUN) -m pytest -n 8 \
	  tests/kernels/test_mosaic_gpu.py tests/kernels/test_delta_rule_gpu.py tests/kernels/test_dplr_delta_rule_gpu.py \
	  tests/kernels/test_selective_scan_gpu.py tests/kernels/test_selective_scan.py \
	  tests/kernels/test_attention.py tests/kernels/test_conformance.py

lint: $(VENV)/test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/lint-imports

clean:
	rm -rf $(VENV) runs build *.egg-info
