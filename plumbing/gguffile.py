"""
GGUF files, of llama.cpp and ollama: what they hold, and writes them; may be skipped.

    "GGUF", version, counts | settings | name, shape, type, offset of each tensor | numbers
"""
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from plumbing.files import whole
from plumbing.weights import AT_ONCE, Stored, apart, checked

PLAIN = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}  # numbers of types
FORMS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd"))  # numbers of settings' types
TEXT, ARRAY = 8, 9


class Header:
    """The start of a GGUF file, read value by value. Raises ValueError past the end of the file."""

    def __init__(self, f: BinaryIO, size: int):
        self.f, self.size = f, size

    def take(self, form: str) -> tuple:
        raw = self.f.read(struct.calcsize("<" + form))
        return struct.unpack("<" + form, raw)

    def room(self, n: int, width: int) -> int:
        if n * width > self.size - self.f.tell():
            raise ValueError("says that it holds more than it does")
        return n

    def text(self) -> str:
        return self.f.read(self.room(self.take("Q")[0], 1)).decode()

    def value(self, kind: int) -> Any:
        if kind == TEXT:
            return self.text()
        if kind != ARRAY:
            return self.take(FORMS[kind])[0]
        kind, n = self.take("IQ")
        if kind == TEXT:
            return [self.text() for _ in range(self.room(n, 8))]
        return list(self.take(f"{self.room(n, struct.calcsize(FORMS[kind]))}{FORMS[kind]}"))


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, Stored]]:
    """Settings and tensors of a file. Raises ValueError for one that is damaged."""
    size, meta, places, found = path.stat().st_size, {}, {}, {}
    try:
        with open(path, "rb") as f:
            head = Header(f, size)
            magic, version, n_tensors, n_values = head.take("4sIQQ")
            if magic != b"GGUF" or version not in (2, 3):
                raise ValueError("not a GGUF file of version 2 or 3")
            for _ in range(head.room(n_values, 13)):
                key = head.text()
                meta[key] = head.value(*head.take("I"))
            for _ in range(head.room(n_tensors, 24)):
                name = head.text()
                n, = head.take("I")
                places[name] = head.take(f"{min(n, 9)}Q"), *head.take("IQ")
            align = meta.get("general.alignment", 32)
            base = f.tell() + -f.tell() % align
        for name, (shape, kind, offset) in places.items():
            found[name] = checked(path, name, base + offset, [*shape[::-1]],
                                  PLAIN.get(kind, kind), size)
    except (struct.error, ValueError, TypeError, KeyError, ZeroDivisionError, RecursionError,
            ) as error:
        why = str(error).removeprefix(f"{path}: ") if type(error) is ValueError else "damaged"
        raise ValueError(f"{path}: {why}") from None
    return meta, apart(path, found)


def packed(t: Tensor, kind: int) -> np.ndarray:
    """The bytes of a tensor in a GGUF type, (rows, bytes of a row)."""
    import gguf
    t = t.view(-1, t.size(-1))
    step = max(1, AT_ONCE // t.size(-1))
    return np.concatenate([gguf.quantize(part.float().numpy(), gguf.GGMLQuantizationType(kind))
                           .view(np.uint8) for part in t.split(step)])


def write_gguf(path: str, name: str, meta: dict[str, Any], tensors: dict[str, tuple],
               make: Callable[[str], Tensor]) -> None:
    """Write settings, and tensors of these shapes and types, of which one is made at a time."""
    import gguf
    with whole(path) as temporary:
        file = gguf.GGUFWriter(temporary, name, use_temp_file=True)
        for key, value in meta.items():
            add: Any = {bool: file.add_bool, int: file.add_uint32, float: file.add_float32,
                        str: file.add_string, list: file.add_array}[type(value)]
            add(key, value)
        for key, (shape, kind) in tensors.items():
            file.add_tensor(key, packed(make(key), kind).reshape(*shape[:-1], -1),
                            raw_dtype=gguf.GGMLQuantizationType(kind))
        file.write_header_to_file()
        file.write_kv_data_to_file()
        file.write_tensors_to_file()
        file.close()


def same(a: Stored, b: Stored) -> bool:
    """Whether two matrices are the same, byte by byte."""
    step = max(1, AT_ONCE // a.shape[-1])
    return a[2:] == b[2:] and all(torch.equal(a.rows(i, min(i + step, a.shape[0])),
                                              b.rows(i, min(i + step, a.shape[0])))
                                  for i in range(0, a.shape[0], step))
