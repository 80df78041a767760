"""
Write requirements.lock: the exact version of every package we need and of every package those need,
but torch, each with the sha256 of its wheels for the usual systems and Pythons.

    python .ci/lock.py          from the packages installed here; fetches their wheels

Torch is pinned by its version in requirements.txt: its wheels differ by platform and come from
several indexes. The wheels are fetched by pip and hashed here, so that the lock is what pip would
check, and it names no host.
"""
import hashlib
import re
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ("3.11", "3.12", "3.13")
SYSTEMS = {"Linux x86_64": [f"manylinux_2_{n}_x86_64" for n in (17, 24, 27, 28)]
           + ["manylinux2014_x86_64"],
           "Linux aarch64": [f"manylinux_2_{n}_aarch64" for n in (17, 24, 27, 28)]
           + ["manylinux2014_aarch64"],
           "macOS arm64": ["macosx_14_0_arm64", "macosx_11_0_arm64"], "Windows": ["win_amd64"]}


def needed(names: list[str]) -> dict[str, str]:
    """{name: version} of these packages and what they need, as installed here."""
    found: dict[str, str] = {}
    while names:
        name = re.sub(r"[-_.]+", "-", names.pop()).lower()
        if name in found:
            continue
        try:
            package = distribution(name)
        except PackageNotFoundError:
            continue  # needed on another system or Python only
        found[name] = package.version
        names += [name for need in package.requires or [] if "extra ==" not in need
                  for name in re.findall(r"^[\w.-]+", need)]
    return found


def fetch(requirement: str, system: list[str], python: str, folder: str) -> bool:
    platforms = [word for name in system for word in ("--platform", name)]
    return subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder,
         "--only-binary", ":all:", "--python-version", python, *platforms, requirement],
        capture_output=True).returncode == 0


def main() -> None:
    direct = re.findall(r"^[\w-]+", (ROOT / "requirements.txt").read_text(), re.M)
    lines = ["# Written by .ci/lock.py. Install with:", "#   pip install --require-hashes "
             "--only-binary :all: -r requirements.lock", "#   pip install -r requirements.txt"]
    for name, version in sorted(needed(direct).items()):
        if name == "torch":
            continue
        hashes, missing = set(), []
        with tempfile.TemporaryDirectory() as folder:
            for system, platforms in SYSTEMS.items():
                for python in PYTHONS:
                    if next(Path(folder).glob("*-none-any.whl"), None):
                        continue  # one wheel for all
                    if not fetch(f"{name}=={version}", platforms, python, folder):
                        missing.append(f"{system} {python}")
            for wheel in Path(folder).iterdir():
                hashes.add(hashlib.sha256(wheel.read_bytes()).hexdigest())
        print(f"{name} {version}: {len(hashes)} wheels"
              + (f"; none for {', '.join(missing)}" if missing else ""), flush=True)
        lines.append(" \\\n    --hash=sha256:".join([f"{name}=={version}", *sorted(hashes)]))
    (ROOT / "requirements.lock").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
