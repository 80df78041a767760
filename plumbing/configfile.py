"""
Runs a config file and notes which line set what; readers of the configurator may skip the rest.
"""
import sys
from typing import Any

from plumbing.terminal import fail


def run_config(path: str) -> dict[str, tuple[Any, int | str]]:
    """The names that a config file leaves behind, each with its value and the line that assigned it
    last. Raises SystemExit(2) after one line if the file does not run."""
    class Namespace(dict):  # sees every assignment: by for, import, with, def, := too
        def __setitem__(self, name: str, value: Any) -> None:
            super().__setitem__(name, value)
            lines[name] = sys._getframe(1).f_lineno

    lines: dict[str, int | str] = {}
    space = Namespace(__file__=path)
    try:
        with open(path, "rb") as f:
            exec(compile(f.read(), path, "exec"), space)  # the user's own file, so trusted
    except (Exception, SystemExit) as e:
        frame = e.__traceback__ and e.__traceback__.tb_next
        line = getattr(frame, "tb_lineno", getattr(e, "lineno", 1)) or 1
        fail(f"{path}:{line}: {type(e).__name__}: {getattr(e, 'msg', e)}")
    return {name: (value, lines.get(name, "?")) for name, value in space.items()}
