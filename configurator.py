"""
Settings of a script: one dataclass says what can be set; Python files and the command line set it.

    cfg = configure(Config)          # python train_pt.py config/pt_1b.py --learning_rate=3e-4

Arguments are read left to right and the last one wins. A config file is ordinary Python: every
public name it assigns must be a setting; imported modules are ignored, _scratch names are free
unless one edit away from a setting. Only a whole number is converted, where a float is wanted.
"""
import inspect
import os
import re
import sys
from ast import literal_eval
from contextlib import suppress
from dataclasses import asdict, fields
from difflib import get_close_matches
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin, get_type_hints

C = TypeVar("C")


def fail(message: str, code: int = 2) -> NoReturn:
    """End a script the way every mistake of a user ends it: one line on stderr, exit code 2."""
    print(" ".join(message.splitlines()), file=sys.stderr)
    raise SystemExit(code)


def configure(cls: type[C], argv: list[str] | None = None, show: bool = True) -> C:
    """The dataclass `cls` filled from `argv` (default: the command line); `show`: rank 0 prints it.
    Raises SystemExit(2) after one line for anything wrong, SystemExit(0) after `--help`."""
    argv = sys.argv[1:] if argv is None else argv
    if "--help" in argv or "-h" in argv:  # the help of a setting is the comment beside it
        notes = dict(re.findall(r"^\s+(\w+): .*?  # (.*)$", inspect.getsource(cls), re.M))
        rows = [f"  --{f'{f.name}={f.default}':<32} {notes.get(f.name, '')}" for f in fields(cls)]
        print(inspect.getdoc(sys.modules[cls.__module__]), "", *rows, sep="\n")
        raise SystemExit(0)
    hints, values, origin = get_type_hints(cls), {}, {}
    # What fingers make of a setting: one character left out, or two neighbours swapped.
    slips = {k[:i] + k[i + 1:]: k for k in hints for i in range(len(k))}
    slips |= {k[:i] + k[i + 1] + k[i] + k[i + 2:]: k for k in hints for i in range(len(k) - 1)}

    def override(key: str, value: Any, where: str) -> None:
        if key not in hints:
            near = [slips[key]] if key in slips else get_close_matches(key, hints, n=1)
            advice = f"did you mean '{near[0]}'?" if near else "see --help"
            fail(f"{where}: no setting is called '{key}', {advice}")
        if type(value) is int and value.bit_length() > 63:  # float() and repr() may raise on it
            fail(f"{where}: '{key}' does not fit in 64 bits")
        if type(value) is int and not _accepts(hints[key], value) and _accepts(hints[key], 0.0):
            value = float(value)
        if not _accepts(hints[key], value):
            fail(f"{where}: '{key}' must be {inspect.formatannotation(hints[key])}, got {value!r}")
        values[key], origin[key] = value, where

    for arg in argv:
        key, equals, text = arg.removeprefix("--").partition("=")
        if arg.startswith("--") and (equals or _accepts(hints.get(key, bool), True)):
            value = text if equals else True
            if text == "None" or not _accepts(hints.get(key), value):
                with suppress(Exception):  # not a literal: override() says what was expected
                    value = literal_eval(text)
            override(key, value, arg)
        elif os.path.isfile(arg):
            for key, (value, line) in _run(arg).items():
                free = key.startswith("_") and key not in slips or inspect.ismodule(value)
                if key in hints or not free:
                    override(key, value, f"{arg}:{line}")
        else:
            fail(f"{arg}: no such config file (settings are written --key=value)")
    cfg = cls(**values)
    if show and os.environ.get("RANK", "0") == "0":
        for key, value in asdict(cfg).items():
            print(f"  {key:<20} {value!r:<28} {origin.get(key, '')}".rstrip())
    return cfg


def _run(path: str) -> dict[str, tuple[Any, int | str]]:
    """Run a config file: the names it leaves behind, each with the line that assigned it last."""
    class Namespace(dict):  # sees every assignment: by for, import, with, def, := too
        def __setitem__(self, name: str, value: Any) -> None:
            super().__setitem__(name, value)
            lines[name] = sys._getframe(1).f_lineno

    space, lines = Namespace(__file__=path), {}
    try:
        with open(path, "rb") as f:
            exec(compile(f.read(), path, "exec"), space)  # the user's own file, so trusted
    except (Exception, SystemExit) as e:
        line = getattr(e.__traceback__.tb_next, "tb_lineno", getattr(e, "lineno", 1)) or 1
        fail(f"{path}:{line}: {type(e).__name__}: {getattr(e, 'msg', e)}")
    return {name: (value, lines.get(name, "?")) for name, value in space.items()}


def _accepts(hint: Any, value: Any) -> bool:
    """isinstance for int, float, bool, str, Literal and "| None", but exact: True is no int."""
    if get_origin(hint) is Literal:
        return any(type(value) is type(option) and value == option for option in get_args(hint))
    return type(value) is hint or any(_accepts(option, value) for option in get_args(hint))
