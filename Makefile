# Two commands do everything on a fresh clone: `make demo` and `make test`. Each creates .venv and installs into it first.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
OLDEST := .venv-oldest
# as many processes as there are processors (four at most: each loads torch), each with one thread: two teams of threads would be in each other's way
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --maxprocesses 4 --dist worksteal

.PHONY: demo demo-maskrcnn demo-photos test test-slow test-oldest lint docs bench figures horovod paper-models browser install clean

install: $(READY)

# made again when a version changes
$(READY): requirements.txt requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet -r requirements-dev.txt
	touch $(READY)

# trains, compresses, fine-tunes and evaluates a ResNet-18 on scikit-learn's digits; offline
demo: $(READY)
	$(PY) -m src.demo

# the same for Mask R-CNN on scenes composed of the digits; offline
demo-maskrcnn: $(READY)
	$(PY) -m src.demo.maskrcnn

# EfficientNet-Lite0 with its ImageNet weights, compressed to a size and calibrated with bundled photos; offline
demo-photos: $(READY)
	$(PY) -m src.demo.photos

# a page that classifies dropped pictures with the compressed digits network; needs npm, and onnxruntime-web from its registry (145 MB)
browser: $(READY)
	npm install --prefix examples/browser --no-fund --no-audit
	$(PY) -m examples.browser.prepare
	@echo "open http://127.0.0.1:8000/ (Ctrl-C ends)"
	@$(PY) -m http.server --bind 127.0.0.1 --directory examples/browser 8000

test: $(READY)
	$(PYTEST) -m "not slow"

test-slow: $(READY)
	$(PYTEST)

# the default tests with the lowest versions that pyproject.toml promises, in an environment of their own (about 7 GB)
test-oldest: $(OLDEST)/.ready
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -n auto --maxprocesses 4 --dist worksteal -m "not slow"

$(OLDEST)/.ready: pyproject.toml tools/oldest_versions.py
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --upgrade pip
	$(PYTHON) -m tools.oldest_versions > $(OLDEST)/requirements.txt
	$(OLDEST)/bin/python -m pip install --quiet -r $(OLDEST)/requirements.txt
	touch $(OLDEST)/.ready

# writes docs/settings.md from the schema of the settings
docs: $(READY)
	$(PY) -m tools.settings_reference

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

bench: $(READY)
	$(PY) -m benchmarks

figures: $(READY)
	$(PY) -m imgs.permutation
	$(PY) -m imgs.curves

# builds Horovod for the installed torch (minutes; the wheel is kept in ~/.cache/pqf) and installs it; says what it needs
horovod: $(READY)
	$(PY) -m tools.build_horovod

# downloads the six models of the paper's authors into compressed_models/ and verifies them
paper-models: $(READY)
	$(PY) -m src.paper_models

clean:
	rm -rf $(VENV) $(OLDEST) examples/browser/node_modules examples/browser/networks output build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
