# Two commands for a newcomer: `make demo` and `make test`. Both make .venv from settings.ini first.
PYTHON ?= python3
BIN = .venv/bin/
PLAIN = tests tools benchmarks examples setup.py
export MPLBACKEND = agg

# Work on small images is done before a second thread has woken up; on a busy machine two threads wait for each other.
demo test test-slow: export OMP_NUM_THREADS = 1

.PHONY: demo test test-slow
demo: .venv/ready
	$(BIN)aoe_demo

# The tests run beside the notebooks, and say last what was skipped.
test: .venv/ready
	$(BIN)ruff check .
	$(BIN)ruff format --check $(PLAIN)
	@log=$$(mktemp); \
	$(BIN)pytest -q -n 2 --dist loadfile --durations=10 tests >$$log 2>&1 & tests=$$!; \
	$(BIN)nbdev_test --n_workers 2 --timing --do_print; notebooks=$$?; \
	wait $$tests; tests=$$?; \
	cat $$log; rm -f $$log; \
	test $$notebooks -eq 0 -a $$tests -eq 0

# What `make test` leaves out: tests that start many processes.
test-slow: .venv/ready
	$(BIN)pytest -q --slow -m slow --durations=10 tests

.venv/ready: settings.ini setup.py
	$(PYTHON) -m venv .venv
	$(BIN)python -m pip install -q --upgrade pip
	$(BIN)python -m pip install -q -e '.[dev]'
	$(BIN)python -m pip install -q --no-deps torchattacks
	touch $@

# The library's own tests beside the newest fastai, without nbdev, which does not go with it.
.PHONY: test-newest
test-newest: export OMP_NUM_THREADS = 1
test-newest: .venv-newest/ready
	.venv-newest/bin/python -m pytest -q -n 2 --dist loadfile tests $(patsubst %,--ignore tests/test_%.py,repo site install)

.venv-newest/ready: settings.ini setup.py
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install -q -e '.[ood,onnx,cluster]' ipywidgets pytest pytest-xdist hypothesis timm ruff
	.venv-newest/bin/python -m pip install -q --no-deps torchattacks
	touch $@

.PHONY: tidy readme site results slurm
tidy: .venv/ready
	$(BIN)nbdev_export
	$(BIN)python tools/collapse.py
	$(BIN)nbdev_clean
	$(BIN)ruff format -q $(PLAIN)

readme: .venv/ready
	$(BIN)python tools/readme.py

site: .venv/ready
	$(BIN)python tools/website.py

results: .venv/ready
	for o in cifar10 cifar100; do $(BIN)aoe_generate --data $$o --seed 1 --n 8 || exit 1; done
	for o in starts select grid hard second recipes best curve samples adv adv_mild kinds sensitive defects free sizes longer relatives populations_select populations past_select past adversaries; do $(BIN)aoe_run $$o || exit 1; done

# For tests/test_cluster.py, on Debian and Ubuntu; where it is missing that test is skipped.
slurm:
	command -v apt-get >/dev/null
	$(SUDO) apt-get update -qq
	$(SUDO) apt-get install -y -qq --no-install-recommends slurmctld slurmd slurm-client munge

SUDO = $(if $(filter-out 0,$(shell id -u)),sudo -n)
