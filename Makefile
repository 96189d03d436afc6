# make test: environment and tests.  make demo: environment and the main job.  make bench: the table.
PYTHON ?= python3
RUN = .venv/bin/python

.venv/ready: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

demo: .venv/ready
	$(RUN) train.py

test: .venv/ready
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m pytest --numprocesses auto --dist worksteal

bench: .venv/ready
	$(RUN) bench.py --shape 134m --json bench-134m.json

mutants: .venv/ready
	$(RUN) tests/mutants.py

.PHONY: demo test bench mutants
