"""The three walks of CONTRIBUTING.md: the functions of ours that a reader meets on the way of a
batch, a prompt and a question, counted while they run."""
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from test_windows import write

import generate
import rag
import train_pt
from data import Windows
from search.manifest import term_key

ROOT = Path(generate.__file__).resolve().parent


def walked(work: Callable[[], object]) -> list[str]:
    """"file:function" of what runs, in order. A module of plumbing stands for all of its functions
    and for what they call: its first line says what it does."""
    found: dict[str, None] = {}
    inside: list[object] = []  # the call of plumbing that we are in

    def look(frame, event, argument):
        code, path = frame.f_code, Path(frame.f_code.co_filename)
        if event == "return" and inside == [frame]:
            inside.clear()
        if event != "call" or inside or code.co_name[0] == "<" or ROOT not in path.parents:
            return
        name = path.relative_to(ROOT).as_posix()
        if name.startswith("plumbing"):
            inside.append(frame)
        if not name.startswith((".venv", "tests")):
            found[name if inside else f"{name}:{code.co_qualname}"] = None

    sys.setprofile(look)
    try:
        work()
    finally:
        sys.setprofile(None)
    return list(found)


def walks(tiny, folder: Path) -> dict[str, list[str]]:
    """What each walk meets that those before have not met."""
    cfg = generate.Config(stream=True, max_tokens=8)
    windows = Windows([write(folder / "a.bin", np.arange(9_000) % 100)], 32, seed=0)

    def batch() -> None:
        x, y = windows.batch(0, 4)
        train_pt.pt_loss(tiny.model(x, hidden=True), tiny.model.lm_head.weight, y).backward()

    note = folder / "a.md"
    note.write_text("# Bakery\n\nAnn bakes bread in the old town.\n\n# Ben\n\nBen is 17.\n")
    asked = rag.Config(index=str(folder / "index"), min_coverage=0)
    rag.change("add", [str(note)], asked)
    index, asked = rag.open_index(asked), replace(asked, checkpoint=tiny.pt)
    rag.load_writer(asked)
    term_key.cache_clear()  # another test may have met these words
    found: dict[str, list[str]] = {}
    for name, work in (("batch", batch), ("prompt", lambda: generate.answer(
            tiny.model, tiny.tok, ["Who bakes?"], cfg, [])), ("question", lambda: rag.ask(
                "How old is Ben?", asked, index, []))):
        met = {step for walk in found.values() for step in walk}
        found[name] = [step for step in walked(work) if step not in met]
    return found


# functions, with a module of plumbing for one; files of the root and of search
MOST = {"batch": (13, 3), "prompt": (14, 3), "question": (26, 7)}


def test_the_walks_are_as_short_as_contributing_says(tiny, tmp_path):
    said = (ROOT / "CONTRIBUTING.md").read_text()
    for name, walk in walks(tiny, tmp_path).items():
        files = {step.partition(":")[0] for step in walk if not step.startswith("plumbing")}
        assert (len(walk), len(files)) == MOST[name], "\n".join(walk)
        assert re.search(r"{} functions in {} files".format(*MOST[name]), said.replace("\n", " "))
