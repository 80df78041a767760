"""
Makes the tokenizer of a Hugging Face folder or a GGUF file one of ours, and back; may be skipped.

All of them are byte-level BPE: a list of tokens, and a list of merges that says which two make
which. tiktoken, and so our file, needs no merges: it joins the two neighbours whose union is the
token of the lowest id. That is the same if ids follow the order of the merges, which is checked.
"""
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from plumbing.bpe import QWEN2, merges_of, spell, unspell
from plumbing.files import write_text
from plumbing.templates import CHATML, Rules, check, completed, differing, writer
from tokenizer import Tokenizer, dump, render

# how text is cut before it is merged, by the name that GGUF files use for it
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
PATTERNS = {
    "gpt-2": GPT2, "qwen2": QWEN2, "llama-bpe": QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|", 1),
    # digits are cut out one by one, then what is between them as in GPT-2
    "smollm": r"\p{N}|" + GPT2.replace(r" ?\p{N}+|", "").replace(r"\s+(?!", r"\s+(?=\p{N})|\s+(?!")}
SAME = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "deepseek-r1-qwen": "qwen2"}
MAX_BYTES = 100 << 20  # of a JSON file; a large vocabulary takes 20 MB


class Vocabulary(NamedTuple):
    """A tokenizer as others keep it."""
    tokens: dict[str, int]  # in letters: see plumbing/bpe.py
    merges: list[str]  # "a b", in order
    special: dict[str, int]
    pattern: str
    rules: Rules  # without those of the chat template, which is a program in .jinja
    whole: bool  # a piece that is a token needs no merges


# ---------------------------------------------------------------------------- from elsewhere

def read_json(path: Path) -> dict:
    """Raises ValueError with the file's name, OSError if there is none."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES >> 20} MB")
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
        raise ValueError("not an object")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: damaged: {str(error)[:100]}") from None


def write_json(path: Path, content: dict) -> None:
    write_text(str(path), json.dumps(content, ensure_ascii=False, indent=1) + "\n")


def text_of(setting: dict | str | None) -> str:
    """Of a special token in a settings file, which may be an object."""
    found = setting.get("content") if isinstance(setting, dict) else setting
    return found if isinstance(found, str) else ""


def from_folder(folder: Path, config: dict) -> Vocabulary:
    """The tokenizer of a Hugging Face folder. Raises ValueError for one of another kind."""
    whole = read_json(folder / "tokenizer.json")
    settings, generation = (
        read_json(path) if (path := folder / name).exists() else {}
        for name in ("tokenizer_config.json", "generation_config.json"))
    model, cut = whole["model"], whole.get("pre_tokenizer") or {}
    steps = cut.get("pretokenizers", [cut])
    kinds = [step.get("type") for step in steps]
    if model.get("type") != "BPE" or "ByteLevel" not in kinds:
        raise ValueError("its tokenizer is not a byte-level BPE (but SentencePiece, perhaps)")
    if kinds == ["ByteLevel"]:
        pattern = GPT2
    elif kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        pattern = PATTERNS["smollm"]
    elif kinds == ["Split", "ByteLevel"] and "Regex" in steps[0]["pattern"]:
        pattern = steps[0]["pattern"]["Regex"]
    else:
        raise ValueError(f"its tokenizer cuts text by {', '.join(map(str, kinds))}, which is not "
                         "read here")
    normalizer = (whole.get("normalizer") or {}).get("type")
    if normalizer not in (None, "NFC") or any(step.get("add_prefix_space") for step in steps):
        raise ValueError(f"its tokenizer changes the text first ({normalizer or 'a space before'})")
    added = {t["content"]: t["id"] for t in whole["added_tokens"]}
    by_id = {i: text for text, i in added.items()}
    ends = generation.get("eos_token_id", config.get("eos_token_id"))
    begins = re.search(r'"single": \[{"SpecialToken": {"id": "([^"]+)"',
                       json.dumps(whole.get("post_processor"), ensure_ascii=False))
    jinja = folder / "chat_template.jinja"
    template = settings.get("chat_template")
    if jinja.exists():
        template = jinja.read_text(encoding="utf-8")
    rules = Rules(
        nfc=normalizer == "NFC",
        shown=tuple(t["content"] for t in whole["added_tokens"] if not t.get("special")),
        stop=tuple(by_id[i] for i in (ends if isinstance(ends, list) else [ends]) if i in by_id),
        pad=text_of(settings.get("pad_token")), begin=begins[1] if begins else "",
        marks=(text_of(settings.get("bos_token")), text_of(settings.get("eos_token"))),
        jinja=template if isinstance(template, str) else "")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return Vocabulary(model["vocab"], merges, added, pattern, rules,
                      bool(model.get("ignore_merges")))


def from_gguf(meta: dict) -> Vocabulary:
    """The tokenizer of a GGUF file. Raises ValueError for one of another kind."""
    def get(key: str):
        return meta.get(f"tokenizer.ggml.{key}")
    if get("model") != "gpt2":
        raise ValueError(f"its tokenizer is {get('model')!r} (SentencePiece, if llama), and only a "
                         "byte-level BPE, 'gpt2', is read here")
    name = SAME.get(get("pre"), get("pre"))
    if name not in PATTERNS:
        raise ValueError(f"its tokenizer cuts text as {get('pre')!r} does, which is not read here")
    tokens, kinds = get("tokens"), get("token_type")
    control, ours, unused = 3, 4, 5  # kinds of tokens: hidden, shown, spare
    special = {t: i for i, (t, kind) in enumerate(zip(tokens, kinds)) if kind in (control, ours)}
    by_id = {i: text for text, i in special.items()}
    bos, eos, eot, eom, pad = (by_id.get(get(f"{name}_token_id"), "")
                               for name in ("bos", "eos", "eot", "eom", "padding"))
    jinja = meta.get("tokenizer.chat_template", "")
    begins = meta.get("tokenizer.ggml.add_bos_token", name == "llama-bpe")  # so in llama.cpp
    rules = Rules(
        nfc=meta.get("khaosz.nfc", name == "qwen2"),
        shown=tuple(t for t, i in special.items() if kinds[i] == ours),
        stop=tuple(end for end in (eos, eot, eom) if end), pad=pad, jinja=jinja,
        begin=bos if begins else "", marks=(bos if begins or "bos_token" in jinja else "", eos))
    return Vocabulary({t: i for i, t in enumerate(tokens) if kinds[i] != unused}, get("merges"),
                      special, PATTERNS[name], rules, name == "llama-bpe")


def our_text(v: Vocabulary, rows: int) -> tuple[str, int]:
    """A tokenizer in our format, and how many rows the model needs for it: a byte that the
    vocabulary lacks gets an id after the model's `rows`, so that any text comes back as it was.
    Raises ValueError for a vocabulary whose merges tiktoken would not follow."""
    ranks = {unspell(t): i for t, i in sorted(v.tokens.items(), key=lambda item: item[1])
             if t not in v.special}
    listed: dict[bytes, set] = {}
    for merge in v.merges:
        pair = tuple(map(unspell, merge.split(" ")))
        listed.setdefault(b"".join(pair), set()).add(pair)
    order = [ranks.get(token, -1) for token in listed]
    made = merges_of(ranks)
    if order != sorted(order) or order[:1] == [-1] or not v.whole and any(
            parts not in listed.get(token, ()) for token, parts in made.items()):
        raise ValueError("the ids of its tokens do not follow the order of its merges")
    if max([*ranks.values(), *v.special.values()]) >= rows:
        raise ValueError(f"its tokenizer has more ids than its model has rows, {rows:,}")
    for b in range(256):
        if bytes([b]) not in ranks:
            ranks[bytes([b])] = rows
            rows += 1
    rules = completed(v.rules, v.special)
    text = dump(ranks, v.pattern, v.special, differing(rules))
    if rules.jinja:
        tok, write = Tokenizer(text), writer(rules.jinja, *rules.marks)
        check(write, lambda *chat: tok.decode(render(tok, *chat)[0]), any(rules.chat.think))
    return text, rows


# ---------------------------------------------------------------------------- for others

def parts(tok: Tokenizer) -> tuple[dict[str, int], list[tuple[str, ...]], bool]:
    """Tokens and merges in letters, and whether a piece that is a token needs no merges. Raises
    ValueError for tokens that others cannot make."""
    ranks = dict(sorted(tok._mergeable_ranks.items(), key=lambda item: item[1]))
    made, whole = merges_of(ranks), tok.pattern == PATTERNS["llama-bpe"]
    merges = [tuple(map(spell, pair)) for pair in made.values() if len(pair) == 2]
    if len(merges) < len(made) and not whole:
        raise ValueError(f"{len(made) - len(merges):,} of its tokens are not made of two others, "
                         "as other programs want it: --kind=char makes such")
    return {spell(token): i for token, i in ranks.items()}, merges, whole


def to_folder(tok: Tokenizer, folder: Path, max_len: int, chats: bool) -> None:
    """Write the tokenizer files of a Hugging Face folder, with a template if the model `chats`."""
    tokens, merges, whole = parts(tok)
    rules, special = tok.rules, tok._special_tokens
    template = rules.jinja or (CHATML if chats else None)
    begin = [{"SpecialToken": {"id": rules.begin, "type_id": 0}}] if rules.begin else []
    text = [{"Sequence": {"id": "A", "type_id": 0}}]
    write_json(folder / "tokenizer.json", {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": name, "single_word": False, "lstrip": False,
                          "rstrip": False, "normalized": False, "special": name not in rules.shown}
                         for name, i in special.items()],
        "normalizer": {"type": "NFC"} if rules.nfc else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": tok.pattern}, "behavior": "Isolated",
             "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
             "use_regex": False}]},
        "post_processor": begin and {
            "type": "TemplateProcessing", "single": begin + text, "pair": begin + text,
            "special_tokens": {rules.begin: {
                "id": rules.begin, "ids": tok.begin, "tokens": [rules.begin]}}} or None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True,
                    "use_regex": True},
        "model": {"type": "BPE", "ignore_merges": whole, "vocab": tokens | special,
                  "merges": merges}})
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": max_len,
        "bos_token": rules.marks[0] or None, "eos_token": rules.marks[1], "pad_token": rules.pad,
        "clean_up_tokenization_spaces": False, "chat_template": template})
    write_json(folder / "generation_config.json", {
        "bos_token_id": special.get(rules.marks[0]), "eos_token_id": list(tok.stop),
        "pad_token_id": tok.pad})


def to_gguf(tok: Tokenizer, rows: int, chats: bool) -> dict[str, Any]:
    """The settings of a GGUF file that are about its tokenizer."""
    tokens, merges, _ = parts(tok)
    name = next((name for name, pattern in PATTERNS.items() if pattern == tok.pattern), "")
    if not name:
        raise ValueError("its tokenizer cuts text in a way that llama.cpp has no name for (so do "
                         "those of the demo and of --kind=char); --to=hf can say it")
    special, rules = tok._special_tokens, tok.rules
    texts = {i: text for text, i in (tokens | special).items()}
    kinds = {i: 4 if text in rules.shown else 3 for text, i in special.items()}
    found = {
        "model": "gpt2", "pre": name,
        "tokens": [texts.get(i, f"[PAD{i}]") for i in range(rows)],
        "token_type": [kinds.get(i, 1 if i in texts else 5) for i in range(rows)],
        "merges": [" ".join(pair) for pair in merges],
        "bos_token_id": special.get(rules.marks[0], tok.endoftext),
        "eos_token_id": special.get(rules.marks[1], tok.im_end), "padding_token_id": tok.pad,
        "add_bos_token": bool(rules.begin)}
    return {f"tokenizer.ggml.{key}": value for key, value in found.items()} | {
        "khaosz.nfc": rules.nfc,  # others do it for all that are cut as Qwen2's, or for none
        "tokenizer.chat_template": rules.jinja or (CHATML if chats else "")}
