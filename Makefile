# The developer's interface. Every target sets up what it needs; `make` alone lists them.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
OUT    ?= demo_out
BUDGET ?= 540
JOBS   ?= $(shell nproc 2>/dev/null || echo 2)

NATIVE := $(shell find csrc -name '*.cpp' -o -name '*.h') CMakeLists.txt setup.py
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help setup demo examples test lint format sanitize gates bench gpu wheel picture clean

help:
	@echo "make demo      denoise a photographic sequence with the two attention operators; writes $(OUT)/"
	@echo "make examples  run examples/: SLR attention in diffusers networks and in one of your own"
	@echo "make test      the whole test suite"
	@echo "make lint      ruff, mypy, clang-format"
	@echo "make format    rewrite sources to the project's format"
	@echo "make sanitize  native tests under AddressSanitizer and UndefinedBehaviorSanitizer"
	@echo "make gates     compile the Triton kernels for every GPU without one, check and tabulate what they became"
	@echo "               (FULL=1: every launch, into gates/results/; GATES='--select fwd' for some)"
	@echo "make bench     measure against peers; writes bench/results/ (BENCH='--quick' for a smoke run)"
	@echo "make gpu       GPU tests and measurements with PYTHON as it is; writes OUT=build/gpu, stops after BUDGET"
	@echo "               seconds, goes on when called again (GPU=--dry tries the code on a CPU)"
	@echo "make wheel     build a wheel in isolation into dist/"
	@echo "make picture   make docs/contact_sheet.png, the README's picture, anew"
	@echo "make clean     remove everything that was built"

# One environment, from constraints.txt; made anew when the pins change.
$(VENV)/.installed: constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 10), "Python 3.10 or later is needed"'
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) cannot make virtual environments:" \
	  "install its venv module (Debian, Ubuntu: apt install python3-venv)."; exit 1; }
	@$(PYTHON) -c 'import os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")' 2>/dev/null || \
	  { echo "Python.h of $(PYTHON) is missing: install its headers (Debian, Ubuntu: apt install python3-dev)."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -c constraints.txt torch numpy "setuptools>=77" cmake ninja pybind11 \
	  av opencv-python-headless pillow tqdm pytest pytest-timeout pytest-benchmark hypothesis scikit-image \
	  torchmetrics diffusers transformers accelerate safetensors triton ruff mypy clang-format
	@touch $@

# The package itself, editable; rebuilt when a native source changes. ZSVR_NATIVE=1: without its kernels there
# would be nothing to show or to test, so a build that fails ends here.
$(VENV)/.built: $(VENV)/.installed $(NATIVE)
	ZSVR_NATIVE=1 $(BIN)/python -m pip install -q --no-deps --no-build-isolation -e .
	@touch $@

setup: $(VENV)/.built

demo: setup
	$(BIN)/python -m zsvr_kernels.demo --overwrite $(OUT)

examples: setup
	for script in examples/*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

# Triton's interpreter must be chosen before Triton is imported: a process of its own.
test: setup
	$(BIN)/python -m pytest -q $(TESTS)
	$(if $(TESTS),,TRITON_INTERPRET=1 $(BIN)/python -m pytest -q tests/triton)

lint: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.cpp' '*.h')

format: $(VENV)/.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $$(git ls-files '*.cpp' '*.h')

sanitize: $(VENV)/.installed
	PATH="$(abspath $(BIN)):$$PATH" cmake -S . -B build/sanitize -GNinja -DCMAKE_BUILD_TYPE=Release \
	  -DZSVR_SANITIZE=address,undefined -DZSVR_BUILD_TESTS=ON -DZSVR_BUILD_MODULE=OFF
	PATH="$(abspath $(BIN)):$$PATH" cmake --build build/sanitize -j $(JOBS)
	PATH="$(abspath $(BIN)):$$PATH" ctest --test-dir build/sanitize --output-on-failure

# A second release of Triton, alone: kernels are compiled with the one that GPU machines have, too.
build/triton-%/.installed: gates/constraints-%.txt
	$(PYTHON) -m venv --clear build/triton-$*
	build/triton-$*/bin/python -m pip install -q -c gates/constraints-$*.txt triton
	@touch $@

gates: $(VENV)/.installed build/triton-3.6/.installed
	$(BIN)/python -m gates $(if $(FULL),--full --out gates/results) $(GATES)

bench: setup
	$(BIN)/python -m bench $(BENCH)

# With the Python that is there, as it is: a machine with a GPU may have no network.
gpu:
	@$(PYTHON) -m bench.gpu --out "$(if $(filter file,$(origin OUT)),build/gpu,$(OUT))" --budget $(BUDGET) $(GPU)

wheel: $(VENV)/.installed
	$(BIN)/python -m pip wheel -q --no-deps -w dist .

picture: setup
	$(BIN)/python -m zsvr_kernels.demo --overwrite --no-timing $(OUT)
	mkdir -p docs
	cp $(OUT)/contact_sheet.png docs/contact_sheet.png

clean:
	rm -rf $(VENV) build dist demo_out *.egg-info python/*.egg-info zsvr_kernels/*.so zsvr_kernels/_native_build.txt
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
