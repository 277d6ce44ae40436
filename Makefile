# make demo    set up, make the digits shards, learn an architecture on two processes, write the report
# make test    set up, then all tests, one more at a time than there are cores (9 at most)
# make gpu     time everything on a GPU for ten minutes, into benchmarks/results/ (BIN=/usr/bin: by the machine's own Python)
# make bench   time steps on the CPU beside the published formulation's and the bare convolutions, in a few minutes
# make lint    the linter and the formatter's check

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
MINUTES ?= 10
DIGITS := data/digits/index.json
# uv unpacks several gigabytes on all cores. It knows nothing of pip's own settings, such as another index, so that pip may have to.
PACKAGES := --quiet --constraint constraints.txt --editable '.[dev]'
export UV_SYSTEM_CERTS := true

.PHONY: setup demo test gpu bench lint format clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or later is needed: make PYTHON=python3.12" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	{ $(BIN)/python -m pip install --quiet --constraint constraints.txt uv && \
	  $(BIN)/uv pip install --python $(BIN)/python $(PACKAGES); } || $(BIN)/python -m pip install $(PACKAGES)
	touch $@

$(DIGITS): data_tools/digits.py data_tools/writing.py | $(VENV)/.installed
	$(BIN)/python -m data_tools.make_shards digits data/digits --overwrite

demo: setup $(DIGITS)
	$(BIN)/accelerate launch --config_file recipes/accelerate/ddp.yaml -m dnal_dist.train recipes/digits.yaml --overwrite

test: setup lint
	$(BIN)/python -m pytest -n auto --dist loadgroup --no-loadscope-reorder --durations 10

# Without setup: a machine with a GPU has a torch of its own, and perhaps no network.
gpu:
	$(BIN)/python benchmarks/gpu.py --minutes $(MINUTES) $(or $(OUT),"benchmarks/results/$$(nvidia-smi --query-gpu=name --format=csv,noheader | head -1 | tr ' ' '-')")

bench: setup
	$(BIN)/python benchmarks/steps.py --networks mobilenetv2 supernet --batch 4 --image-size 64 --seconds 3

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) data runs
