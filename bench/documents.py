"""
Are questions answered from the right page of real documents? The figures of each kind of file.

    python rag.py add papers/ --index=out/papers
    python -m bench.documents --index=out/papers --questions=questions.txt

A line of the questions is the place of the answer, a tab and the question: `fhs.pdf:p45`, or
`lints.html` where any place in the file will do; several places stand with commas between.
"""
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import rag
from configurator import FilePath, configure
from plumbing.terminal import run
from search.citations import location


@dataclass(frozen=True)
class Config(rag.Config):
    questions: FilePath = ""  # lines of PLACE, tab, QUESTION


def rank(places: list[str], found: list[str]) -> int:
    """Of the first right place among those found, from 1; 0 if it is not there."""
    return next((n for n, one in enumerate(found, 1) if {one, one.split(":")[0]} & {*places}), 0)


def main() -> None:
    cfg = configure(Config, show=False)
    ranks: dict[str, list[int]] = defaultdict(list)
    index = rag.open_index(cfg)
    for line in Path(cfg.questions).read_text("utf-8").splitlines():
        places, _, question = line.partition("\t")
        found = [re.split(r"\s{2}", location(hit))[0] for hit in index.search(question, 5)]
        ranks[Path(places.split(":")[0]).suffix].append(
            place := rank(places.split(","), [Path(one).name for one in found]))
        if place != 1:
            print(f"{place or 'not found'}: {question} ({places}; first: {found[:1]})")
    print("| | questions | right page first | among the first five |\n|---|---|---|---|")
    for kind, own in ranks.items():
        print(f"| {kind} | {len(own)} | {own.count(1)} | {len(own) - own.count(0)} |")


if __name__ == "__main__":
    run(main)
