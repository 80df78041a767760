"""What no file of this repository does, so that nobody needs to trust it: run foreign text, call a
shell, unpickle, download, or do anything at import."""
import ast
import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from plumbing import checkpoint

ROOT = Path(checkpoint.__file__).resolve().parent.parent
ROOMS = ("kernels", "plumbing", "search", "demo", "bench", "faults")
FILES = sorted(path for room in (".", *ROOMS, "config", ".ci")
               for path in ROOT.glob(f"{room}/*.py"))
MODULES = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in FILES
           if path.parent.name not in ("config", ".ci")
           and (path.name != "serve.py" or find_spec("uvicorn"))]  # the extra `serve`
FORBIDDEN = {"eval", "exec", "__import__", "pickle.load", "pickle.loads", "pickle.Unpickler",
             "marshal.loads", "os.system", "os.popen", "shelve.open", "joblib.load", "yaml.load",
             "torch.hub.load", "tiktoken.get_encoding", "urllib.request.urlopen", "runpy.run_path"}
ALLOWED = {("plumbing/configfile.py", "exec"),  # the user's own Python, see SECURITY.md
           ("bench/__main__.py", "runpy.run_path"),  # of what --nanogpt names, see SECURITY.md
           ("search/embed.py", "urllib.request.urlopen"),  # to the server that --embed=http… names
           ("search/writer.py", "urllib.request.urlopen"),  # to that of --writer
           ("serving/load.py", "urllib.request.urlopen")}  # to a serve.py that is measured


def unsafe(source: str, name: str = "x.py") -> list[str]:
    """Calls in a file that could run what somebody else wrote."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        given = {k.arg: ast.unparse(k.value) for k in node.keywords}
        if called in FORBIDDEN and (name, called) not in ALLOWED:
            found.append(called)
        if called == "torch.load" and given.get("weights_only") != "True":
            found.append("torch.load without weights_only=True")
        found += [f"{key}={value}" for key, value in given.items()
                  if (key, value) in {("shell", "True"), ("trust_remote_code", "True"),
                                      ("weights_only", "False"), ("allow_pickle", "True")}]
    return found


def test_no_file_runs_foreign_text_or_unpickles():
    """Seen to fail with weights_only=False in checkpoint.py, and with each line below."""
    assert {path.name: found for path in FILES
            if (found := unsafe(path.read_text(), str(path.relative_to(ROOT))))} == {}
    for line in ("eval(x)", "exec(x)", "pickle.load(f)", "subprocess.run(x, shell=True)",
                 "torch.load(f)", "torch.load(f, weights_only=False)", "os.system(x)",
                 "AutoModel.from_pretrained(x, trust_remote_code=True)",
                 "np.load(f, allow_pickle=True)"):
        assert unsafe(line), line
    assert not unsafe("model.eval(); torch.load(f, weights_only=True); configurator.exec_(x)")


WATCH = """
import builtins, os, sys
def watch(event, args):
    writes = event == "open" and (args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if writes and not str(args[0]).startswith("/dev/") or event in (
            "socket.connect", "socket.bind", "socket.getaddrinfo", "socket.sendto", "os.mkdir",
            "os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree", "os.system",
            "subprocess.Popen", "os.posix_spawn", "os.fork", "urllib.Request"):
        sys.stderr.write(f"{event} {args!r}\\n")
        os._exit(7)
sys.addaudithook(watch)
"""


def importing(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-B", "-c", WATCH + code], cwd=ROOT, text=True,
                          capture_output=True, timeout=100)


def test_importing_any_module_opens_no_socket_and_writes_no_file():
    """By Python's own audit events, torch and all other packages included. Seen to fail with a
    mkdir at the top of runtime.py."""
    present = [name for name in MODULES if name != "kernels.gpu" or find_spec("triton")]
    done = importing(f"import {', '.join(present)}")
    assert done.returncode == 0 and len(MODULES) > 20, done.stderr[-500:]
    for act in ("open('/tmp/x', 'w')", "import socket; socket.create_connection(('127.0.0.1', 9))",
                "import os; os.mkdir('/tmp/x')", "import subprocess; subprocess.run(['true'])"):
        assert importing(act).returncode == 7, act


@pytest.mark.parametrize("version, opens", [("2.5.1", False), ("2.9.1+cpu", False),
                                            ("2.10.0", True), ("2.13.0+cu130", True),
                                            ("3.0.0a1", True)])
def test_an_old_torch_opens_no_file(tmp_path, monkeypatch, version, opens):
    """Below 2.10 weights_only=True can be made to run code (CVE-2025-32434, CVE-2026-24747). Seen
    to fail with a comparison of strings, for which 2.10 is less than 2.9."""
    path = checkpoint.save(str(tmp_path), 1, {"format": 1, "step": 1, "model": {}})
    monkeypatch.setattr(torch, "__version__", version)
    if opens:
        assert checkpoint.load(str(path))[0]["step"] == 1
        return
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("opened"))
    with pytest.raises(ValueError, match=r"\A[^\n]*with torch .* can run code[^\n]*torch>=2.10'\Z"):
        checkpoint.load(str(path))


def test_the_lock_has_every_package_by_version_and_hash_and_names_no_host():
    """All that torch, numpy, tiktoken and pytest need, as installed here. Seen to fail with a line
    of the lock deleted."""
    lock = (ROOT / "requirements.lock").read_text()
    assert "://" not in lock and "index" not in lock and "torch==" not in lock
    entries = dict(re.findall(r"^([\w-]+)==\S+((?: \\\n    --hash=sha256:[0-9a-f]{64})+)$", lock,
                              re.M))
    assert lock.count("==") == len(entries)
    wanted, seen = ["torch", "numpy", "tiktoken", "pytest"], set()
    while wanted:
        name = re.sub(r"[-_.]+", "-", wanted.pop()).lower()
        if name in seen:
            continue
        seen.add(name)
        try:
            needs = distribution(name).requires or []
        except PackageNotFoundError:
            continue  # on another system
        assert name == "torch" or name in entries, f"{name} is not in requirements.lock"
        wanted += [re.match(r"[\w.-]+", n)[0] for n in needs
                   if "extra ==" not in n and not re.match("nvidia|triton|cuda", n)]
    pinned = re.search(r"^torch==(\S+)$", (ROOT / "requirements.txt").read_text(), re.M)
    assert pinned and tuple(map(int, pinned[1].split(".")[:2])) >= checkpoint.SAFE_TORCH
    assert os.path.exists(ROOT / "SECURITY.md")
