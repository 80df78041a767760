"""
Thirty model files that nobody should open: what reliability.py tries on `generate.py`.

    for name, path in write_all(folder, good, marker): …     # good: the state of a real checkpoint

Each tries to run code (then the file `marker` appears), to fill the memory, to hang, to leave its
folder, or to describe a model that it does not hold.
"""
import io
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path

import torch


class Call:
    """Pickled, it makes the reader call `function(*arguments)`."""

    def __init__(self, function, *arguments):
        self.do = function, arguments

    def __reduce__(self):
        return self.do


class Build:
    """Pickled, it makes the reader call Call's victim from __setstate__'s side: a BUILD."""

    def __init__(self, function, *arguments):
        self.do = function, arguments

    def __reduce__(self):
        return dict, (), {"x": Call(*self.do[0:1], *self.do[1])}


def archive(path: Path, parts: list[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED):
    """A zip file with these parts, twice the same name allowed."""
    with zipfile.ZipFile(path, "w", compression) as z:
        for name, content in parts:
            z.writestr(zipfile.ZipInfo(name), content, compression)


def parts_of(state) -> list[tuple[str, bytes]]:
    """What torch.save puts into its archive."""
    whole = io.BytesIO()
    torch.save(state, whole)
    with zipfile.ZipFile(whole) as z:
        return [(name, z.read(name)) for name in z.namelist()]


def with_pickle(path: Path, raw: bytes, good: dict) -> None:
    """The good archive with another data.pkl."""
    archive(path, [(name, raw if name.endswith("data.pkl") else content)
                   for name, content in parts_of(good)])


def changed(good: dict, **config) -> dict:
    state = dict(good)
    state["model_config"] = {**good["model_config"], **config}
    return state


def tokenizer_with(good: dict, pattern: str | None = None, lines: str | None = None) -> dict:
    """The good state with a tokenizer whose sha256 is right and whose contents are not."""
    import json

    from tokenizer import _digest
    first, _, ranks = good["tokenizer"].partition("\n")
    head = json.loads(first)
    head["pattern"] = pattern or head["pattern"]
    ranks = lines if lines is not None else ranks
    head["sha256"] = _digest(head, ranks)
    return {**good, "tokenizer": json.dumps(head) + "\n" + ranks}


def write_all(folder: Path, good: dict, marker: Path) -> Iterator[tuple[str, Path]]:
    """(what it tries, path) of each of the thirty files."""
    touch = open, str(marker), "w"
    shell = f"cos\nsystem\n(S'touch {marker}'\ntR.".encode()
    first = next(iter(good["model"]))

    def saved(state) -> Callable[[Path], None]:
        return lambda path: torch.save(state, path)

    def with_raw(raw: bytes) -> Callable[[Path], None]:
        return lambda path: with_pickle(path, raw, good)

    def with_model(**tensors) -> Callable[[Path], None]:
        return saved({**good, "model": {**good["model"], **tensors}})

    def overlong(path: Path) -> None:  # says its first storage holds 2^40 numbers
        parts = parts_of(good)
        numel = good["model"][first].untyped_storage().nbytes() // 4
        i = next(i for i, (name, _) in enumerate(parts) if name.endswith("data.pkl"))
        name, raw = parts[i]
        for old in (b"K" + bytes([numel & 255]), b"M" + struct.pack("<H", numel & 0xffff)):
            raw = raw.replace(old + b"t", b"\x8a\x06" + struct.pack("<q", 1 << 40)[:6] + b"t", 1)
        parts[i] = name, raw
        archive(path, parts)

    def swapped(path: Path) -> None:  # two parts of one name: which is checked, which is used?
        parts = parts_of(good)
        evil = parts_of({**good, "x": Call(*touch)})
        archive(path, parts + [part for part in evil if part[0].endswith("data.pkl")])

    def escaping(path: Path) -> None:
        archive(path, parts_of(good) + [("archive/../../escaped", b"x")])

    def bomb(path: Path) -> None:
        archive(path, parts_of(good) + [("archive/data/999", bytes(400 << 20))],
                zipfile.ZIP_DEFLATED)

    def huge_header(path: Path) -> None:  # as of a safetensors file: length, then JSON
        path.write_bytes(struct.pack("<Q", 1 << 63) + b'{"w": {}}')

    def legacy(path: Path) -> None:  # the format of torch before 1.6: pickles behind one another
        torch.save({**good, "x": Call(*touch)}, path, _use_new_zipfile_serialization=False)

    def plain(path: Path) -> None:
        path.write_bytes(pickle.dumps({"format": 1, "x": Call(*touch)}))

    def torchscript(path: Path) -> None:
        archive(path, parts_of(good) + [("archive/code/__torch__.py", b"import os"),
                                        ("archive/constants.pkl", b"\x80\x02).")])

    tries: list[tuple[str, Callable[[Path], None]]] = [
        ("code: reduce", saved({**good, "x": Call(*touch)})),
        ("code: reduce in a tensor's place", with_model(**{first: Call(*touch)})),
        ("code: build", saved({**good, "x": Build(*touch)})),
        ("code: os.system", with_raw(b"\x80\x02" + shell)),
        ("code: exec", with_raw(f"\x80\x02cbuiltins\nexec\n(X{{}}tR.".format("").encode()[:20]
                                + b"(S'open(1)'\ntR.")),
        ("code: inst", with_raw(f"(S'touch {marker}'\nios\nsystem\n.".encode())),
        ("code: obj", with_raw(f"(cos\nsystem\nS'touch {marker}'\no.".encode())),
        ("code: stack global", with_raw(
            pickle.dumps(Call(os.system, f"touch {marker}"), protocol=4))),
        ("code: extension registry", with_raw(b"\x80\x02\x82\x01.")),
        ("code: torch.hub", with_raw(b"\x80\x02ctorch.hub\nload\n(S'x'\nS'y'\ntR.")),
        ("code: legacy format", legacy), ("code: plain pickle", plain),
        ("code: torchscript", torchscript), ("code: second part of the same name", swapped),
        ("memory: 2 GB bytearray", with_raw(
            b"\x80\x02c__builtin__\nbytearray\n(J" + struct.pack("<i", 2_000_000_000) + b"tR.")),
        ("memory: zip bomb", bomb), ("memory: storage of 2^40", overlong),
        ("memory: tensor of 2^40, stride 0", with_model(
            **{first: torch.zeros(1).as_strided((1 << 20, 1 << 20), (0, 0))})),
        ("memory: 10^9 layers", saved(changed(good, n_layer=10**9))),
        ("memory: width 10^7", saved(changed(good, n_embd=10**7))),
        ("memory: meta tensors", with_model(**{first: torch.empty(1 << 40, device="meta")})),
        ("memory: header of 2^63", huge_header),
        ("memory: a million nested lists", with_raw(b"\x80\x02" + b"]" * 10**6 + b"a" * 10**6
                                                    + b".")),
        ("path: part outside the archive", escaping),
        ("path: link to /dev/zero", lambda path: path.symlink_to("/dev/zero")),
        ("path: a pipe", lambda path: os.mkfifo(path)),
        ("shape: another width", with_model(**{first: torch.zeros(3, 3)})),
        ("shape: text in place of tensors", with_model(**{first: "text"})),
        ("tokenizer: pattern that explodes", saved(tokenizer_with(
            good, pattern="((a{1000}){1000}){1000}"))),
        ("tokenizer: ranks beyond the vocabulary", saved(tokenizer_with(
            good, lines=deepcopy(good["tokenizer"]).partition("\n")[2] + "/////w== 4000000000\n"))),
    ]
    for i, (name, write) in enumerate(tries):
        path = folder / f"hostile{i:02d}.pt"
        write(path)
        yield name, path
