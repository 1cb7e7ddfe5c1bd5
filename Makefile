# make demo   on a fresh machine: installs everything into .venv, trains two networks, compares them
# make test   the whole test suite
# make help   the other targets
#
# PYTHON=python3.12   the interpreter that .venv is made with
# VENV=.venv          where everything is installed; nothing outside it is touched
# TORCH=torch==2.13.0 what to install where .venv has no torch. PyPI's wheel for Linux may carry CUDA
#                     (gigabytes); the CPU's own: TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
# ARGS="--quick"      further arguments of demo, test, bench and verify
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
ARGS ?=

BIN := $(VENV)/bin
, := ,
PIP := $(BIN)/python -m pip --disable-pip-version-check
CXX_SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
# What the installation depends on; Python sources are installed editable and need no rebuild.
SOURCES := setup.py pyproject.toml CMakeLists.txt $(shell find csrc cmake -type f 2>/dev/null)

SANITIZE_TESTS := $(addprefix tests/test_,values.py gradients.py layouts.py bad_input.py isa.py)

.PHONY: help install demo test verify bench lint format test-sanitize clean

help:
	@echo "make demo           install into $(VENV), train two networks both ways, compare"
	@echo "make test           run the test suite"
	@echo "make verify         check every operator on this machine against float64"
	@echo "make bench          time the layers of ResNet-50 beside torch"
	@echo "make lint           ruff, clang-format, mypy;  make format rewrites the files"
	@echo "make test-sanitize  the kernel tests under AddressSanitizer and UBSan"
	@echo "make clean          remove $(VENV) and everything built"

install: $(VENV)/.installed

demo: install
	$(BIN)/torchops demo $(ARGS)

test: install
	$(BIN)/python -m pytest $(ARGS)

verify: install
	$(BIN)/torchops verify $(ARGS)

bench: install
	$(BIN)/torchops bench $(ARGS)

lint: $(VENV)/.linters
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)
	$(BIN)/mypy

format: $(VENV)/.linters
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

# Reads and writes out of bounds, uses after free, undefined arithmetic. There is no ThreadSanitizer
# run: it reports every hand-over between threads whose code it has not instrumented, which is
# torch's thread pool and libgomp, so all of them. What it would find here, two threads that write
# the same memory, shows as results that change with the thread count, and the tests compare those
# bit by bit.
SANITIZED := build/sanitized
test-sanitize: install
	TORCHOPS_SANITIZE=address,undefined $(PIP) install --no-build-isolation --no-deps --upgrade \
		--target $(SANITIZED) .
	PYTHONPATH=$(SANITIZED) ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1 \
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
		$(BIN)/pytest $(SANITIZE_TESTS) $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info torchops/*.so

# ---- installation: one stamp per step, so that each runs once ------------------------------

# $(call need,command that must succeed,what to say when it does not)
need = @$(1) >/dev/null 2>&1 || { printf '\ntorchops: %s\n\n' "$(2)" >&2; exit 1; }

$(VENV)/.created:
	$(call need,command -v $(PYTHON),there is no $(PYTHON). Type: apt-get install python3 python3-venv)
	$(call need,$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3$(,)10))',$(PYTHON) is \
		older than Python 3.10. Type: make $(MAKECMDGOALS) PYTHON=python3.12)
	$(call need,$(PYTHON) -c 'import venv$(,) ensurepip',$(PYTHON) cannot make virtual \
		environments. Type: apt-get install python3-venv)
	$(PYTHON) -m venv $(VENV)
	@touch $@

# setup.py's own checks come before the large download.
$(VENV)/.tools: $(VENV)/.created
	$(PIP) install "setuptools>=77" "cmake>=3.24" ninja "pybind11>=2.12"
	@$(BIN)/python -c "import setup; setup.find_compiler(); setup.find_python_headers()"
	@touch $@

$(VENV)/.torch: $(VENV)/.tools
	$(BIN)/python -c "import torch" 2>/dev/null || $(PIP) install $(TORCH)
	@touch $@

# Without build isolation, which would install cmake and ninja again for every build.
$(VENV)/.installed: $(VENV)/.torch $(SOURCES)
	$(PIP) install --no-build-isolation -e ".[bench,test]"
	@touch $@

$(VENV)/.linters: $(VENV)/.installed
	$(PIP) install --no-build-isolation -e ".[dev]"
	@touch $@
