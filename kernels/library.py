"""
The C of this folder, compiled by the machine's own compiler when it is first used.

The program is kept in ~/.cache/khaosz, under a name made of everything that it depends on: source,
compiler, flags and processor. Where there is no compiler, `library` says what one would bring.
"""
import atexit
import hashlib
import os
import platform
import subprocess
import sys
import tempfile
from contextlib import suppress
from ctypes import CDLL
from functools import cache
from pathlib import Path

SOURCES = [Path(__file__).with_name(name) for name in ("decoder.c", "product.c")]
ALWAYS = ["-O3", "-fno-math-errno", "-fopenmp-simd", "-shared", "-fPIC", "-w"]
# what not every compiler has: clang on ARM wants the second, and without OpenMP it is one thread
NATIVE = ["-march=native", "-mcpu=native"][:1 if platform.machine() in ("x86_64", "AMD64") else 2]
TRIES = [[native, *threads] for threads in (["-fopenmp"], []) for native in NATIVE]


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
    compiler, folder = os.environ.get("CC") or "cc", private_folder()
    with tempfile.TemporaryDirectory(dir=folder) as fresh:
        for flags in TRIES:  # each has its own name: what fails today may work tomorrow
            made_of = [platform.machine(), processor(), compiler, *ALWAYS, *flags]
            text = "\n".join(made_of).encode() + b"".join(path.read_bytes() for path in SOURCES)
            path = folder / f"{hashlib.sha256(text).hexdigest()[:24]}.so"
            with suppress(OSError):  # a damaged one is made anew
                CDLL(str(path))
                return path
            try:
                subprocess.run([*compiler.split(), *ALWAYS, *flags, "-o", f"{fresh}/new.so",
                                SOURCES[0], "-lm"], check=True, capture_output=True, text=True)
                CDLL(f"{fresh}/new.so")  # a clang may take -fopenmp and have no such library
                with open(f"{fresh}/new.so", "rb") as file:
                    os.fsync(file.fileno())  # half a program would end every start
                os.replace(file.name, path)
                return path
            except subprocess.CalledProcessError as error:
                said = error.stderr.strip().partition("\n")[0] or f"exit code {error.returncode}"
            except OSError as error:
                said = error.strerror or str(error).removeprefix(f"{fresh}/new.so: ")
    raise ValueError(f"{compiler}: {said}")


def private_folder() -> Path:
    """Where compiled programs are kept: a folder that nobody else can write to, since we run what
    lies in it. If the usual one is not like that, it is a new one for this process."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(home, "khaosz")
    with suppress(OSError):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        state = folder.stat()
        if os.name == "nt" or state.st_uid == os.getuid() and not state.st_mode & 0o022 and (
                os.access(folder, os.W_OK)):
            return folder
    own = tempfile.TemporaryDirectory(prefix="khaosz")
    atexit.register(own.cleanup)
    return Path(own.name)


def processor() -> str:
    """What it can do: -march=native means another program on another machine."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features")))
    return platform.processor()
