"""
The C of this folder, compiled by the machine's own compiler when it is first used.

The program is kept in ~/.cache/khaosz, under a name made of everything that it depends on: source,
compiler, flags and processor. Where there is no compiler, `library` says what one would bring.
"""
import hashlib
import os
import platform
import subprocess
import sys
import tempfile
from ctypes import CDLL
from functools import cache
from pathlib import Path

HERE = Path(__file__).parent
SOURCES = [HERE / "decoder.c", HERE / "product.c"]  # the first includes the second
ALWAYS = ["-O3", "-fno-math-errno", "-fopenmp-simd", "-shared", "-fPIC", "-w"]
# what not every compiler has: gcc on x86 and ARM; clang on ARM; clang without OpenMP, one thread
TRIES = [["-march=native", "-fopenmp"], ["-mcpu=native", "-fopenmp"], ["-march=native"],
         ["-mcpu=native"]]


@cache
def library() -> CDLL | None:
    """The functions of decoder.c, or None after one line that says why there are none."""
    try:
        return CDLL(str(built()))
    except (OSError, ValueError) as error:
        print(f"8 and 4 bits need a C compiler (cc, or CC=…), with which a CPU writes several "
              f"times as fast: {error}", file=sys.stderr)
        return None


def built() -> Path:
    """The compiled program. Raises ValueError with the compiler's first words if it cannot be
    made. Two processes may make it at once: each puts its own there whole, and they are equal."""
    compiler = os.environ.get("CC", "cc")
    made_of = [platform.machine(), processor(), compiler, *ALWAYS, *sum(TRIES, [])]
    text = "\n".join(made_of).encode() + b"".join(path.read_bytes() for path in SOURCES)
    folder = private_folder()
    path = folder / f"{hashlib.sha256(text).hexdigest()[:24]}.so"
    if path.exists():
        return path
    with tempfile.TemporaryDirectory(dir=folder) as fresh:
        for flags in TRIES:
            try:
                subprocess.run([compiler, *ALWAYS, *flags, "-o", f"{fresh}/new.so", SOURCES[0],
                                "-lm"], check=True, capture_output=True, text=True)
                CDLL(f"{fresh}/new.so")  # a clang may take -fopenmp and have no such library
                os.replace(f"{fresh}/new.so", path)
                return path
            except subprocess.CalledProcessError as error:
                said = error.stderr.strip().partition("\n")[0] or f"exit code {error.returncode}"
            except OSError as error:
                said = error.strerror or str(error).removeprefix(f"{fresh}/new.so: ")
    raise ValueError(f"{compiler}: {said}")


def private_folder() -> Path:
    """Where compiled programs are kept: a folder that nobody else can write to, since we run what
    lies in it. If the usual one is not like that, it is a new one for this process."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(home, "khaosz")
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        state = folder.stat()
        if os.name == "nt" or state.st_uid == os.getuid() and not state.st_mode & 0o022 and (
                os.access(folder, os.W_OK)):
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="khaosz"))


def processor() -> str:
    """What it can do: -march=native means another program on another machine."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return platform.processor()
