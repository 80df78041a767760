"""The house: who may import whom, how long things may be, what stands in the root, and the two
checkers of `make lint`."""
import ast
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from importlib.util import find_spec
from pathlib import Path

import pytest

from plumbing import checkpoint

ROOT = Path(checkpoint.__file__).resolve().parent.parent
ROOMS = ("kernels", "plumbing", "search", "serving", "demo", "bench", "faults")
FILES = {path.relative_to(ROOT).as_posix(): path
         for room in (".", *ROOMS) for path in sorted(ROOT.glob(f"{room}/*.py"))}
# the card: what a learner meets first, and at most how many lines of it
CARD = {"model.py": 280, "tokenizer.py": 330, "data.py": 250, "train_pt.py": 250,
        "train_sft.py": 290, "train_rm.py": 290, "train_dpo.py": 300, "train_rl.py": 320,
        "generate.py": 300, "rag.py": 300, "configurator.py": 100}
LATER = {"convert.py": 300, "serve.py": 300, "evaluate.py": 250}  # came after the card
BUDGETS = CARD | LATER | {"kernels": 677, "serving": 595, "plumbing": 4991, "search": 1738,
                          "demo": 1451, "bench": 1850, "faults": 138}  # no room may grow
LONGEST, ALL, CORE = 400, 15_809, 3_100
IN_ROOT = {*CARD, *LATER, "README.md", "README.zh.md", "CONTRIBUTING.md", "LICENSE", "SECURITY.md",
           "Makefile", "pyproject.toml", "requirements.txt", "requirements.lock", ".gitignore",
           ".ci", "config", "docs", "tests", *ROOMS}
MAY_IMPORT = {"kernels": {"model"}, "serving": {"plumbing", "tokenizer", "model", "configurator"},
              "plumbing": {"configurator", "tokenizer", "model", "kernels"},
              "search": {"plumbing", "tokenizer", "configurator"}}
ABOVE = {"demo", "bench", "faults"}  # import anything, and only each other import them


def module(name: str) -> str:
    """plumbing/jobs.py is plumbing.jobs, demo/__init__.py is demo."""
    return name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imports(source: str, modules: set[str]) -> set[str]:
    """Modules of ours that a file imports, wherever in it: at its top, or in a function."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            deeper = {f"{node.module}.{alias.name}" for alias in node.names} & modules
            found |= deeper or {node.module or ""}
    return found & modules


def breaches(edges: dict[str, set[str]]) -> list[str]:
    """Imports that the rule forbids, as "who -> whom"; a circle as its modules."""
    bad = []
    for who, whom in edges.items():
        room = who.partition(".")[0] if who.partition(".")[0] in ROOMS else ""
        allowed = MAY_IMPORT.get(room) or {*module_names(CARD), "plumbing", "kernels"} | (
            {"search"} if who == "rag" else {"serving"} if who == "serve" else set())
        bad += [f"{who} -> {name}" for name in sorted(whom) if room not in ABOVE
                and name.partition(".")[0] not in allowed | {room}]
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as circle:
        bad.append("circle: " + " -> ".join(circle.args[1]))
    return bad


def module_names(names: dict) -> set[str]:
    return {module(name) for name in names}


def length(name: str) -> int:
    """Lines of a file, or of all Python files of a room."""
    paths = [FILES[name]] if name in FILES else sorted((ROOT / name).glob("*.py"))
    return sum(path.read_text().count("\n") for path in paths)


def test_nobody_imports_from_above_and_there_are_no_circles():
    """Root scripts import the root and plumbing, rag.py also search; plumbing and search stay below
    them. Seen to fail with each line at the end."""
    modules = module_names(FILES)
    edges = {module(name): imports(path.read_text(), modules) for name, path in FILES.items()}
    assert breaches(edges) == []
    for who, line in (("model", "from demo import world"), ("plumbing.costs", "import data"),
                      ("search.index", "def f():\n    from rag import answer"),
                      ("train_pt", "from search.index import Index"),
                      ("configurator", "import tokenizer")):  # which imports it: a circle
        assert breaches({"tokenizer": {"configurator"}, who: imports(line, modules)}), line


@pytest.mark.parametrize("name", BUDGETS)
def test_what_is_to_be_read_stays_short(name):
    assert length(name) <= BUDGETS[name]


def test_the_c_of_kernels_stays_short():
    """Its lines are no Python, so no budget above counts them."""
    assert sum(path.read_text().count("\n") for path in ROOT.glob("kernels/*.c")) <= 333


def test_no_file_is_too_long_and_the_core_fits_in_an_evening():
    """Lines are at most 100 columns (`make lint`), so none of this is got by cramming."""
    assert [name for name in FILES if length(name) > LONGEST] == []
    config = sum(path.read_text().count("\n") for path in ROOT.glob("config/*.py"))
    assert sum(map(length, FILES)) + config <= ALL
    assert sum(map(length, CARD)) <= CORE


def test_the_root_shows_the_card_and_little_beside_it():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    assert {line.partition("/")[0] for line in tracked.stdout.splitlines()} <= IN_ROOT


def test_every_file_of_plumbing_says_in_its_first_line_what_a_reader_needs():
    for name, path in FILES.items():
        if name.startswith("plumbing/"):
            first = (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n\n")[0]
            assert len(first) > 40 and first.endswith((".", ":")), name


LINTERS = {"ruff": ["ruff", "check", "--no-cache"], "mypy": ["mypy", "--no-incremental"]}


@pytest.mark.slow
@pytest.mark.parametrize("tool", LINTERS)
def test_the_checkers_find_nothing(tool):
    """As `make lint`, which .ci/run runs."""
    if not find_spec(tool):
        pytest.skip(f"{tool} is in the extra dev")
    done = subprocess.run([sys.executable, "-m", *LINTERS[tool]], cwd=ROOT, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stdout[-5000:]


def test_ctrl_c_is_heard_by_tests_that_a_shell_started_in_the_background():
    """`make test &` in a script leaves SIGINT ignored, for us and for the children of our tests,
    so that Ctrl-C at a child did nothing and its test failed. conftest.py takes that back."""
    code = ("import signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN);"
            "sys.path.insert(0, 'tests'); import conftest;"
            "print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr


def test_what_ci_runs_is_what_the_makefile_names():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\S+)$", (ROOT / ".ci/run").read_text(), re.M):
        assert f"\n{target}: " in makefile, target
    assert "-m ruff check" in makefile and "-m mypy" in makefile


def in_order(source: str) -> bool:
    """Whether the imports at the top of a file come as `import a`, then `from a import b`, in three
    parts: Python's own, packages, ours. After any other statement they begin anew."""
    ours, keys = {name.partition("/")[0].removesuffix(".py") for name in FILES}, [[]]
    for node in ast.parse(source).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            name = node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
            root = name.partition(".")[0]
            part = 0 if root in sys.stdlib_module_names else 1 + (root in ours)
            keys[-1].append((part, isinstance(node, ast.ImportFrom), name))
        elif not isinstance(node, ast.Expr) or not isinstance(node.value, ast.Constant):
            keys.append([])
    return all(part == sorted(part) for part in keys)


def test_imports_stand_in_order():
    """As ruff's rule I wants it, which would also give every imported name a line of its own."""
    assert not in_order("import torch\nimport json") and in_order("import json\nimport torch")
    files = [*FILES.values(), *sorted((ROOT / "tests").glob("*.py"))]
    wrong = {path.relative_to(ROOT).as_posix() for path in files if not in_order(path.read_text())}
    assert wrong == set()
