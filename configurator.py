"""
Settings of a script: one dataclass says what can be set; Python files and the command line set it.

    cfg = configure(Config)          # python train_pt.py config/pt_1b.py --learning_rate=3e-4

Arguments are read left to right and the last one wins. A config file is ordinary Python: every
public name it assigns must be a setting; imported modules are ignored, and so are _scratch names,
unless they look like a misspelt setting. The only conversion is --beta=1 to 1.0.
"""
import inspect
import os
import re
import sys
from ast import literal_eval
from contextlib import suppress
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from math import inf
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from plumbing.configfile import run_config
from plumbing.terminal import fail, printable

C = TypeVar("C", bound=Any)
# A type that says its range: `batch_size: Count = 8` refuses 0 before anything starts.
Count = Annotated[int, "at least 1", lambda n: n >= 1]
Natural = Annotated[int, "at least 0", lambda n: n >= 0]
Positive = Annotated[float, "above 0", lambda x: 0 < x < inf]
NotNegative = Annotated[float, "at least 0", lambda x: 0 <= x < inf]
Share = Annotated[float, "between 0 and 1", lambda x: 0 <= x <= 1]
FilePath = Annotated[str, "naming a path", lambda path: True]  # a leading ~ is the home folder


def configure(cls: type[C], argv: list[str] | None = None, show: bool = True) -> C:
    """The dataclass `cls` filled from `argv` (default: the command line). With `show`, rank 0
    prints what differs from the defaults, and who set it. Raises SystemExit(2) after one line for
    anything wrong, SystemExit(0) after `--help`, which shows the comment beside each setting."""
    argv = sys.argv[1:] if argv is None else argv
    if "--help" in argv or "-h" in argv:
        source = "\n".join(inspect.getsource(c) for c in reversed(cls.__mro__) if is_dataclass(c))
        notes = dict(re.findall(r"^\s+(\w+): .*?  # (.*)$", source, re.M))
        print(inspect.getdoc(sys.modules[cls.__module__]), end="\n\n")
        for f in sorted(fields(cls), key=lambda f: f.name not in cls.__annotations__):  # own first
            print(f"  --{f'{f.name}={f.default}':<32} {notes.get(f.name, '')}")
        raise SystemExit(0)
    hints, values, origin = get_type_hints(cls, include_extras=True), {}, {}
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
        if type(value) is int and _accepts(hints[key], float(value)):
            value = float(value)
        if not _accepts(hints[key], value):
            wanted = re.sub(r"(typing\.)?Annotated\[(\w+), '(.*?)', .*?>\]", r"\2 \3",
                            inspect.formatannotation(hints[key]))
            wanted = re.sub(r"(typing\.)?Optional\[(.*)\]", r"\2 | None", wanted)
            fail(f"{where}: '{key}' must be {wanted}, got {value!r}")
        if hints[key] == FilePath and not value and getattr(cls, key):  # "" would be this folder
            fail(f"{where}: '{key}' names no path")
        values[key] = os.path.expanduser(value) if hints[key] == FilePath else value
        origin[key] = where

    for arg in argv:
        key, equals, text = arg.removeprefix("--").partition("=")
        if arg.startswith("--") and (equals or _accepts(hints.get(key, bool), True)):
            value, hint = text if equals else True, hints.get(key)
            if not _accepts(hint, value) or text == "None" and _accepts(hint, None):
                with suppress(Exception):  # not a literal: override() says what was expected
                    value = literal_eval(text)
            override(key, value, arg)
        elif os.path.isfile(arg):
            for key, (value, line) in run_config(arg).items():
                free = key.startswith("_") and key not in slips or inspect.ismodule(value)
                if key in hints or not free:
                    override(key, value, f"{arg}:{line}")
        else:
            fail(f"{arg}: needs a value, {arg}=…" if arg.startswith("--") else
                 f"{arg}: no such config file (settings are written --key=value)")
    if show and os.environ.get("RANK", "0") == "0":
        for f in fields(cls):
            if values.get(f.name, f.default) != f.default:
                print(f"  {f.name:<20} {printable(repr(values[f.name])):<28} {origin[f.name]}")
    return cls(**values)


def _accepts(hint: Any, value: Any) -> bool:
    """isinstance for int, float, bool, str, Literal, ranges and "| None"; exact: True is no int."""
    if get_origin(hint) is Annotated:
        kind, _, holds = get_args(hint)
        return type(value) is kind and holds(value)
    if get_origin(hint) is Literal:
        return any(type(value) is type(option) and value == option for option in get_args(hint))
    return type(value) is hint or any(_accepts(option, value) for option in get_args(hint))
