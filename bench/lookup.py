"""
How much time do guesses from the text itself save (plumbing/lookup.py), and are texts the same?

    python -m bench.lookup --checkpoint=out/smol --corpus=FILE --queries=FILE

Greedy replies of at most 200 tokens, with guesses and without in turn: answers to questions from
their document, as rag.py asks them; the same functions with a name changed; and, to see that
nothing is lost, free text. Printed are the time with guesses over the time without, of the writing
alone and with the reading of the prompts, the least of `repeats` each.
"""
import time
from dataclasses import dataclass

import rag
from bench.rag import read_records
from configurator import Count, FilePath, configure
from generate import generate
from plumbing.loading import Precision, load_writer
from plumbing.lookup import Lookup
from plumbing.terminal import run
from tokenizer import render

LINES = '''def read_lines(path):
    """The lines of a text file, without those that are empty."""
    found = []
    with open(path, encoding="utf-8") as f:
        for line in f:
            line = line.strip()
            if line:
                found.append(line)
    return found
'''
EDITS = [f"```python\n{LINES}```\nRename `found` to `{name}`. Write the whole code."
         for name in ("lines", "texts", "kept")]
FREE = ["Tell me a story about a lighthouse.", "How is tea made?", "Explain gravity.",
        "Write about the history of bread."]


@dataclass(frozen=True)
class Config:
    checkpoint: FilePath = ""  # model that writes
    corpus: FilePath = ""  # as bench.rag
    queries: FilePath = ""  # as bench.rag
    questions: Count = 16  # so many of the English ones are asked
    repeats: Count = 3  # times that each text is written
    dtype: Precision = "int8"  # of the weights


def main() -> None:
    cfg = configure(Config)
    model, tok = load_writer(cfg.checkpoint, "cpu", cfg.dtype)
    texts = {row["id"]: row["text"] for row in read_records(cfg.corpus, "corpus")}
    english = [q for q in read_records(cfg.queries, "queries") if q["lang"] == "en"]
    answers = [rag.build_messages(q["query"], [texts[q["doc_id"]]], "plain", [])
               for q in english[::max(1, len(english) // cfg.questions)][:cfg.questions]]
    guess, none = Lookup.guess, lambda self, ids, most: []

    def timed(prompt: list[int], how: dict) -> tuple[list[int], float, float]:
        """The reply, and the seconds of all of it and of its writing."""
        clock, ids = [time.perf_counter()], []
        for token, in generate(model, [prompt], 200, stop=tok.stop, temperature=0.0, **how):
            ids.append(token)
            clock.append(time.perf_counter())
        return ids, clock[-1] - clock[0], clock[-1] - clock[1]

    for name, chats, how in (
            ("answers", answers, {"repetition_penalty": 1.1, "quoting": True}),
            ("edits", [[{"role": "user", "content": text}] for text in EDITS], {}),
            ("free", [[{"role": "user", "content": text}] for text in FREE], {})):
        spent, tokens = {guess: [0.0, 0.0], none: [0.0, 0.0]}, 0
        for chat in chats:
            prompt, found = render(tok, chat, True)[0], {guess: [], none: []}
            for _ in range(cfg.repeats):
                for way in found:
                    Lookup.guess = way
                    found[way].append(timed(prompt, how))
            assert found[guess][0][0] == found[none][0][0], "the text is another one"
            tokens += len(found[guess][0][0])
            for way, runs in found.items():
                for i in (0, 1):
                    spent[way][i] += min(run[1 + i] for run in runs)
        whole, writing = (a / b for a, b in zip(spent[guess], spent[none]))
        print(f"{name:<8} {len(chats):>2} texts, {tokens:>4} tokens, all the same | writing "
              f"{writing:.2f} of the time | with reading {whole:.2f}", flush=True)


if __name__ == "__main__":
    run(main)
