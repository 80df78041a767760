"""Settings: what is accepted, who wins, and that every mistake ends in one line which helps."""
import ast
import contextlib
import importlib
import io
import os
import re
import subprocess
import sys
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import pytest

from configurator import Count, FilePath, Natural, NotNegative, Positive, Share, configure

ROOT = Path(__file__).resolve().parent.parent


def scripts() -> list[str]:
    """Modules that have settings: the scripts in the root, and those in the rooms; serve.py only
    where its extra is installed."""
    return [".".join(path.relative_to(ROOT).with_suffix("").parts)
            for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("[!.]*/*.py")])
            if path.parent.name not in ("config", "tests")
            and (path.stem != "serve" or find_spec("uvicorn"))
            and re.search(r"^class Config\b", path.read_text(encoding="utf-8"), re.M)]


SCRIPTS = scripts()


@dataclass(frozen=True)
class Config:
    n_layer: int = 4  # blocks
    learning_rate: float = 1e-2  # of AdamW
    dropout: float | None = None  # share of zeros; None: off
    optimizer: Literal["adamw", "muon"] = "adamw"  # which one
    compile: bool = False  # faster after a slow start
    out_dir: str = "out"  # where the files go
    init_from: str | None = None  # a checkpoint


def resolve(*argv, cls=Config):
    with contextlib.redirect_stdout(io.StringIO()):
        return configure(cls, [str(arg) for arg in argv])


def refusal(*argv, cls=Config):
    """The one line that `argv` is refused with."""
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr), pytest.raises(SystemExit) as stop:
        resolve(*argv, cls=cls)
    assert stop.value.code == 2
    line = stderr.getvalue()
    assert line.endswith("\n") and line.count("\n") == 1 and len(line) < 1000, line
    return line[:-1]


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Write a config file into the current folder, return its name."""
    monkeypatch.chdir(tmp_path)

    def write(source, name="c.py"):
        Path(name).write_bytes(source if isinstance(source, bytes) else source.encode())
        return name
    return write


@pytest.mark.parametrize("arg, value", [
    ("--n_layer=-2", -2), ("--learning_rate=3e-4", 3e-4), ("--learning_rate=1", 1.0),
    ("--dropout=0", 0.0), ("--dropout=None", None), ("--optimizer=muon", "muon"),
    ("--compile", True), ("--compile=False", False), ("--out_dir=5", "5"), ("--out_dir=a=b", "a=b"),
    ("--out_dir=", ""), ("--out_dir=None", "None"), ("--init_from=None", None),
    ("--init_from=x.pt", "x.pt")])
def test_a_value_arrives_exactly_as_declared(arg, value, config):
    key = arg[2:].partition("=")[0]
    in_file = config(f"{key} = {int(value) if type(value) is float else value!r}")
    for source in [arg] if value == 3e-4 else [arg, in_file]:
        got = getattr(resolve(source), key)
        assert got == value and type(got) is type(value)


@pytest.mark.parametrize("arg, message", [
    ("--n_layer=True", "int, got True"), ("--n_layer=4.0", "int, got 4.0"),
    ("--n_layer=None", "int, got None"), ("--n_layer=", "int, got ''"),
    ("--n_layer={[]: 1}", "int, got '{[]: 1}'"), ("--n_layer=abs(1)", "int, got 'abs(1)'"),
    ("--learning_rate=True", "float, got True"), ("--learning_rate=float", "float, got 'float'"),
    ("--dropout=high", "float | None, got 'high'"),
    ("--compile=1", "bool, got 1"), ("--compile=true", "bool, got 'true'"),
    ("--optimizer=sgd", "Literal['adamw', 'muon'], got 'sgd'")])
def test_a_value_of_another_type_is_refused(arg, message):
    assert refusal(arg) == f"{arg}: '{arg[2:].partition('=')[0]}' must be {message}"


@dataclass(frozen=True)
class Ranged:
    batch_size: Count = 8  # rows
    every: Natural = 0  # steps; 0: never
    max_steps: Count | None = None  # steps; None: as many as there are
    rate: Positive = 1.0  # of learning
    beta: NotNegative = 0.1  # pull
    share: Share = 0.5  # part
    folder: FilePath = "out"  # where


@dataclass(frozen=True)
class Extended(Ranged):
    rate: Positive = 2.0  # of learning, here
    own: str = ""  # text


@pytest.mark.parametrize("arg, message", [
    ("--batch_size=-8", "int at least 1, got -8"), ("--batch_size=0", "int at least 1, got 0"),
    ("--every=-1", "int at least 0, got -1"), ("--rate=0", "float above 0, got 0"),
    ("--rate=nan", "float above 0, got 'nan'"), ("--rate=1e999", "float above 0, got inf"),
    ("--max_steps=0", "int at least 1 | None, got 0"),
    ("--share=1.5", "float between 0 and 1, got 1.5"), ("--beta=-1", "float at least 0, got -1")])
def test_a_number_out_of_its_range_is_refused_before_anything_starts(arg, message):
    """--batch_size=-8 once ran 20 steps, learnt nothing, saved and ended with exit code 0; 0 was a
    traceback in five stages; max_steps=0 was taken for None."""
    got = refusal(arg, cls=Ranged)
    assert got == f"{arg}: '{arg[2:].partition('=')[0]}' must be {message}"


def test_values_inside_their_range_arrive(config):
    assert resolve("--max_steps=None", "--rate=1", "--share=0", "--every=0", cls=Ranged) == Ranged(
        max_steps=None, rate=1.0, share=0.0, every=0)
    assert resolve(config("share = 1\nbatch_size = 1"), cls=Ranged) == Ranged(
        share=1.0, batch_size=1)


def test_a_tilde_is_the_home_folder_and_a_folder_of_that_name_is_never_made(config, monkeypatch):
    """bash leaves the ~ of --out_dir=~/x alone, so a folder called "~" was made."""
    monkeypatch.setenv("HOME", "/home/mei")
    monkeypatch.setenv("USERPROFILE", "/home/mei")
    assert resolve("--folder=~/x", cls=Ranged).folder == "/home/mei/x"
    assert resolve(config("folder = '~/y'"), cls=Ranged).folder == "/home/mei/y"
    assert resolve("--own=~/x", cls=Extended).own == "~/x"  # text is not a path


def test_help_shows_the_settings_of_the_script_first_and_those_it_shares_after(capsys):
    with pytest.raises(SystemExit):
        configure(Extended, ["--help"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if "  --" in line]
    assert [row[0] for row in rows] == ["--rate=2.0", "--own=", "--batch_size=8", "--every=0",
                                        "--max_steps=None", "--beta=0.1", "--share=0.5",
                                        "--folder=out"]
    assert rows[0][1:] == "of learning, here".split() and rows[2][1:] == ["rows"]


def test_only_what_differs_from_the_defaults_is_shown_with_who_set_it(config, capsys):
    configure(Ranged, [config("share = 0.25\nbatch_size = 8"), "--folder=a\x1b[2J"])
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["share", "0.25", "c.py:1"], ["folder", r"'a\x1b[2J'", "--folder=a\x1b[2J"]]


def test_what_python_cannot_print_or_convert_is_refused(config):
    """repr(10**5000) and float(10**400) raise, so a check that formats or converts first dies."""
    for source in "n_layer = 10**5000", "learning_rate = 10**400", "out_dir = 10**5000":
        assert re.fullmatch(r"c.py:1: '\w+' does not fit in 64 bits", refusal(config(source)))
    assert refusal(f"--learning_rate={10**400}").endswith("'learning_rate' does not fit in 64 bits")
    line = refusal(config("import numpy\nlearning_rate = numpy.zeros((9, 9))"))  # nine lines long
    assert line.startswith("c.py:2: 'learning_rate' must be float, got array(")
    assert refusal(config("learning_rate = float")).startswith("c.py:1: 'learning_rate' must be")


def test_the_last_argument_wins(config):
    a, b = config("n_layer = 1\nout_dir = 'a'", "a.py"), config("n_layer = 2", "b.py")
    assert resolve(a, b, "--n_layer=3") == Config(n_layer=3, out_dir="a")
    assert resolve("--n_layer=3", b, a) == Config(n_layer=1, out_dir="a")
    assert resolve("--n_layer=3", "--n_layer=5") == Config(n_layer=5)


def test_a_config_file_is_ordinary_python(config):
    source = ("import math, os as o\n_x = [_i for _i in range(3)]\n_f = lambda n: n + len(_x)\n"
              "def _g():\n    learning_rate = 9\n    return math.tau\n"
              "for _k in range(4): n_layer = _k\nn_layer += _f(1)\n"
              "learning_rate, out_dir = _g(), __file__")
    got = resolve(config(source))
    assert got == Config(n_layer=3 + 4, learning_rate=2 * 3.141592653589793, out_dir="c.py")


@pytest.mark.parametrize("line, source", [
    (3, "\n\nfoo = 1"), (2, "if 1:\n foo = 1\nelse:\n foo = 2"), (2, "foo = 1\nfoo += 1"),
    (2, "n_layer, \\\n foo = 1, 2"), (2, "\nfoo: int = 1"), (2, "\nfor foo in (1, 2): pass"),
    (2, "\nif (foo := 1): pass"), (2, "\nwith open(__file__) as foo: pass"), (1, "foo = (\n1,\n2)"),
    (2, "\nfrom math import pi as foo"), (3, "\n@staticmethod\ndef foo(): pass"),
    (2, "\nclass foo: pass"), (2, "_g = globals()\n_g['foo'] = 1"),
    ("?", "def _f():\n global foo\n foo = 1\n_f()")])  # `global` assigns unseen
def test_a_public_name_that_is_no_setting_is_refused_at_its_line(line, source, config):
    assert refusal(config(source)) == f"c.py:{line}: no setting is called 'foo', see --help"


def test_modules_are_ignored_but_never_lost_in_a_setting(config):
    assert resolve(config("import math as n_laye")) == Config()
    line = refusal(config("\nimport math as n_layer"))
    assert line.startswith("c.py:2: 'n_layer' must be int, got <module")


@pytest.mark.parametrize("message, source", [
    ("2: SyntaxError: '(' was never closed", "n_layer = 1\nn_layer = ("),
    ("2: ValueError: a b", "\nraise ValueError('a\\nb')"), ("2: SystemExit: 0", "\nexit(0)"),
    ("4: ZeroDivisionError: division by zero", "\ndef _f():\n  1 / 0\n_f()"),
    ("2: FileNotFoundError: ", "\nopen('no')"), ("2: ModuleNotFoundError: ", "\nimport no_such"),
    ("2: SyntaxError: (unicode error)", b"\nout_dir = '\xff'"), ("1: SyntaxError: ", b"PK\3\4\0"),
    ("1: SyntaxError: Exceeds the limit", "n_layer = " + "9" * 5000),
    ("2: RecursionError: ", "def _f(): _f()\n_f()")])
def test_a_file_that_does_not_run_is_refused_at_its_line(message, source, config):
    assert refusal(config(source)).startswith("c.py:" + message)


@pytest.mark.parametrize("arg", ["no.py", ".", "", "-n_layer=4", "n_layer=4"])
def test_what_is_neither_file_nor_setting_is_told_how_to_write_one(arg):
    assert refusal(arg, "4") == f"{arg}: no such config file (settings are written --key=value)"
    assert refusal("--n_layer", "4") == "--n_layer: needs a value, --n_layer=…"


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_slip_of_the_fingers_is_refused_with_the_right_suggestion(script, config):
    """Every key with one character left out or two neighbours swapped, typed and in a file.
    Seen to fail when the command line ignored unknown settings."""
    cls, slips, right = importlib.import_module(script).Config, {}, []
    for key in [field.name for field in fields(cls)]:
        slips[key] = {key[:i] + key[i + 1] + key[i] + key[i + 2:] for i in range(len(key) - 1)}
        slips[key] = {key[:i] + key[i + 1:] for i in range(len(key))} | slips[key] - {key}
    for key, slip in [(k, slip) for k in slips for slip in slips[k]]:
        meant = [f"did you mean '{k}'?" for k in slips if slip in slips[k]]  # top_: top_k or top_p
        typed = refusal(f"--{slip}=1", cls=cls)
        in_file = refusal(config(f"_scratch = 1\n\n{slip} = 1\n"), cls=cls)
        assert typed in [f"--{slip}=1: no setting is called '{slip}', {m}" for m in meant]
        assert in_file in [f"c.py:3: no setting is called '{slip}', {m}" for m in meant]
        right += [f"'{key}'?" in typed, f"'{key}'?" in in_file]
    assert sum(right) >= 0.98 * len(right)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_every_setting_with_default_and_comment(script, capsys):
    module = importlib.import_module(script)
    source = Path(module.__file__).read_bytes()
    lines = source.splitlines()
    [config] = [node for node in ast.parse(source).body if getattr(node, "name", "") == "Config"]
    with pytest.raises(SystemExit) as stop:
        configure(module.Config, ["no.py", "--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0 and module.__doc__.strip() in out
    for node in [node for node in config.body if isinstance(node, ast.AnnAssign)]:
        key, comment = node.target.id, lines[node.end_lineno - 1][node.end_col_offset:].decode()
        assert re.fullmatch("  +# .+", comment), f"{script}.py: say beside {key} what it is for"
        row = f"  --{f'{key}={getattr(module.Config, key)}':<32} {comment.strip(' #')}"
        assert row in out.splitlines()


def test_every_config_file_fits_the_script_its_name_says():
    for path in sorted((ROOT / "config").rglob("*.py")):
        job = path.stem.split("_")[0]
        if job == "reward":  # for --reward_from, see tests/test_rewards.py
            continue
        names = [name for name in (f"train_{job}", job) if (ROOT / f"{name}.py").exists()]
        assert names, f"{path}: there is no train_{job}.py and no {job}.py"
        cls = importlib.import_module(names[0]).Config
        found = resolve(path, cls=cls)
        for key in re.findall(r"^(\w+) = ", path.read_text(), re.M):
            assert getattr(found, key) != getattr(cls(), key), f"{path}: {key} is so by default"


def test_a_script_speaks_on_the_right_stream_with_the_right_exit_code(config):
    config('"""What it does."""\nfrom dataclasses import dataclass\n'
           "from configurator import configure\n\n@dataclass(frozen=True)\nclass Config:\n"
           "    n_layer: int = 4  # blocks\n\nconfigure(Config)\n", "s.py")  # is __main__

    def run(*argv, rank="0"):
        env = {**os.environ, "PYTHONPATH": str(ROOT), "RANK": rank}
        done = subprocess.run([sys.executable, "s.py", *argv], env=env, capture_output=True)
        return done.returncode, b" ".join(done.stdout.split()), done.stderr

    assert run("--help") == (0, b"What it does. --n_layer=4 blocks", b"")
    assert run(config("\nn_layer = 8")) == (0, b"n_layer 8 c.py:2", b"")
    assert run("c.py", "--n_layer=9") == (0, b"n_layer 9 --n_layer=9", b"")
    assert run("c.py", rank="3") == (0, b"", b"")  # printed once, by rank 0
    assert run("--n_layer=x") == (2, b"", b"--n_layer=x: 'n_layer' must be int, got 'x'\n")


def test_an_empty_path_is_not_the_folder_here(capsys):
    """`--out_dir=$OUT` with OUT not set trained into the project's own folder, and `rag.py add
    notes --index=` left an index there. A path that may be left out may be empty."""
    @dataclass(frozen=True)
    class Paths:
        out_dir: FilePath = "out"  # where
        pt_data: FilePath = ""  # if any
    assert configure(Paths, ["--pt_data="], False) == Paths()
    with pytest.raises(SystemExit) as stop:
        configure(Paths, ["--out_dir="], False)
    assert stop.value.code == 2
    assert capsys.readouterr().err == "--out_dir=: 'out_dir' names no path\n"
