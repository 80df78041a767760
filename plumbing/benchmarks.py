"""
Reads the rows of benchmarks for evaluate.py, and writes its table; may be skipped.
"""
import math
from collections.abc import Iterator

from plumbing.chats import read_prompt
from plumbing.corpus import BadLine, LineError, language, parse_records, read_batches

KINDS = {"choice": ("query", "choices", "gold"), "cloze": ("context", "target"),
         "answer": ("prompt",), "text": ("text",)}
STRINGS = ("query", "context", "target", "text", "answer")


def read_task(path: str) -> tuple[list[dict], str]:
    """The rows of a file, each with its "lang", and their kind. Raises ValueError."""
    rows, kinds = [], {}
    for batch in read_batches([path]):
        for item in parse_records(batch, read_row):
            if isinstance(item, BadLine):
                raise ValueError(str(item))
            rows.append(item)
            kinds[item["kind"]] = None
    if len(kinds) != 1:
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


def interval(right: list[float]) -> list[float]:
    """[share in per cent, low, high], after Wilson."""
    n, p, z = len(right), sum(right) / len(right), 1.96
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return [round(100 * x, 2) for x in
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
