# make demo: environment and the main job.  make test: environment and tests.  make bench: the table.
PYTHON ?= python3
unexport PYTHONDONTWRITEBYTECODE  # with it, each process of the tests compiles what it imports
RUN = .venv/bin/python
NUMERICAL = tests/test_zo.py tests/test_masks.py
LOOPS = tests/test_zo.py::test_the_fused_loop_is_one_on_all_threads \
  tests/test_zo.py::test_the_fused_loop_is_the_eager_one[dtype1] \
  tests/test_masks.py::test_compiled_masks_are_the_rules_own[ConstantMask]

.venv/ready: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --no-compile --disable-pip-version-check -r requirements-dev.txt
	touch $@

demo: .venv/ready
	$(RUN) train.py

# TESTS= for all: with what takes longer, unusual inputs, several workers, labs, studies, GPU day.
TESTS = --ignore tests/rehearsals
test: .venv/ready
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m pytest --numprocesses auto --dist worksteal $(TESTS)

# Noise and masks again, as on a CPU without vector instructions, with one loop of each sort.
test-default: .venv/ready
	ATEN_CPU_CAPABILITY=default $(RUN) -m pytest $(NUMERICAL) $(addprefix --deselect ,$(LOOPS))

bench: .venv/ready
	$(RUN) -m harness.bench --shape 134m --json bench-134m.json

mutants: .venv/ready
	$(RUN) -m tests.mutants

.PHONY: demo test test-default bench mutants
