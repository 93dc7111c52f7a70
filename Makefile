# `make demo` and `make test` set up what they need, in .venv, the first time.
PYTHON ?= python3
RUN := .venv/bin/python

.PHONY: help setup demo synthetic proto golden check format test test-slow test-transformers test-lowest docs release clean

help:  ## what there is
	@grep -hE '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

setup: .venv/.ready-dev  ## a virtual environment with everything

.venv/.ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "moetier needs Python 3.11 or newer; name one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@echo "Setting up .venv, once: torch, transformers and the rest are downloaded, which takes some minutes." >&2
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --disable-pip-version-check --editable .
	@touch .venv/.ready

# the same environment with an extra of pyproject.toml: .venv/.ready-test has what the tests need
.venv/.ready-%: .venv/.ready
	$(RUN) -m pip install --quiet --disable-pip-version-check --editable ".[$*]"
	@touch $@

demo: .venv/.ready  ## convert the bundled model and generate with room for a quarter of its experts
	$(RUN) -m moetier demo
	@command -v moetier >/dev/null || echo "moetier is in .venv: type . .venv/bin/activate first."

# 45 GB: checkpoints, and stores of 4 bits beside them; tokens.json is what is written last
MODELS := mixtral-4L qwen3-8L fine-4L
synthetic: $(MODELS:%=build/synthetic/%-4bit/tokens.json)  ## models of large geometries with random weights, to measure with

build/synthetic/%-4bit/tokens.json: | .venv/.ready
	rm -rf build/synthetic/$* build/synthetic/$*-4bit
	$(RUN) -m moetier.tools.main synthetic build/synthetic/$* --geometry $* --store build/synthetic/$*-4bit

# of the oldest gRPC tools whose modules run with the newest protobuf, in an environment of their own as they need an
# older protobuf than that: what they write asks for their own version, so pyproject.toml's lowest ones are the same
PROTOC := build/protoc/bin/python

build/protoc/.ready: Makefile
	$(PYTHON) -m venv build/protoc
	$(PROTOC) -m pip install --quiet --disable-pip-version-check grpcio-tools==1.72.1
	@touch build/protoc/.ready

proto: build/protoc/.ready  ## generate proto/*_pb2*.py from the wire contract
	$(PROTOC) -m grpc_tools.protoc -I . --python_out=. --pyi_out=. --grpc_python_out=. moetier/proto/expert_store.proto

golden: .venv/.ready-test  ## write what commands say of faults to tests/tools/golden, which tests compare
	$(RUN) tests/helpers/error_texts.py

check: .venv/.ready-dev  ## lint, format, types
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

format: .venv/.ready-dev  ## put the code into its form
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

# Tests wait for other processes and for timeouts: five at once keep two processors busy. One that hangs where Python
# runs no signal handler ends its worker, with the stacks of all threads.
test: .venv/.ready-test  ## the tests, but for the slow ones
	$(RUN) -m pytest -n 5 --dist loadfile --no-loadscope-reorder --max-worker-restart 1 -o faulthandler_timeout=400 -o faulthandler_exit_on_timeout=true

test-slow: .venv/.ready-test  ## the slow tests: minutes and gigabytes
	$(RUN) -m pip install --quiet --disable-pip-version-check --editable ".[ray]"  # not for `make test`: 79 MB, and 40 packages
	$(RUN) -m pytest -m slow

# the rest is that of .venv; what differs between the two is in runtime/generation/compat.py
build/transformers/.ready: pyproject.toml tests/helpers/environments.py .venv/.ready-test
	rm -rf build/transformers
	$(RUN) tests/helpers/environments.py build/transformers 'transformers==5.23.*'
	@touch build/transformers/.ready

OF_TRANSFORMERS := tests/runtime/model/test_quantizer.py tests/runtime/model/test_load_generation.py tests/runtime/model/test_budgets.py \
	tests/runtime/kernels/layer/test_growing_cache.py tests/runtime/kernels/layer/test_paged_cache.py tests/runtime/engine tests/tools/serve/test_app.py tests/runtime/generation/test_decoding.py \
	$(foreach test,required required_in_fp32 no_type_is_skipped,tests/runtime/test_architectures.py::test_$(test))
test-transformers: build/transformers/.ready  ## with the older of the two minor versions of transformers, what it touches most
	build/transformers/bin/python -m pytest -n 2 $(OF_TRANSFORMERS)

# several gigabytes, unless an index of torch's CPU wheels is given (UV_EXTRA_INDEX_URL)
build/lowest/.ready: pyproject.toml
	rm -rf build/lowest
	$(PYTHON) -m venv build/lowest
	build/lowest/bin/python -m pip install --quiet --disable-pip-version-check uv
	build/lowest/bin/uv pip install --python build/lowest/bin/python --resolution lowest-direct --editable '.[test]'
	@touch build/lowest/.ready

test-lowest: build/lowest/.ready  ## the tests with the lowest version of each dependency's range
	build/lowest/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# what is wrong with a page, a link from one to another among it, ends it; every page anew, as warnings are not kept
docs: .venv/.ready-docs  ## build/docs/index.html: these pages as a site
	$(RUN) -m sphinx --fail-on-warning --keep-going --nitpicky --fresh-env --quiet docs build/docs
	@echo build/docs/index.html

release: .venv/.ready-release  ## build/dist: the wheel and the source package, checked; nothing is uploaded
	rm -rf build/dist
	$(RUN) -m build --outdir build/dist .
	$(RUN) -m twine check --strict build/dist/*
	$(RUN) -m check_wheel_contents build/dist/*.whl

clean:  ## everything that was made, the environment too
	rm -rf .venv build *.egg-info
