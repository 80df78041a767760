# make demo: a small bilingual model, from nothing to its first words.    make test: the tests.
# make reliability: what the scripts survive, into docs/reliability.md.
PY = .venv/bin/python

.PHONY: demo test reliability test-all lint
demo: .venv/ready
	$(PY) -m demo

test: .venv/ready
	$(PY) -m pytest

test-all: .venv/ready
	$(PY) -m pytest -m "slow or not slow"

lint: .venv/lint
	$(PY) -m ruff check
	$(PY) -m mypy

reliability: .venv/ready
	OMP_NUM_THREADS=1 $(PY) -m faults

.venv/ready: requirements.txt
	python3 -c "import sys; assert sys.version_info >= (3, 11), 'Python 3.11 or newer is needed'"
	python3 -m venv .venv
	$(PY) -m pip install --quiet -r requirements.txt
	touch .venv/ready

.venv/lint: .venv/ready pyproject.toml
	$(PY) -m pip install --quiet --editable '.[dev]'
	touch .venv/lint
