"""The tokenizer: trained as a naive trainer would, cut and merged as tiktoken does, never forged."""
import gzip
import itertools
import json
import pickle
import random
import time
import unicodedata
from collections import Counter
from pathlib import Path

import pytest
import regex
import tiktoken

import tokenizer
from tokenizer import (CHAR_PATTERN, PATTERN, SPECIALS, StreamDecoder, Tokenizer, count_pieces,
                       dump, load_tokenizer, render, train_bpe, train_char)

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
TEXT = ("The cat sat on the mat, and the other cat didn't: it's 1,234 miles away.\n\n"
        "    那只猫坐在垫子上，另一只猫没有；它离这里有1234公里。人工智能（AI）的语言模型 model。\r\n"
        "def f(x):\n\treturn x ** 2  # 平方\n😀🇨🇳 café naïve ёлка かな 한국어 नमस्ते\n") * 3
CODE_POINTS = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]


@pytest.fixture(scope="module", params=["bpe", "char"])
def any_tok(request):
    return make(request.param)


@pytest.fixture(scope="module")
def tok():
    return make("bpe")


def make(kind, text=TEXT, n_tokens=400):
    if kind == "char":
        return Tokenizer(dump(train_char(count_pieces([text], CHAR_PATTERN)), CHAR_PATTERN))
    return Tokenizer(dump(train_bpe(count_pieces([text]), n_tokens), PATTERN))


def encode(piece, rank):
    """BPE by the book: join the leftmost pair of lowest rank until no pair is a token."""
    parts = [piece[i:i + 1] for i in range(len(piece))]
    while len(parts) > 1:
        best, i = min((rank.get(parts[i] + parts[i + 1], 1 << 60), i)
                      for i in range(len(parts) - 1))
        if best == 1 << 60:
            break
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts


def naive_train(counts, n_tokens):
    """Encode everything anew for each token; of equally frequent pairs take the oldest."""
    tokens = [bytes([i]) for i in range(256)]
    while len(tokens) < n_tokens:
        rank = {token: i for i, token in enumerate(tokens)}
        pairs = Counter()
        for piece, n in counts.items():
            parts = [rank[part] for part in encode(piece, rank)]
            for pair in zip(parts, parts[1:]):
                pairs[pair] += n
        (a, b), n = min(pairs.items(), key=lambda item: (-item[1], item[0]), default=((0, 0), 0))
        if n < 2:
            break
        tokens.append(tokens[a] + tokens[b])
    return tokens


def random_text(r, n):
    """Text with every kind of character, runs and words, but none that Unicode has not named yet:
    regex and tiktoken may come with different versions of it."""
    usual = "aeinorst ETL'.,\n\r\t 012的一是中文。，　éя\u0301\u200b\x1c\x00😀ſＫ〇々\u00a0\u2028"
    parts = [r.choice(usual) * r.choice([1, 1, 1, 2, 9]) if r.random() < 0.8 else
             r.choice(CODE_POINTS) for _ in range(n)]
    return "".join(p for p in parts if unicodedata.category(p[0]) != "Cn")


# ---------------------------------------------------------------------------- training

def test_trainer_agrees_with_the_naive_one():
    """Also on runs (aaaa), where pairs overlap, and on ties."""
    for seed in range(250):
        r = random.Random(seed)
        counts = Counter()
        for _ in range(r.randint(1, 8)):
            units = [bytes(r.choices(b"aab" if seed % 2 else b"abcd", k=r.randint(1, 4)))
                     for _ in range(3)]
            piece = b"".join(r.choice(units) * r.randint(1, 9) for _ in range(r.randint(1, 6)))
            counts[piece] += r.choice([1, 1, 2, r.randint(1, 50)])
        n_tokens = 256 + r.randint(1, 30)
        assert train_bpe(counts, n_tokens) == naive_train(counts, n_tokens), seed


def test_training_stops_when_no_pair_occurs_twice():
    assert train_bpe(Counter({b"abab": 1, b"cd": 1}), 300)[256:] == [b"ab"]


def test_tiktoken_makes_the_same_merges(tok):
    rank, r = tok._mergeable_ranks, random.Random(1)
    for text in [TEXT] + [random_text(r, 40) for _ in range(300)]:
        parts = [p for piece in regex.findall(PATTERN, text) for p in encode(piece.encode(), rank)]
        assert [rank[p] for p in parts] == tok.encode_ordinary(text)


def test_every_token_is_unique_and_reached_by_merges(tok):
    """Without the shortcut by which tiktoken takes a whole piece that is a token."""
    tokens = train_bpe(count_pieces([TEXT]), 400)
    assert len(set(tokens)) == len(tokens) == 400 == tok.n_vocab - len(SPECIALS)
    rank = {token: i for i, token in enumerate(tokens)}
    assert all(encode(token, rank) == [token] for token in tokens)


@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/data")
def test_real_text_gives_reachable_tokens_and_the_same_merges():
    texts = []
    for name in ("pt_zh.jsonl.gz", "pt_en.jsonl.gz"):
        with gzip.open(SHARED / name, "rt") as f:
            texts += [json.loads(line)["text"][:20_000] for line in itertools.islice(f, 30)]
    tokens = train_bpe(count_pieces(texts), 3000)
    rank, tok = {t: i for i, t in enumerate(tokens)}, Tokenizer(dump(tokens, PATTERN))
    assert all(encode(t, rank) == [t] for t in tokens)
    for text in texts:
        pieces = regex.findall(PATTERN, text[:2000])
        parts = [part for piece in pieces for part in encode(piece.encode(), rank)]
        assert [rank[part] for part in parts] == tok.encode_ordinary(text[:2000])


# ---------------------------------------------------------------------------- cutting

@pytest.mark.parametrize("text, pieces", [
    ("The cat's 3.14", ["The", " cat", "'s", " ", "3", ".", "1", "4"]),
    ("他说Python好。\n真的", ["他说", "Python", "好", "。\n", "真的"]),
    ("a  b\n\n\tc ", ["a", "  ", "b", "\n\n", "\t", "c", " "]),
    ("x != 'y';\r\n", ["x", " !=", " '", "y", "';\r\n"]),
])
def test_pieces_are_sensible(text, pieces):
    assert regex.findall(PATTERN, text) == pieces


def test_regex_and_tiktoken_cut_alike():
    """With every substring as a token, tiktoken gives each of its pieces as one token."""
    r = random.Random(2)
    for _ in range(300):
        text = random_text(r, 20)
        parts = {text[i:j].encode() for i, j in itertools.combinations(range(len(text) + 1), 2)}
        parts = [bytes([i]) for i in range(256)] + [p for p in parts if len(p) > 1]
        whole = tiktoken.Encoding("whole", pat_str=PATTERN, special_tokens={},
                                  mergeable_ranks={p: i for i, p in enumerate(parts)})
        cut = [whole.decode([i]) for i in whole.encode_ordinary(text)]
        assert cut == regex.findall(PATTERN, text)


def test_no_code_point_is_dropped(any_tok):
    """tiktoken drops what the pattern does not match: controls, \\x1c, U+200B, unassigned ones."""
    for between in ("", " ", "a", "中", "\n", "!", "1"):
        text = between.join(CODE_POINTS)
        assert any_tok.decode(any_tok.encode_ordinary(text)) == text


def test_every_byte_string_round_trips(any_tok):
    r = random.Random(3)
    for n in range(300):
        data = r.randbytes(n)
        assert any_tok.decode_bytes(any_tok._encode_bytes(data)) == data
        assert any_tok.decode_bytes(list(data)) == data  # the first 256 tokens are the bytes


@pytest.mark.parametrize("text", ["a" * 10**6, "^" * 10**6, " " * 10**6, "中" * 10**6,
                                  " " * 10**6 + "a", "\n" * 10**6, " \n" * 500_000],
                         ids=lambda text: ascii(text[:2] + text[-1]))
def test_worst_cases_take_no_time(any_tok, text):
    """\\s+(?!\\S) in the pattern made tiktoken panic on a million spaces: its stack overflowed."""
    start = time.process_time()
    ids = any_tok.encode_ordinary(text)
    assert time.process_time() - start < 2
    assert any_tok.decode(ids) == text


# ---------------------------------------------------------------------------- the file

def test_a_file_gives_the_same_tokenizer_and_any_damage_is_named(tok, tmp_path):
    path = tmp_path / "t.txt"
    path.write_text(tok.text, encoding="utf-8")
    again = load_tokenizer(str(path))
    assert again.encode_ordinary(TEXT) == tok.encode_ordinary(TEXT) == \
        pickle.loads(pickle.dumps(again)).encode_ordinary(TEXT)
    assert again.sha256 == tok.sha256 and len(again.sha256) == 64
    good, r = path.read_bytes(), random.Random(4)
    spots = r.sample(range(len(good)), 200)
    damaged = [good[:i] + bytes([good[i] ^ 1]) + good[i + 1:] for i in spots]
    damaged += [b"", good[:100], good[:-9], good + b"YQ== 999\n", b"[]\n", b"\xff", b"null"]
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(ValueError, match="t.txt: (not a tokenizer|damaged)"):
            load_tokenizer(str(path))
    with pytest.raises(ValueError, match="nowhere.txt: No such file.*tokenizer.py"):
        load_tokenizer(str(tmp_path / "nowhere.txt"))


def test_token_bytes_add_up_to_the_text(any_tok):
    n_bytes = any_tok.token_bytes()
    assert sum(n_bytes[i] for i in any_tok.encode_ordinary(TEXT)) == len(TEXT.encode())
    assert [n_bytes[i] for i in (any_tok.endoftext, any_tok.pad, any_tok.im_start,
                                 any_tok.im_end)] == [0] * 4


# ---------------------------------------------------------------------------- chats

def test_template_and_mask(tok):
    chat = [{"role": "system", "content": "是"}, {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "the 猫"}]
    ids, mask = render(tok, chat)
    assert tok.decode(ids) == ("<|im_start|>system\n是<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
                               "<|im_start|>assistant\nthe 猫<|im_end|>\n")
    learned = [i for i, m in zip(ids, mask) if m]
    assert len(ids) == len(mask) and learned == tok.encode_ordinary("the 猫") + [tok.im_end]
    prompt, no_mask = render(tok, chat[:-1], add_generation_prompt=True)
    assert ids[:len(prompt)] == prompt and not any(no_mask) and len(prompt) == len(no_mask)


def test_no_text_can_forge_a_turn(any_tok):
    """5,000 hostile chats: special ids only where the template puts them, contents unharmed."""
    tok, r = any_tok, random.Random(5)
    salts = [v for s in SPECIALS for v in (
        s, s[:5], s[5:], s[:4] + s + s[4:], s.replace("<|", "＜｜").replace("|>", "｜＞"), s.upper(),
        s.replace("|", "\u200b|"), " " + s + "\n", s + "assistant\n", "\n" + s[:-1])]
    salts += ["user\n", "\n", "", "中文", "\x00", "\ufeff", "😀", "<", "|", ">"]
    specials = {tok.endoftext, tok.pad, tok.im_start, tok.im_end}
    for _ in range(5000):
        chat = [{"role": r.choice(["system", "user", "assistant"]),
                 "content": "".join(r.choices(salts, k=r.randint(0, 6)))}
                for _ in range(r.randint(1, 4))]
        ids, mask = render(tok, chat)
        opened = [i for i, token in enumerate(ids) if token == tok.im_start]
        closed = [i for i, token in enumerate(ids) if token == tok.im_end]
        assert len(opened) == len(closed) == len(chat)
        assert sum(token in specials for token in ids) == 2 * len(chat)
        for message, start, end in zip(chat, opened, closed):
            head = len(tok.encode_ordinary(message["role"] + "\n")) + 1
            assert tok.decode(ids[start + head:end]) == message["content"]
            assert set(mask[start + head:end + 1]) == {int(message["role"] == "assistant")}


def test_a_lone_surrogate_does_not_end_a_chat(tok):
    assert "�" in tok.decode(render(tok, [{"role": "user", "content": "a\ud800b"}])[0])


@pytest.mark.parametrize("message", [
    {"role": "tool", "content": "x"}, {"role": "user"}, {"role": "user", "content": None},
    {"role": "user", "content": ["x"]}, {"content": "x"}, {"role": ["user"], "content": ""}, "x"])
def test_a_bad_message_is_named(tok, message):
    with pytest.raises(ValueError, match="message 1: wanted a role of system, user, assistant"):
        render(tok, [{"role": "user", "content": ""}, message])


def test_streaming_never_shows_half_a_character(any_tok):
    r = random.Random(6)
    for _ in range(200):
        text = random_text(r, 30) + "未完"
        stream = StreamDecoder(any_tok)
        shown = [stream.push(token) for token in any_tok.encode_ordinary(text)]
        assert "".join(shown) == text and stream.flush() == ""
        ids = [r.randrange(any_tok.n_vocab) for _ in range(50)]  # no text at all
        stream = StreamDecoder(any_tok)
        assert "".join(map(stream.push, ids)) + stream.flush() == any_tok.decode(ids)


# ---------------------------------------------------------------------------- command line

def run(monkeypatch, *args):
    monkeypatch.setattr("sys.argv", ["tokenizer.py", *map(str, args)])
    tokenizer.main()


@pytest.mark.parametrize("kind", ["bpe", "char"])
def test_any_number_of_workers_writes_the_same_file(tmp_path, monkeypatch, capsys, kind):
    monkeypatch.setattr("corpus.BATCH_BYTES", 500)
    with open(tmp_path / "in.jsonl", "w") as f:
        for i in range(40):
            f.write(json.dumps({"text": f"{TEXT}{i}", "lang": ["en", "zh"][i % 2]}) + "\n")
        chat = [{"role": "user", "content": "chat 说话 説話"}]
        f.write(json.dumps({"messages": chat}) + "\n")
    for n in (1, 3):
        run(monkeypatch, f"--input={tmp_path}/in.jsonl", f"--out={tmp_path}/sub/{n}.txt",
            f"--kind={kind}", f"--workers={n}", "--vocab_size=400")
    files = [(tmp_path / "sub" / f"{n}.txt").read_bytes() for n in (1, 3)]
    assert files[0] == files[1]
    tok = load_tokenizer(f"{tmp_path}/sub/1.txt")
    assert kind == "bpe" or tok.decode_bytes([tok.encode_ordinary("説")[0]]) == "説".encode()
    out = capsys.readouterr().out
    assert regex.search(r"en: \d\.\d\d bytes/token", out) and "\nzh: " in out and tok.sha256[:16] in out


@pytest.mark.parametrize("args, line", [
    (["--vocab_size=260"], "--vocab_size=260 must be more than 260"),
    (["--max_mb=0"], "--max_mb must be at least 1"),
    ([], "out/toyworld/pt.jsonl: no such file or folder; make it with: python toyworld.py"),
    (["--input=bad.jsonl"], "bad.jsonl:2:1: field missing: 'text' or a chat (--on_bad_line=skip "
                            "passes over such lines)"),
    (["--input=bad.jsonl", "--on_bad_line=skip"],
     "1 of 2 lines are bad, more than 1.0% (--max_bad_fraction)"),
    (["--input=empty.txt"], "empty.txt: no text in it"),
])
def test_a_mistake_is_one_line(tmp_path, monkeypatch, capsys, args, line):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.jsonl").write_text('{"text": "x"}\n{"txt": "y"}\n')
    (tmp_path / "empty.txt").touch()
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, *args)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(line) and error.count("\n") == 1
