"""
Rows of benchmarks for evaluate.py, their token ids, and its table; may be skipped.
"""
import math
from collections.abc import Iterator
from os.path import commonprefix
from pathlib import Path

from plumbing.answers import last_number
from plumbing.chats import read_prompt
from plumbing.corpus import LineError, good_records, language
from tokenizer import Tokenizer

Request = tuple[list[int], list[list[int]]]  # ids of a context, and of what may follow it
KINDS = {"choice": ("query", "choices", "gold"), "cloze": ("context", "target"),
         "answer": ("prompt",), "text": ("text",)}
STRINGS = ("query", "context", "target", "text", "answer")


def names_of(files: list[str]) -> list[str]:
    """What tasks are called: arc for arc.jsonl; en/arc where several files are called so."""
    short = [Path(path).name.partition(".")[0] for path in files]
    return [name if short.count(name) == 1 else f"{Path(path).absolute().parent.name}/{name}"
            for name, path in zip(short, files)]


def read_task(path: str) -> tuple[list[dict], str]:
    """The rows of a file, each with its "lang", and their kind. Raises ValueError."""
    rows = list(good_records([path], read_row))
    if len(kinds := dict.fromkeys(row["kind"] for row in rows)) != 1:
        raise ValueError(f"{path}: rows of {' and '.join(kinds)}: a task has one kind" if rows else
                         f"{path}: no rows")
    return rows, rows[0]["kind"]


def read_row(row: dict) -> dict:
    """A row with its "kind" and "lang". Raises LineError."""
    if "arguments" in row and "target" in row:
        row = from_harness(row)
    if "answers" in row and "query" in row:
        row = row | {"prompt": row["query"]}
    answers = isinstance(row.get("answers"), list) and all(
        isinstance(answer, str) for answer in row["answers"]) or isinstance(row.get("answer"), str)
    kind = next((kind for kind, names in KINDS.items() if all(name in row for name in names)
                 and (kind != "answer" or answers)), "")
    if not kind:
        raise LineError("", "not a row of a task", "python evaluate.py --help shows the layouts")
    for name in STRINGS:
        if not isinstance(row.get(name, ""), str):
            raise LineError(name, "field of a wrong type", f"'{name}' must be a string")
    if kind == "choice" and not (isinstance(row["choices"], list) and len(row["choices"]) > 1
                                 and all(isinstance(c, str) and c for c in row["choices"])
                                 and row["gold"] in range(len(row["choices"]))):
        raise LineError("choices", "field of a wrong type", "'choices' must hold two strings or "
                        "more, 'gold' the number of the right one, from 0")
    if kind == "answer":
        if "answers" not in row and last_number(row["answer"]) is None:
            raise LineError("answer", "no number in it", "words belong into a list, 'answers'")
        row = row | {"prompt": read_prompt({"prompt": row["prompt"]})}
    text = "".join([row.get("query", ""), row.get("context", ""), row.get("text", ""),
                    *row.get("choices", []), *(m["content"] for m in row.get("prompt", []))])
    return row | {"kind": kind, "lang": "zh" if language(text) == "zh" else "en"}


def from_harness(row: dict) -> dict:
    """Multiple choice as lm-evaluation-harness logs it: contexts and continuations, joined."""
    try:
        pairs = row["arguments"]
        pairs = [[*pair.values()] for pair in pairs.values()] if isinstance(pairs, dict) else pairs
        (query, _), *_ = pairs
        return {"query": query, "choices": [choice for _, choice in pairs], "joint": "",
                "gold": int(row["target"])}
    except (TypeError, ValueError, AttributeError):
        raise LineError("arguments", "bad sample", "wanted multiple choice: a context and a "
                        "continuation for each choice, and the number of the target") from None


def request(tok: Tokenizer, context: str, ends: list[str], window: int) -> Request:
    """Ids of a context and of what may follow it. Spaces at the end of the context belong to what
    follows. Without a context, what follows the beginning of a text is asked for."""
    kept = context.rstrip()
    start = [*tok.begin, *tok.encode_ordinary(kept)] if kept else tok.begin or [tok.endoftext]
    n = len(start) - len(tok.begin) if kept else 0
    found = [tok.encode_ordinary(context + end)[n:] or tok.encode_ordinary(end) for end in ends]
    return start[-max(1, window + 1 - max(map(len, found))):], found


def stem(request: Request) -> list[int]:
    """The context and what all ends begin with, but for their last tokens, which none follows."""
    return [*request[0], *commonprefix([end[:-1] for end in request[1]])]


def windows(tok: Tokenizer, text: str, size: int) -> list[Request]:
    """A text as requests of `size` tokens; the last one reaches back, so that it is as long."""
    ids, before = tok.encode_ordinary(text), tok.begin or [tok.endoftext]
    found = []
    for at in range(0, len(ids), size):
        end = ids[at:at + size]
        context = [*before, *ids[:at]][-(size + 1 - len(end)):]
        found.append((context, [end]))
    return found


def interval(right: list[float]) -> list[float]:
    """[share in per cent, low, high], after Wilson."""
    n, p, z = len(right), sum(right) / len(right), 1.96
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return [round(100 * x, 2) + 0.0 for x in  # never -0.0
            (p, *((middle + sign * half) / (1 + z * z / n) for sign in (-1, 1)))]


def table(lines: list[dict]) -> Iterator[str]:
    """Markdown: what the model gets, and beside it what needs no model."""
    yield "| task | rows | result | chance | the longest |"
    yield "|---|---|---|---|---|"
    for line in lines:
        shown = []
        for name in ("acc", "acc_norm", "em", "f1", "bits_per_byte", "perplexity"):
            if isinstance(value := line.get(name), list):
                shown.append(f"{name} {value[0]:.4g} ({value[1]:.4g} … {value[2]:.4g})")
            elif value is not None:
                shown.append(f"{name} {value:.4g}")
        longest = f"{line['longest'][0]:.1f}" if "longest" in line else ""
        yield (f"| {line['task']} ({line['lang']}) | {line['n']:,} | {', '.join(shown)} | "
               f"{line.get('chance', '')} | {longest} |")
