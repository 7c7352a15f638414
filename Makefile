# Two commands do all the set-up: `make demo` and `make test`. Every target sets up .venv by itself.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.14 python3; do if $$p -c 'import sys; sys.exit(not ((3, 11) <= sys.version_info[:2] <= (3, 14)))' 2>/dev/null; then echo $$p; break; fi; done)
VENV ?= .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= true

.PHONY: install demo test test-all test-page test-engines lint format bench size gpu-check clean

install: $(VENV)/.installed

# Without an NVIDIA card torch comes from PyTorch's own index, without CUDA: 200 MB instead of several GB.
TORCH_INDEX ?= $(shell command -v nvidia-smi >/dev/null || test -n "$$PIP_FIND_LINKS" || test "$$(uname)" = Darwin || echo --extra-index-url https://download.pytorch.org/whl/cpu)
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

$(VENV)/.runs: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "argonne needs Python 3.11 to 3.14; none was found. Set PYTHON=/path/to/python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH_INDEX) torch
	$(PIP) --editable .
	@touch $@

$(VENV)/.installed: $(VENV)/.runs
	$(PIP) --editable '.[dev]'
	@touch $@

# Takes nothing that only developing needs.
demo: $(VENV)/.runs
	$(BIN)/argonne demo --out demo

# Two tests at a time, with one thread each: a test of several ranks uses both cores alone.
test: install lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

test-all: install lint
	$(BIN)/python -m pytest -m 'not gpu and not browser'

# The chat page and the report in Debian's Chromium, with axe's accessibility rules; both are fetched where they are missing.
AXE := axe-core@4.14.1
test-page: install .cache/axe.min.js /usr/bin/chromium
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m browser

.cache/axe.min.js: Makefile
	mkdir -p .cache
	cd .cache && tar xzf "$$(npm pack --silent $(AXE))" --strip-components=1 package/axe.min.js && rm *.tgz && touch axe.min.js

/usr/bin/chromium:
	apt-get install --yes chromium

# Exports in every engine, and the matrix of docs/exports.md. Each environment stands on .venv and is kept between runs;
# so is the wheel of llama.cpp, which takes minutes to build.
LOWEST := $(shell sed -n 's/.*"transformers>=\([0-9.]*\)".*/\1/p' pyproject.toml)
IN_ENGINES := -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
test-engines: .engines/all/.installed .engines/lowest/.installed .engines/newest/bin/python
	.engines/newest/bin/python -m pip install --quiet --disable-pip-version-check --upgrade transformers
	OMP_NUM_THREADS=1 .engines/all/bin/python -m benchmarks.engines --write \
		--transformers .engines/lowest/bin/python .engines/newest/bin/python
	OMP_NUM_THREADS=1 .engines/all/bin/python -m pytest tests/publish tests/benchmarks/test_engines.py

.engines/%/bin/python: $(VENV)/.installed
	$(BIN)/python -m venv .engines/$*
	echo "import site; site.addsitedir('$$($(BIN)/python -c 'import site; print(site.getsitepackages()[0])')')" \
		> $$($@ -c 'import site; print(site.getsitepackages()[0])')/argonne.pth
	touch $@

.engines/all/.installed: .engines/all/bin/python benchmarks/engines.txt
	$< -c 'import llama_cpp' 2> /dev/null || ls .engines/wheels/$$(sed -n 's/^llama-cpp-python==/llama_cpp_python-/p' benchmarks/engines.txt)-*.whl \
		|| CMAKE_ARGS="-DLLAVA_BUILD=OFF -DMTMD_BUILD=OFF" $< -m pip wheel --no-deps --wheel-dir .engines/wheels $$(grep ^llama-cpp-python benchmarks/engines.txt)
	mkdir -p .engines/wheels
	$< $(IN_ENGINES) --find-links .engines/wheels --requirement benchmarks/engines.txt
	touch $@

.engines/lowest/.installed: .engines/lowest/bin/python pyproject.toml
	$< -m pip install --quiet --disable-pip-version-check 'transformers==$(LOWEST).*'
	touch $@

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install
	$(BIN)/python -m benchmarks.all

size: install
	$(BIN)/python -m tools.size

# On a machine with CUDA. PYTHON_GPU may name an interpreter that has its own torch and transformers.
PYTHON_GPU ?= $(BIN)/python
gpu-check:
	PYTHONPATH=. $(PYTHON_GPU) -m pytest -m gpu tests
	PYTHONPATH=. $(PYTHON_GPU) -m benchmarks.train_step --gpu

clean:
	rm -rf $(VENV) build demo *.egg-info
