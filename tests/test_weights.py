"""Files of weights are made by strangers: what is damaged or evil ends in one line, nothing is
allocated for it, and no checkpoint is left."""
import json
import pickle
import random
import resource
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from test_convert import TEMPLATES, folder, give, take  # noqa: F401, folder is a fixture

import convert
from plumbing import weights
from plumbing.weights import Stored

MANY = 1 << 60


def refused(monkeypatch, capsys, source, out, *args) -> str:
    """The one line with which convert.py ends; it took no memory, and left nothing."""
    monkeypatch.setattr("sys.argv", ["convert.py", f"--input={source}", f"--out_dir={out}", *args])
    capsys.readouterr()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(SystemExit) as stop:
        convert.main()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 20_000  # kB
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and error.startswith(str(source)), error
    assert not list(Path(out).glob("*.pt")) and not list(Path(out).glob(".tmp*"))
    return error


def safetensors(header: dict | bytes, numbers: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + numbers


@pytest.fixture
def one_file(folder, tmp_path):  # noqa: F811
    """A Hugging Face folder with all weights in model.safetensors, its header and its numbers."""
    take(folder("qwen2"), tmp_path / "good")
    give(tmp_path / "good", "hf", tmp_path / "hf")
    raw = (tmp_path / "hf" / "model.safetensors").read_bytes()
    n = 8 + struct.unpack("<Q", raw[:8])[0]
    return tmp_path / "hf", json.loads(raw[8:n]), raw[n:]


def entry(header: dict, name: str = "model.norm.weight", **change) -> dict:
    return {**header, name: {**header[name], **change}}


@pytest.mark.parametrize("make, why", [
    (lambda h, b: safetensors(h, b)[:-1], "ends after the end of the file: cut short?"),
    (lambda h, b: safetensors(h, b)[:100], "not a safetensors file, or cut short"),
    (lambda h, b: b"", "not a safetensors file, or cut short"),
    (lambda h, b: safetensors(h, b, MANY), "not a safetensors file, or cut short"),
    (lambda h, b: pickle.dumps({"norm": 1}), "not a safetensors file, or cut short"),
    (lambda h, b: safetensors(b"[" * 100_000, b), "recursion"),
    (lambda h, b: safetensors(b"[]", b), "'list' object has no attribute"),
    (lambda h, b: safetensors(entry(h, shape=[MANY]), b), "has the shape"),
    (lambda h, b: safetensors(entry(h, shape=[64, -1]), b), "has the shape"),
    (lambda h, b: safetensors(entry(h, shape=[32, 2, 1]), b), "has the shape"),
    (lambda h, b: safetensors(entry(h, shape=[63]), b), "has 256 bytes for the shape [63]"),
    (lambda h, b: safetensors(entry(h, data_offsets=[-256, 0]), b), "has the shape|bytes for"),
    (lambda h, b: safetensors(entry(h, data_offsets=[0, 256]), b), "overlaps another tensor"),
    (lambda h, b: safetensors(entry(h, dtype="I64"), b), "of the type 'I64'"),
    (lambda h, b: safetensors(entry(h, "model.embed_tokens.weight", shape=[64, 420]), b),
     "embed_tokens.weight is (64, 420), and should be (420, 64)"),
    (lambda h, b: safetensors({k: v for k, v in h.items() if "norm.weight" not in k}, b),
     "layernorm.weight is not there, and should be (64,)"),
    (lambda h, b: safetensors(h, b[:-4] + np.float32(np.nan).tobytes()), "not finite"),
    (lambda h, b: safetensors(h, b[:-4] + np.float32(np.inf).tobytes()), "not finite")])
def test_an_evil_safetensors_file(make, why, one_file, tmp_path, monkeypatch, capsys):
    where, header, numbers = one_file
    (where / "model.safetensors").write_bytes(make(header, numbers))
    line = refused(monkeypatch, capsys, where, tmp_path / "out")
    assert any(part in line for part in why.split("|")), line


@pytest.mark.parametrize("weight_map, why", [
    ({"a": "../model.safetensors"}, "its index names files outside the folder"),
    ({"a": "/etc/x.safetensors"}, "its index names files outside the folder"),
    ({"a": "model.bin"}, "its index names files outside the folder"),
    ({"a": "other.safetensors"}, "No such file"),
    ({"a": ["model.safetensors"]}, "its index names files outside the folder"),
    (None, "does not say 'weight_map'")])
def test_an_evil_index(weight_map, why, one_file, tmp_path, monkeypatch, capsys):
    where = one_file[0]
    index = {} if weight_map is None else {"weight_map": weight_map}
    (where / "model.safetensors.index.json").write_text(json.dumps(index))
    assert why in refused(monkeypatch, capsys, where, tmp_path / "out")


@pytest.mark.parametrize("name, content, why", [
    ("config.json", "{", "damaged"), ("config.json", "[]", "damaged"),
    ("config.json", '{"architectures": ["Qwen2ForCausalLM"]}', "does not say 'hidden_size'"),
    ("config.json", {"num_hidden_layers": MANY}, "says that it has"),
    ("config.json", {"num_hidden_layers": 3}, "is not there, and should be"),
    ("config.json", {"hidden_size": "64"}, ""), ("config.json", {"num_attention_heads": 0}, ""),
    ("config.json", {"vocab_size": MANY}, "should be"),
    ("tokenizer.json", "[" * 100_000, "damaged"), ("tokenizer.json", "{}", "does not say 'model'"),
    ("tokenizer.json", {"model": {"type": "Unigram"}}, "not a byte-level BPE"),
    ("tokenizer.json", {"normalizer": {"type": "Lowercase"}}, "changes the text first"),
    ("tokenizer_config.json", {"chat_template": "{{ messages.pop() }}"}, "its chat template"),
    ("tokenizer_config.json", {"chat_template": "{% for"}, "its chat template cannot be read"),
    ("tokenizer_config.json", {"chat_template": "{{ ''.__class__.__mro__ }}"}, "its chat template"),
    ("tokenizer_config.json", {"chat_template": "[INST]{{ messages[0].content }}"}, "")])
def test_evil_settings(name, content, why, one_file, tmp_path, monkeypatch, capsys):
    path = one_file[0] / name
    path.write_text(content if isinstance(content, str) else json.dumps(
        json.loads(path.read_text()) | content))
    assert why in refused(monkeypatch, capsys, one_file[0], tmp_path / "out")


def test_merges_that_tiktoken_would_not_follow(one_file, tmp_path, monkeypatch, capsys):
    """Ids in another order than the merges; and a token that is listed as made of other parts."""
    path = one_file[0] / "tokenizer.json"
    whole = json.loads(path.read_text())
    good = whole["model"]["merges"]
    long = next(i for i, (a, b) in enumerate(good) if len(a + b) > 2 and len(a) > 1)
    a, b = good[long]
    for merges in (good[::-1], good[1:],
                   [*good[:long], [a[0], a[1:] + b], *good[long + 1:]]):
        whole["model"]["merges"] = merges
        path.write_text(json.dumps(whole))
        assert "do not follow the order of its merges" in refused(
            monkeypatch, capsys, one_file[0], tmp_path / "out")


def test_an_evil_gguf_file(folder, tmp_path, monkeypatch, capsys):  # noqa: F811
    """Cut anywhere, with counts and lengths of 2^60 anywhere in its header, or renamed."""
    pytest.importorskip("gguf")
    take(folder("llama"), tmp_path / "good")
    give(tmp_path / "good", "gguf", tmp_path / "good.gguf", "float32")
    raw, bad, r = (tmp_path / "good.gguf").read_bytes(), tmp_path / "bad.gguf", random.Random(0)
    _, tensors = weights.read_gguf(tmp_path / "good.gguf")
    start = min(t.start for t in tensors.values())
    cuts = 0, 3, 20, len(raw) - 33, *(r.randrange(len(raw)) for _ in range(40))
    cases = [raw[:n] for n in cuts]
    for i in (8, 16, *(r.randrange(24, start - 8) for _ in range(150))):
        cases.append(raw[:i] + struct.pack("<Q", MANY) + raw[i + 8:])
    cases += [b"GGML" + raw[4:], raw[:4] + struct.pack("<I", 9) + raw[8:],
              raw[:start] + b"\xff" * (len(raw) - start)]
    for case in cases:
        bad.write_bytes(case)
        try:
            weights.read_gguf(bad)
        except ValueError:
            pass  # else the change is in a text, or meets the checks that follow
        else:
            continue
        refused(monkeypatch, capsys, bad, tmp_path / "out")
    bad.write_bytes(cases[-1])
    assert "not finite" in refused(monkeypatch, capsys, bad, tmp_path / "out")
    (tmp_path / "hf").mkdir()
    (tmp_path / "good.gguf").rename(tmp_path / "hf" / "model.safetensors")
    assert "config.json" in refused(monkeypatch, capsys, tmp_path / "hf", tmp_path / "out")


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K"])
def test_rows_of_a_packed_matrix_are_those_of_the_gguf_package(name, tmp_path):
    """Read in pieces, into rows that may be more than the file has."""
    gguf = pytest.importorskip("gguf")
    kind = gguf.GGMLQuantizationType[name]
    per_block, width = gguf.GGML_QUANT_SIZES[kind]
    blocks = np.random.default_rng(0).integers(0, 60, (5000, 2 * width), np.uint8)
    blocks.tofile(tmp_path / "x")
    stored = Stored(tmp_path / "x", 0, (5000, 2 * per_block), int(kind))
    out = torch.empty(5002, 2 * per_block)
    stored.read(out)
    assert torch.equal(out[:5000], torch.from_numpy(gguf.dequantize(blocks, kind)))
    assert torch.equal(out[5000:], out[4999].expand(2, -1))


def test_other_programs_read_what_is_written(tmp_path):
    library = pytest.importorskip("safetensors.torch")
    made = {"a": torch.randn(3, 5), "b": torch.randn(7)}
    weights.write_safetensors(tmp_path / "x", {k: tuple(t.shape) for k, t in made.items()},
                              torch.bfloat16, made.__getitem__)
    for name, t in library.load_file(tmp_path / "x").items():
        assert torch.equal(t, made[name].bfloat16())
    library.save_file(made, tmp_path / "y")
    for name, stored in weights.read_safetensors(tmp_path / "y").items():
        out = torch.empty(made[name].shape)
        stored.read(out)
        assert torch.equal(out, made[name])


def test_what_is_stopped_half_way_leaves_nothing(one_file, tmp_path, monkeypatch):
    """Ctrl-C, or a full disk, while a model comes in or goes out. Seen to fail when only OSError
    was heard, and when the files for others were written under their own names."""
    for error in (KeyboardInterrupt, OSError(28, "No space left on device")):
        def read(self, out, reads=[]):  # noqa: B006, counts the calls
            reads.append(out)
            if len(reads) == 3:
                raise error
        with monkeypatch.context() as patch:
            patch.setattr(Stored, "read", read)
            with pytest.raises((KeyboardInterrupt, OSError)):
                take(one_file[0], tmp_path / "half")
        assert not list((tmp_path / "half").iterdir())
        for to in ("hf", "gguf"):
            target = tmp_path / f"half.{to}"
            with monkeypatch.context() as patch:
                patch.setattr(weights, "packed", lambda *_: (_ for _ in ()).throw(error))
                patch.setattr(weights.struct, "pack", lambda *_: (_ for _ in ()).throw(error))
                with pytest.raises((KeyboardInterrupt, OSError)):
                    give(tmp_path / "good", to, target)
            left = [target] if to == "gguf" else target.glob("*safetensors*")
            assert not any(path.exists() for path in left)
