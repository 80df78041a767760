"""For every test: the repository on sys.path, and one thread, so that sums round the same way."""
import io
import json
import os
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import rag  # noqa: E402
from demo import world as toyworld  # noqa: E402
from model import ModelConfig, Transformer  # noqa: E402
from plumbing import checkpoint, runtime  # noqa: E402
from tokenizer import HAN_PATTERN, Tokenizer, dump  # noqa: E402

torch.set_num_threads(1)
if not torch.cuda.is_available():  # before anyone imports Triton: then its kernels run on a CPU
    os.environ["TRITON_INTERPRET"] = "1"
# --dtype=auto is float32 on every CPU, and so are the figures; the first name still measures
multiplies_bf16, runtime.multiplies_bf16 = runtime.multiplies_bf16, lambda: 0.0
# `make test &` starts us deaf to Ctrl-C, and our children inherit that; the tests of Ctrl-C do not
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def plain_signals():
    """A stage trained in this process leaves its handlers, and the next fork would have them. What
    a fixture of a whole file trains is trained before this, so they are set, not put back."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> SimpleNamespace:
    """What the later stages start from: a byte-level checkpoint of stage pt with random weights
    (`pt`), its tokenizer and model, and a folder with chats, pairs and prompts of the toy world."""
    folder = tmp_path_factory.mktemp("tiny")
    tok = Tokenizer(dump([bytes([i]) for i in range(256)], HAN_PATTERN))
    torch.manual_seed(0)
    config = ModelConfig(tok.n_vocab, 2, 2, 1, 32, 16, 64, 256)
    model = Transformer(config)
    for p in model.parameters():
        p.data *= 2  # random weights that say something
    checkpoint.save(str(folder / "pt"), 0, {
        "format": 1, "kind": "pt", "step": 0, "model": model.state_dict(), "optimizer": [],
        "model_config": asdict(config), "config": {}, "tokenizer": tok.text})
    r = Random(0)
    for name, make in (("chat", toyworld.chat), ("pairs", toyworld.pair),
                       ("prompts", toyworld.rl_prompt)):
        rows = [make(r, "train", 1) for _ in range(120)]
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return SimpleNamespace(folder=folder, pt=str(folder / "pt"), tok=tok, model=model,
                           chat=str(folder / "chat.jsonl"), pairs=str(folder / "pairs.jsonl"),
                           prompts=str(folder / "prompts.jsonl"))


@pytest.fixture
def rag_py(monkeypatch, capsys):
    """rag.py in this process: (exit code, stdout, stderr)."""
    def call(*arguments, stdin=""):
        monkeypatch.setattr(sys, "argv", ["rag.py", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        code = 0
        try:
            rag.main()
        except SystemExit as exit_:
            code = exit_.code or 0
        return code, *capsys.readouterr()
    return call


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    """Toy data, and runs of the five stages in forked children; on Linux."""
    from lab import Lab
    return Lab(tmp_path_factory.mktemp("lab"))


@pytest.fixture
def full() -> bool:
    """Whether `python -m faults` wants the numbers of docs/reliability.md."""
    return "KILLS" in os.environ


@pytest.fixture
def measured():
    """What a row of the fault board has found, for the board, and whether that is as promised."""
    def tell(what: str, good: bool) -> None:
        print(f"\nmeasured: {what}")
        assert good, what
    return tell
