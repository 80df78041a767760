# make demo         train a small bilingual model, from nothing to answers about your notes
# make test         run the tests; make test-all: the slow ones, too
# make lint         run ruff and mypy
# make reliability  break the scripts on purpose and write docs/reliability.md
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
