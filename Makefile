# Two commands for a newcomer: `make demo` and `make test`. Both make .venv from settings.ini first.
PYTHON ?= python3
BIN = .venv/bin/
export MPLBACKEND = agg

.PHONY: demo test
demo: .venv/ready
	$(BIN)aoe_demo

test: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)nbdev_test --n_workers 2 --timing
	$(BIN)pytest -q tests

.venv/ready: settings.ini setup.py
	$(PYTHON) -m venv .venv
	$(BIN)python -m pip install -q --upgrade pip
	$(BIN)python -m pip install -q -e '.[dev]'
	$(BIN)python -m pip install -q --no-deps torchattacks
	touch $@

.PHONY: readme site results
readme: .venv/ready
	$(BIN)python tests/readme.py

site: .venv/ready
	$(BIN)python tests/website.py

results: .venv/ready
	for o in cifar10 cifar100; do $(BIN)aoe_generate --data $$o --seed 1 --n 8 || exit 1; done
	for o in starts select grid hard second recipes best; do $(BIN)aoe_run $$o || exit 1; done
