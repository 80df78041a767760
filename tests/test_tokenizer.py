"""The tokenizer: trained as a naive one would be, cut and merged as tiktoken does, never forged."""
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

from plumbing import bpe, vocabulary
from tokenizer import (CHAR_PATTERN, HAN_PATTERN, SPECIALS, StreamDecoder, Tokenizer, count_pieces,
                       dump, load_tokenizer, main, render, slow_bpe, train_bpe, train_char)

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
TEXT = ("The cat sat on the mat, and the other cat didn't: it's 1,234 miles away.\n\n"
        "    那只猫坐在垫子上，另一只猫没有；它离这里有1234公里。"
        "人工智能（AI）的语言模型 model。\r\n"
        "def f(x):\n\treturn x ** 2  # 平方\n😀🇨🇳 café naïve ёлка かな 한국어 नमस्ते\n") * 3
CODE_POINTS = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
BYTES = [bytes([i]) for i in range(256)]


BPE = Tokenizer(dump(train_bpe(count_pieces([TEXT]), 400), HAN_PATTERN))
CHAR = Tokenizer(dump(train_char(count_pieces([TEXT], CHAR_PATTERN)), CHAR_PATTERN))
both = pytest.mark.parametrize("tok", [BPE, CHAR], ids=["bpe", "char"])


def encode(piece, rank):
    """BPE by the book: join the leftmost pair of lowest rank until no pair is a token."""
    parts = [piece[i:i + 1] for i in range(len(piece))]
    while len(parts) > 1:
        pairs = enumerate(zip(parts, parts[1:]))
        best, i = min((rank.get(a + b, len(rank)), i) for i, (a, b) in pairs)
        if best == len(rank):
            break
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts


def cuts(token):
    try:
        return token.decode() == ""
    except UnicodeDecodeError:
        return regex.search(rb"(?s)^.+[\x00-\x7f\xc0-\xff]", token) is not None


def naive_train(counts, n_tokens):
    """Encode everything anew for each token; of equally frequent pairs take the oldest. Two parts
    of a character may meet, but a part of one meets nothing of another."""
    tokens = BYTES[:]
    while len(tokens) < n_tokens:
        rank, pairs = {token: i for i, token in enumerate(tokens)}, Counter()
        for piece, n in counts.items():
            parts = [rank[part] for part in encode(piece, rank)]
            for a, b in zip(parts, parts[1:]):
                if not cuts(tokens[a] + tokens[b]):
                    pairs[a, b] += n
        (a, b), n = min(pairs.items(), key=lambda item: (-item[1], item[0]), default=((0, 0), 0))
        if n < 2:
            break
        tokens.append(tokens[a] + tokens[b])
    return tokens


def random_text(r, n):
    """Text of every kind of character, but none of those that not every version of Unicode has."""
    usual = "aeinorst ETL'.,\n\r\t 012的一是中文。，　éя\u0301\u200b\x1c\x00😀ſＫ〇々\u00a0\u2028"
    parts = [r.choice(usual) * r.choice([1, 1, 1, 2, 9]) if r.random() < 0.8 else
             r.choice(CODE_POINTS) for _ in range(n)]
    return "".join(p for p in parts if unicodedata.category(p[0]) != "Cn")


def test_trainer_agrees_with_the_naive_one():
    """Also on runs (aaaa), where pairs overlap, on ties, and on characters of two to four bytes
    that begin or end alike. Seen to fail where one of the two joins 是 and half of 猫."""
    for seed in range(150):
        r, counts = random.Random(seed), Counter()
        for _ in range(r.randint(1, 8)):
            units = ["".join(r.choices(("aab", "abcd", "是猫猪a", "é是😀😁")[seed % 4],
                                       k=r.randint(1, 4))).encode() for _ in range(3)]
            piece = b"".join(r.choice(units) * r.randint(1, 9) for _ in range(r.randint(1, 6)))
            counts[piece] += r.choice([1, 1, 2, r.randint(1, 50)])
        n_tokens = 256 + r.randint(1, 30)
        assert train_bpe(counts, n_tokens) == naive_train(counts, n_tokens), seed
        assert slow_bpe(counts, n_tokens) == naive_train(counts, n_tokens), seed
    assert train_bpe(Counter({b"abab": 1, b"cd": 1}), 300)[256:] == [b"ab"]  # the rest comes once


@pytest.mark.parametrize("source", ["a few lines", pytest.param("pt_{}.jsonl.gz", marks=(
    pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/data")))])
def test_every_token_is_one_that_tiktoken_makes(source):
    """Each is reached by merges, without tiktoken's shortcut for a whole piece that is a token, and
    lies within a piece; no two are alike; and our merges cut any text as tiktoken does."""
    r, texts = random.Random(1), [TEXT]
    if source != "a few lines":
        for lang in ("zh", "en"):
            with gzip.open(SHARED / source.format(lang), "rt") as f:
                texts += [json.loads(line)["text"][:20_000] for line in itertools.islice(f, 20)]
    tokens = train_bpe(count_pieces(texts), 400 if len(texts) == 1 else 2000)
    rank, tok = {token: i for i, token in enumerate(tokens)}, Tokenizer(dump(tokens, HAN_PATTERN))
    assert len(rank) == len(tokens) == tok.n_vocab - len(SPECIALS)
    assert all(encode(token, rank) == [token] for token in tokens)
    assert not any(map(cuts, tokens))
    whole = [token.decode() for token in tokens if "�" not in token.decode("utf-8", "replace")]
    assert len(whole) > 128 and all(len(regex.findall(HAN_PATTERN, text)) == 1 for text in whole)
    for text in [t[:2000] for t in texts] + [random_text(r, 40) for _ in range(200)]:
        parts = [part for piece in regex.findall(HAN_PATTERN, text)
                 for part in encode(piece.encode(), rank)]
        assert [rank[p] for p in parts] == tok.encode_ordinary(text)


def test_pieces_are_sensible():
    for cut in ("The| cat|'s| |3|.|1|4", "他说|Python|好|。\n|真的", "x| !=| '|y|';\r\n",
                "a|  |b|\n\n|\t|c| "):
        assert regex.findall(HAN_PATTERN, cut.replace("|", "")) == cut.split("|")


def test_regex_and_tiktoken_cut_alike():
    """With every substring as a token, tiktoken gives each of its pieces as one token."""
    r = random.Random(2)
    for _ in range(200):
        text = random_text(r, 20)
        parts = {text[i:j].encode() for i, j in itertools.combinations(range(len(text) + 1), 2)}
        rank = {p: i for i, p in enumerate(BYTES + [p for p in parts if len(p) > 1])}
        whole = tiktoken.Encoding("", pat_str=HAN_PATTERN, mergeable_ranks=rank, special_tokens={})
        pieces = [whole.decode([i]) for i in whole.encode_ordinary(text)]
        assert pieces == regex.findall(HAN_PATTERN, text)


@both
def test_nothing_is_dropped_and_every_byte_is_counted(tok):
    """tiktoken drops what the pattern does not match: controls, \\x1c, U+200B, unassigned ones."""
    for between in ("", " ", "a", "中"):
        text = between.join(CODE_POINTS)
        assert tok.decode(tok.encode_ordinary(text)) == text
    n_bytes, r = tok.token_bytes(), random.Random(3)
    assert sum(n_bytes[i] for i in tok.encode_ordinary(text)) == len(text.encode())
    assert [n_bytes[i] for i in (tok.endoftext, tok.pad, tok.im_start, tok.im_end)] == [0] * 4
    for data in map(r.randbytes, range(300)):
        assert tok.decode_bytes(tok._encode_bytes(data)) == data
        assert tok.decode_bytes(list(data)) == data  # the first 256 tokens are the bytes


@both
@pytest.mark.parametrize("text", [
    *(c * (10**6 // len(c)) for c in ("a", "^", " ", "中", "\n", " \n", "aA", "'s", "1", "\u0301",
                                      "😀", "\x00")),
    " " * 10**6 + "a", random.Random(7).randbytes(500_000).hex()], ids=range(14))
def test_worst_cases_take_no_time(tok, text):
    """Seen to fail with the lookahead of GPT-2's pattern, \\s+(?!\\S): tiktoken panicked on a
    million spaces, because its stack overflowed."""
    start = time.process_time()
    ids = tok.encode_ordinary(text)
    assert time.process_time() - start < 2
    assert tok.decode(ids) == text


def test_a_file_gives_the_same_tokenizer_and_any_damage_is_named(tmp_path):
    path, r = tmp_path / "t.txt", random.Random(4)
    path.write_text(BPE.text, encoding="utf-8")
    again = load_tokenizer(str(path))
    assert again.sha256 == BPE.sha256 and len(again.sha256) == 64
    for other in (again, pickle.loads(pickle.dumps(again))):
        assert other.encode_ordinary(TEXT) == BPE.encode_ordinary(TEXT)
    good = path.read_bytes()
    bad = [good[:i] + bytes([good[i] ^ 1]) + good[i + 1:] for i in r.sample(range(len(good)), 99)]
    for raw in bad + [b"", good[:100], good[:-9], good + b"YQ== 999\n", b"[]\n", b"\xff", b"null"]:
        path.write_bytes(raw)
        with pytest.raises(ValueError, match="t.txt: (not a tokenizer|damaged)"):
            load_tokenizer(str(path))
    with pytest.raises(ValueError, match="nowhere.txt: No such file.*tokenizer.py"):
        load_tokenizer(str(tmp_path / "nowhere.txt"))


def test_template_and_mask_and_what_is_no_chat():
    chat = [{"role": "system", "content": "是"}, {"role": "user", "content": "a\ud800b"},
            {"role": "assistant", "content": "the 猫"}]
    ids, mask = render(BPE, chat)
    assert BPE.decode(ids) == ("<|im_start|>system\n是<|im_end|>\n<|im_start|>user\na�b<|im_end|>\n"
                               "<|im_start|>assistant\nthe 猫<|im_end|>\n")
    learned = [i for i, m in zip(ids, mask) if m]
    assert len(ids) == len(mask) and learned == BPE.encode_ordinary("the 猫") + [BPE.im_end]
    prompt, no_mask = render(BPE, chat[:-1], add_generation_prompt=True)
    assert ids[:len(prompt)] == prompt and not any(no_mask) and len(prompt) == len(no_mask)
    for message in ({"role": "tool", "content": "x"}, {"role": "user"}, {"content": "x"}, "x",
                    {"role": "user", "content": ["x"]}, {"role": ["user"], "content": ""}):
        with pytest.raises(ValueError, match="message 1: wanted a role of system, user, assistant"):
            render(BPE, [{"role": "user", "content": ""}, message])


@both
def test_no_text_can_forge_a_turn(tok):
    """5,000 hostile chats: special ids only where the template puts them, contents unharmed. Seen
    to fail with tok.encode(content, allowed_special="all") in render."""
    r, salts = random.Random(5), [v for s in SPECIALS for v in (
        s, s[:5], s[5:], s[:4] + s + s[4:], s.replace("<|", "＜｜").replace("|>", "｜＞"),
        s.upper(), s.replace("|", "\u200b|"), " " + s + "\n", s + "assistant\n", "\n" + s[:-1])]
    salts += ["user\n", "\n", "", "中文", "\x00", "\ufeff", "😀", "<", "|", ">"]
    for _ in range(5000):
        chat = [{"role": r.choice(["system", "user", "assistant"]),
                 "content": "".join(r.choices(salts, k=r.randint(0, 6)))}
                for _ in range(r.randint(1, 4))]
        ids, mask = render(tok, chat)
        opened, closed = ([i for i, token in enumerate(ids) if token == special]
                          for special in (tok.im_start, tok.im_end))
        assert len(opened) == len(closed) == len(chat)
        assert sum(i >= tok.endoftext for i in ids) == 2 * len(chat)  # of all special ids
        for message, start, end in zip(chat, opened, closed):
            start += len(tok.encode_ordinary(message["role"] + "\n")) + 1
            assert tok.decode(ids[start:end]) == message["content"]
            assert set(mask[start:end + 1]) == {int(message["role"] == "assistant")}


@both
def test_streaming_never_shows_half_a_character(tok):
    r = random.Random(6)
    for _ in range(200):
        text, stream = random_text(r, 30) + "未完", StreamDecoder(tok)
        shown = [stream.push(token) for token in tok.encode_ordinary(text)]
        assert "".join(shown) == text and stream.flush() == ""
        ids, stream = r.choices(range(tok.n_vocab), k=50), StreamDecoder(tok)  # no text
        assert "".join(map(stream.push, ids)) + stream.flush() == tok.decode(ids)


def run(monkeypatch, *args):
    monkeypatch.setattr("sys.argv", ["tokenizer.py", *args])
    main()


@pytest.mark.parametrize("kind", ["bpe", "char"])
def test_any_number_of_workers_writes_the_same_file(tmp_path, monkeypatch, capsys, kind):
    monkeypatch.setattr("plumbing.corpus.BATCH_BYTES", 500)
    rows = [{"text": f"{TEXT}{i}", "lang": ["en", "zh"][i % 2]} for i in range(40)]
    rows += [{"messages": [{"role": "user", "content": "chat 说话 説話"}]}]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    args = [f"--input={tmp_path}/in.jsonl", f"--kind={kind}", "--vocab_size=400"]
    for n in (1, 3):
        run(monkeypatch, *args, f"--out={tmp_path}/sub/{n}.txt", f"--workers={n}")
    one, three = (load_tokenizer(f"{tmp_path}/sub/{n}.txt") for n in (1, 3))
    out = capsys.readouterr().out
    assert one.text == three.text and one.sha256[:16] in out
    assert all(regex.search(rf"\n{lang}: \d\.\d\d bytes/token", out) for lang in ("en", "zh"))
    assert kind == "bpe" or len(one.encode_ordinary("説")) == 1  # from the chat
    (tmp_path / "big.txt").write_text(TEXT * 5000)
    run(monkeypatch, *args, f"--input={tmp_path}/big.txt", f"--out={tmp_path}/big", "--max_mb=1")
    assert regex.search(r"read (0\.9|1\.[0-2]) MB \(one line in \d", capsys.readouterr().out)


@pytest.mark.parametrize("args, line", [
    (["--vocab_size=260"], "--vocab_size=260 must be more than 260"),
    (["--max_mb=0"], "--max_mb=0: 'max_mb' must be int at least 1"),
    ([], "out/toyworld/pt.jsonl: no such file or folder; make it with: python -m demo.world"),
    (["--input=bad.jsonl"], "bad.jsonl:2:1: field missing: 'text' or a chat (--on_bad_line=skip"),
    (["--input=bad.jsonl", "--on_bad_line=skip"], "1 of 2 lines are bad, more than 1%: mend them"),
    (["--input=empty.txt"], "empty.txt: no text in it")])
def test_a_mistake_is_one_line(tmp_path, monkeypatch, capsys, args, line):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.jsonl").write_text('{"text": "x"}\n{"txt": "y"}\n')
    (tmp_path / "empty.txt").touch()
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, *args)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith(line) and error.count("\n") == 1


def test_the_training_text_is_not_overwritten(tmp_path, monkeypatch, capsys):
    """--out with the name of the input: the text was read, and then the tokenizer stood there."""
    (tmp_path / "text.txt").write_bytes(TEXT.encode())
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, f"--input={tmp_path}/text.txt", f"--out={tmp_path}/text.txt")
    assert stop.value.code == 2 and "has not written that file" in capsys.readouterr().err
    assert (tmp_path / "text.txt").read_bytes() == TEXT.encode()


@pytest.mark.parametrize("said, begins", [({}, True), ({"add_bos_token": False}, False)])
def test_a_llama_3_file_that_does_not_say_begins_as_llama_cpp_begins(said, begins):
    """llama.cpp puts <|begin_of_text|> there unless the file says no; older files say nothing."""
    words = {"model": "gpt2", "pre": "llama-bpe",
             "tokens": [*bpe.LETTER.values(), "ab", "<|begin|>", "<|e|>"],
             "token_type": [1] * 257 + [3, 3], "merges": ["a b"], "bos_token_id": 257,
             "eos_token_id": 258} | said
    rules = vocabulary.from_gguf({f"tokenizer.ggml.{k}": v for k, v in words.items()}).rules
    assert rules.begin == "<|begin|>" * begins and rules.marks == ("<|begin|>" * begins, "<|e|>")
