# One line per verb. Every verb makes what it needs and is missing.
PYTHON ?= python3
VENV ?= .venv
EXTRA ?= cpu
MODEL ?= tiny-sdxl
WEIGHTS ?=
DTYPE ?= fp16
BACKEND ?= ort
STEPS ?= 1,2,4
BATCH ?= 1,4
DECODER ?= vae,taesd
PROMPT ?= a small red circle on a white background
OUT ?= image.png
PY = $(VENV)/bin/python
READY = $(VENV)/.ready-$(EXTRA)

.PHONY: install export sweep image test test-slow lint compare publish publish-check

install: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --constraint constraints.txt --editable '.[$(EXTRA),dev]'
	touch $@

export: $(READY)
	$(PY) -m export --model '$(MODEL)' $(if $(WEIGHTS),--weights '$(WEIGHTS)') --dtype $(DTYPE)

sweep: export
	$(PY) -m bench.sweep --model '$(MODEL)' $(if $(WEIGHTS),--weights '$(WEIGHTS)') --dtype $(DTYPE) --backend $(BACKEND) --steps $(STEPS) --batch $(BATCH) --decoder $(DECODER) $(SWEEP_FLAGS)

image: export
	$(PY) -m backends.generate '$(PROMPT)' --model '$(MODEL)' $(if $(WEIGHTS),--weights '$(WEIGHTS)') --dtype $(DTYPE) --backend $(BACKEND) --out '$(OUT)'

test: $(READY)
	$(PY) -m pytest -m 'not slow'

test-slow: $(READY)
	$(PY) -m pytest -m slow

lint: $(READY)
	$(PY) -m ruff check . && $(PY) -m ruff format --check . && $(PY) -m mypy

compare: $(READY)
	$(PY) -m bench.compare '$(BASE)' '$(HEAD)'

publish: $(READY)
	$(PY) -m bench.publish '$(RUN)'

publish-check: $(READY)
	$(PY) -m bench.publish --check
