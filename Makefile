# make demo: a small bilingual model, from nothing to its first words.    make test: the tests.
PY = .venv/bin/python

.PHONY: demo test
demo: .venv/ready
	$(PY) demo.py

test: .venv/ready
	$(PY) -m pytest

.venv/ready: requirements.txt
	python3 -c "import sys; assert sys.version_info >= (3, 11), 'Python 3.11 or newer is needed'"
	python3 -m venv .venv
	$(PY) -m pip install --quiet -r requirements.txt
	touch .venv/ready
