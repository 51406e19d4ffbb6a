# These do everything on a fresh machine: `make demo`, `make test`, `make bench` and `make chaos`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# `make bench QUICK=1` takes about 3 minutes instead of 20; ARGS adds options. The environments of
# the peers are made in .bench/ when they are first needed.
BENCH_ARGS = $(if $(QUICK),--size-mib 128 --repeat 3 --peers torch.save$(comma)dcp-async$(comma)lm-resiliency,)
comma := ,

.PHONY: demo test test-slow bench chaos docs lint clean

demo: $(STAMP)
	@$(BIN)/python -m examples.demo $(ARGS)

# WORKERS=2 takes a fifth less time on two cores; that every test bears the other worker's load is
# not shown yet. Each worker starts clusters of several hosts: more workers need more memory.
WORKERS ?= 0
test: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow $(ARGS)

bench: $(STAMP)
	@$(BIN)/python -m benchmarks $(if $(QUICK),compare,all) $(BENCH_ARGS) $(ARGS)

# Half an hour of faults; ARGS="--seed 7 --minutes 5 --scenario network" chooses others.
chaos: $(STAMP)
	@$(BIN)/python -m chaos --minutes 30 $(ARGS)

# The documentation as a site, in site/index.html; a broken link is an error.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Installs once; again only when what is asked for has changed.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) .bench site demo_out bench_out chaos_out
