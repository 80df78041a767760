"""
Thirty model files that nobody should open.

    for name, path in write_all(folder, good, marker): …  # good: the state of a real checkpoint

Each tries to run code (then the file `marker` appears), to fill the memory, to hang, to leave its
folder, or to describe a model that it does not hold.
"""
import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from tokenizer import HAN_PATTERN, _digest

Writer = Callable[[Path], object]


class Reduced:
    """Pickled, it makes the reader call `function(*arguments)`; a third value becomes a BUILD."""

    def __init__(self, *parts):
        self.parts = parts

    def __reduce__(self):
        return self.parts


def parts_of(state) -> list[tuple[str, bytes]]:
    """What torch.save puts into its archive: names and contents."""
    archive = io.BytesIO()
    torch.save(state, archive)
    with zipfile.ZipFile(archive) as z:
        return [(name, z.read(name)) for name in z.namelist()]


def archive(parts: list[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED) -> Writer:
    """Writes a zip file with these parts; a name may come twice."""
    def write(path: Path) -> None:
        with zipfile.ZipFile(path, "w", compression) as z:
            for name, content in parts:
                z.writestr(zipfile.ZipInfo(name), content, compression)
    return write


def with_tokenizer(good: dict, pattern: str = HAN_PATTERN, more_ranks: str = "") -> dict:
    """The good state with a tokenizer whose sha256 is right and whose contents are not."""
    first, _, ranks = good["tokenizer"].partition("\n")
    head, ranks = json.loads(first) | {"pattern": pattern}, ranks + more_ranks
    head["sha256"] = _digest(head, ranks)
    return {**good, "tokenizer": json.dumps(head) + "\n" + ranks}


def write_all(folder: Path, good: dict, marker: Path) -> Iterator[tuple[str, Path]]:
    """(what it tries, path) of each of the thirty files."""
    call, touch = Reduced(open, (str(marker), "w")), f"touch {marker}"
    first, parts, evil = next(iter(good["model"])), parts_of(good), {**good, "x": call}

    def saved(state, **how) -> Writer:
        return lambda path: torch.save(state, path, **how)

    def config(**changes) -> Writer:
        return saved({**good, "model_config": good["model_config"] | changes})

    def tensor(value) -> Writer:
        return saved({**good, "model": {**good["model"], first: value}})

    def raw(content: bytes) -> Writer:
        """The good archive with another data.pkl."""
        return archive([(name, content if name.endswith("data.pkl") else old)
                        for name, old in parts])

    # a storage that says it holds 2^40 numbers, in the place of one that says how many it has
    numel = good["model"][first].untyped_storage().nbytes() // 4
    overlong = next(old for name, old in parts if name.endswith("data.pkl"))
    for size in (b"K" + bytes([numel & 255]), b"M" + struct.pack("<H", numel & 0xffff)):
        overlong = overlong.replace(size + b"t", b"\x8a\x06\0\0\0\0\0\1t", 1)

    tries: list[tuple[str, Writer]] = [
        ("code: reduce", saved(evil)),
        ("code: reduce in a tensor's place", tensor(call)),
        ("code: build", saved({**good, "x": Reduced(dict, (), {"x": call})})),
        ("code: os.system", raw(f"\x80\x02cos\nsystem\n(S'{touch}'\ntR.".encode("latin-1"))),
        ("code: exec", raw(f"cbuiltins\nexec\n(Vopen('{marker}', 'w')\ntR.".encode())),
        ("code: inst", raw(f"(S'{touch}'\nios\nsystem\n.".encode())),
        ("code: obj", raw(f"(cos\nsystem\nS'{touch}'\no.".encode())),
        ("code: stack global", raw(pickle.dumps(Reduced(os.system, (touch,)), protocol=4))),
        ("code: extension registry", raw(b"\x80\x02\x82\x01.")),
        ("code: torch.hub", raw(b"\x80\x02ctorch.hub\nload\n(S'x'\nS'y'\ntR.")),
        ("code: legacy format", saved(evil, _use_new_zipfile_serialization=False)),
        ("code: plain pickle", lambda path: path.write_bytes(
            pickle.dumps({"format": 1, "x": call}))),
        ("code: torchscript", archive([*parts, ("archive/code/__torch__.py", b"import os"),
                                       ("archive/constants.pkl", b"\x80\x02).")])),
        # which of two parts of one name is checked, and which is used?
        ("code: second part of the same name", archive(
            parts + [part for part in parts_of(evil) if part[0].endswith("data.pkl")])),
        ("memory: 2 GB bytearray", raw(
            b"\x80\x02c__builtin__\nbytearray\n(J" + struct.pack("<i", 2_000_000_000) + b"tR.")),
        ("memory: zip bomb", archive([*parts, ("archive/data/999", bytes(400 << 20))],
                                     zipfile.ZIP_DEFLATED)),
        ("memory: storage of 2^40", raw(overlong)),
        ("memory: tensor of 2^40, stride 0", tensor(
            torch.zeros(1).as_strided((1 << 20, 1 << 20), (0, 0)))),
        ("memory: 10^9 layers", config(n_layer=10**9)),
        ("memory: width 10^7", config(n_embd=10**7)),
        ("memory: meta tensors", tensor(torch.empty(1 << 40, device="meta"))),
        ("memory: header of 2^63", lambda path: path.write_bytes(  # of a safetensors file
            struct.pack("<Q", 1 << 63) + b'{"w": {}}')),
        ("memory: a million nested lists", raw(
            b"\x80\x02" + b"]" * 10**6 + b"a" * 10**6 + b".")),
        ("path: part outside the archive", archive([*parts, ("archive/../../escaped", b"x")])),
        ("path: link to /dev/zero", lambda path: path.symlink_to("/dev/zero")),
        ("path: a pipe", lambda path: os.mkfifo(path)),
        ("shape: another width", tensor(torch.zeros(3, 3))),
        ("shape: text in place of tensors", tensor("text")),
        ("tokenizer: pattern that explodes", saved(with_tokenizer(
            good, pattern="((a{1000}){1000}){1000}"))),
        ("tokenizer: ranks beyond the vocabulary", saved(with_tokenizer(
            good, more_ranks="/////w== 4000000000\n")))]
    for i, (name, write) in enumerate(tries):
        path = folder / f"hostile{i:02d}.pt"
        write(path)
        yield name, path
