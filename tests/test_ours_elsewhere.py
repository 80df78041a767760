"""A model that was pre-trained here, by the commands of the README, opens in transformers and in
llama.cpp, with the same ids and the same greedy text; so does one that began elsewhere."""
import json
import os
import random
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
from test_convert import CPU, TEMPLATES, folder, give, take  # noqa: F401, folder is a fixture
from test_tokenizer import TEXT, random_text

import convert
from demo.world import pt_document
from generate import replies
from plumbing.loading import load_model
from plumbing.vocabulary import PATTERNS

ROOT = Path(convert.__file__).parent
STARTS = ["Guhi's fruit is", "The job of Tifo", "帆岱的号码是", "资料：Guhi的",
          "a  b\n\n1984年, it's 3.5%!"]
SIZES = ("--n_layer=2 --n_embd=64 --n_head=4 --n_kv_head=2 --n_hidden=96 --max_seq_len=256 "
         "--tied=False --batch_size=8 --batch_tokens=2048 --max_steps=20 --warmup_steps=2 "
         "--compile=False --sample_every=0 --eval_every=20 --eval_tokens=300").split()


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """Twenty steps on documents of the demo's world, with the sizes of the demo's model made
    smaller: a folder, the model and its tokenizer."""
    folder, r = tmp_path_factory.mktemp("ours"), random.Random(0)
    documents = [pt_document(r, "train", 2, 3, 0.3)["text"] for _ in range(400)]
    (folder / "x.jsonl").write_text("".join(
        json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
    for script, *words in (
            ("tokenizer.py", f"--input={folder}/x.jsonl", "--vocab_size=400", f"--out={folder}/t"),
            ("data.py", f"--input={folder}/x.jsonl", f"--tokenizer={folder}/t",
             f"--out_dir={folder}/data", "--val_fraction=0.1", "--workers=1"),
            ("train_pt.py", f"--data_dir={folder}/data", f"--out_dir={folder}/pt", *SIZES)):
        subprocess.run([sys.executable, script, *words], cwd=ROOT, check=True, capture_output=True,
                       env={**os.environ, "OMP_NUM_THREADS": "1"})
    return folder, *load_model(str(folder / "pt"), CPU, torch.float32)


def strings() -> list[str]:
    r = random.Random(1)
    return [TEXT, *STARTS, *(random_text(r, 40) for _ in range(500))]


def test_in_transformers(ours):
    transformers = pytest.importorskip("transformers")
    folder, model, tok = ours
    assert tok.pattern == PATTERNS["qwen2"]
    give(folder / "pt", "hf", folder / "hf")
    words = transformers.AutoTokenizer.from_pretrained(folder / "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder / "hf")
    for text in strings():
        assert words(text, add_special_tokens=False).input_ids == tok.encode_ordinary(text)
    for text in STARTS:
        ids = tok.encode_ordinary(text)
        said = theirs.generate(torch.tensor([ids]), max_new_tokens=64, do_sample=False,
                               eos_token_id=None, pad_token_id=0)[0, len(ids):].tolist()
        assert said == replies(model, [ids], 64, temperature=0)[0]


def test_in_llama_cpp(ours):
    llama_cpp = pytest.importorskip("llama_cpp")
    folder, model, tok = ours
    give(folder / "pt", "gguf", folder / "x.gguf", "float32")
    theirs = llama_cpp.Llama(str(folder / "x.gguf"), n_ctx=256, n_threads=1, verbose=False)
    for text in strings():
        assert theirs.tokenize(text.encode(), add_bos=False) == tok.encode_ordinary(text), text
    for text in STARTS:
        ids = tok.encode_ordinary(text)
        theirs.reset()
        said = list(islice(theirs.generate(ids, temp=0.0, repeat_penalty=1.0), 64))
        assert said == replies(model, [ids], 64, temperature=0)[0]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", TEMPLATES)
def test_others_models_in_llama_cpp(family, tied, folder, tmp_path):  # noqa: F811
    """Random weights of transformers' classes, in here and out again to a GGUF file in fp32."""
    llama_cpp = pytest.importorskip("llama_cpp")
    take(folder(family, tied), tmp_path / "in")
    give(tmp_path / "in", "gguf", tmp_path / "x.gguf", "float32")
    model, tok = load_model(str(tmp_path / "in"), CPU, torch.float32)
    theirs = llama_cpp.Llama(str(tmp_path / "x.gguf"), n_ctx=256, n_threads=1, verbose=False)
    r = random.Random(2)
    for _ in range(5):
        text = TEXT[:20] + random_text(r, 20)
        ids = tok.encode_ordinary(text)
        theirs.reset()
        said = list(islice(theirs.generate(ids, temp=0.0, repeat_penalty=1.0), 64))
        assert said == replies(model, [ids], 64, temperature=0)[0]
