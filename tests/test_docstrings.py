"""The commands in docstrings: their files and settings exist."""
import ast
import re
import shlex
from pathlib import Path

import pytest
from test_readme import ROOT, resolve

FILES = [path for folder in (".", "config", "demo", "bench", "faults", "kernels", "plumbing",
                               "search")
         for path in sorted(ROOT.glob(f"{folder}/*.py"))]
YOURS = re.compile(r"=(FILE|DIR|PATHS|FOLDER|MORE|…)\b|=…")  # what a reader puts there


def commands(path: Path) -> list[list[str]]:
    """The words of each indented command of the docstring at the top of a file; a remark stands
    after it behind two spaces or more, in brackets, or after a #."""
    text = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "")
    lines = re.findall(r"^    (?:.*\| )?((?:python|torchrun) .*)$",
                       re.sub(r" *\\\n\s*", " ", text), re.M)
    return [shlex.split(re.split(r" {2,}| +\(| +#| \| ", line)[0]) for line in lines]


@pytest.mark.parametrize("path", [path for path in FILES if commands(path)],
                         ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_of_a_docstring_resolves(path):
    """Seen to fail with a setting that is gone, and with a file in its old place."""
    for words in commands(path):
        words = [word for word in words if word not in ("[--workers=N]",)]
        resolve([word for word in words if not YOURS.search(word)])
