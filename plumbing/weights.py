"""
Tensors in files: finds them and reads a few rows at a time, and writes some; may be skipped.

    safetensors   n (8 bytes) | n bytes of JSON: {name: {dtype, shape, data_offsets}} | numbers
    GGUF          "GGUF", version, counts | settings | name, shape, type, offset of each | numbers

The files are made by strangers. All that a header says is compared with the size of the file before
a number is read, and nothing is allocated for what is not there.
"""
import io
import json
import math
import pickle
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from plumbing.files import whole

SAFE = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
AT_ONCE = 1 << 20  # numbers
LONGEST_HEADER = 100 << 20
PLAIN = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}  # numbers of types
FORMS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd"))  # numbers of settings' types
TEXT, ARRAY = 8, 9


class Stored(NamedTuple):
    """A tensor in a file."""
    path: Path
    start: int
    shape: tuple[int, ...]
    kind: torch.dtype | int  # or the number of a GGUF type, which packs several numbers in a block

    @property
    def row(self) -> int:
        """Bytes of a row."""
        if isinstance(self.kind, torch.dtype):
            return self.shape[-1] * self.kind.itemsize
        per_block, width = block_of(self.kind)
        return self.shape[-1] // per_block * width

    def rows(self, first: int, last: int) -> Tensor:
        """These rows of a matrix; of a vector there is one."""
        raw = np.fromfile(self.path, np.uint8, (last - first) * self.row, offset=self.start
                          + first * self.row).reshape(last - first, self.row)
        if isinstance(self.kind, torch.dtype):
            return torch.from_numpy(raw).view(self.kind)
        import gguf
        return torch.from_numpy(gguf.dequantize(raw, gguf.GGMLQuantizationType(self.kind)))

    def read(self, out: Tensor) -> None:
        """Fill `out`, further rows with the last one. Raises ValueError for NaN or infinity."""
        rows = math.prod(self.shape[:-1])
        out = out.view(-1, self.shape[-1])
        step = max(1, AT_ONCE // self.shape[-1])
        for first in range(0, rows, step):
            last = min(first + step, rows)
            out[first:last] = self.rows(first, last)
            if not torch.isfinite(out[first:last]).all():
                raise ValueError("holds numbers that are not finite")
        out[rows:] = out[rows - 1]


def block_of(kind: int) -> tuple[int, int]:
    """Numbers in a block of a GGUF type, and its bytes. Raises ValueError for an unknown type."""
    import gguf
    name = gguf.GGMLQuantizationType(kind).name
    if name not in ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K"):
        raise ValueError(f"its numbers are of the type {name}, which is not read here")
    return gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]


def checked(path: Path, name: str, start: int, shape: list[int], kind: torch.dtype | int,
            size: int) -> Stored:
    """Raises ValueError unless the tensor can lie in a file of `size` bytes."""
    if not 1 <= len(shape) <= 2 or not all(type(n) is int and 0 < n < 1 << 40 for n in shape):
        raise ValueError(f"{path}: {name!r:.60} has the shape {shape!s:.60}")
    found = Stored(path, start, tuple(shape), kind)
    if not isinstance(kind, torch.dtype) and shape[-1] % block_of(kind)[0]:
        raise ValueError(f"{path}: {name!r:.60} has rows of {shape[-1]}, not whole blocks")
    if start + math.prod(shape[:-1]) * found.row > size:
        raise ValueError(f"{path}: {name!r:.60} ends after the end of the file: cut short?")
    return found


def apart(path: Path, found: dict[str, Stored]) -> dict[str, Stored]:
    """Raises ValueError if tensors overlap."""
    end = 0
    for name, t in sorted(found.items(), key=lambda item: item[1].start):
        if t.start < end:
            raise ValueError(f"{path}: {name!r:.60} overlaps another tensor")
        end = t.start + math.prod(t.shape[:-1]) * t.row
    return found


def stream(state: dict, f: IO[bytes], fill: Callable[[str, Tensor], None]) -> None:
    """What torch.save does, but in the memory of the largest tensor: those in state["model"] are
    empty (torch.empty takes no memory until it is written to), and one after the other is filled in
    the same place by `fill` and written."""
    keys: dict[int, str] = {}

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> tuple | None:
            if not isinstance(obj, torch.storage.TypedStorage):
                return None
            key = keys.setdefault(obj._untyped_storage._cdata, str(len(keys)))
            return "storage", getattr(torch, obj._pickle_storage_type()), key, "cpu", obj._size()
    text, archive, model = io.BytesIO(), torch._C.PyTorchFileWriter(f), state["model"]
    Pickler(text, 2).dump(state)
    place = max(model.values(), key=torch.Tensor.numel)
    try:
        archive.write_record("data.pkl", text.getvalue(), len(text.getvalue()))
        archive.write_record("byteorder", sys.byteorder, len(sys.byteorder))
        for name, empty in model.items():
            if key := keys.pop(empty.untyped_storage()._cdata, ""):  # a tied matrix has two names
                out = place.view(-1)[:empty.numel()].view(empty.shape)
                fill(name, out)
                archive.write_record(f"data/{key}", out.untyped_storage(), out.nbytes)
    finally:
        archive.write_end_of_file()  # without it the end of this function ends the program


# ---------------------------------------------------------------------------- safetensors

def read_safetensors(path: Path) -> dict[str, Stored]:
    """The tensors of a file. Raises ValueError for one that is damaged."""
    size, found = path.stat().st_size, {}
    with open(path, "rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if not 2 <= length <= min(size - 8, LONGEST_HEADER):
            raise ValueError(f"{path}: not a safetensors file, or cut short")
        text = f.read(length)
    try:
        for name, info in json.loads(text).items():
            if name != "__metadata__":
                begin, end = info["data_offsets"]
                kind = SAFE.get(info["dtype"])
                if kind is None:
                    raise ValueError(f"{name!r:.60} is of the type {info['dtype']!r:.20}, which is "
                                     "not read here")
                found[name] = checked(path, name, 8 + length + begin, info["shape"], kind, size)
                if begin < 0 or end - begin != math.prod(info["shape"]) * kind.itemsize:
                    raise ValueError(f"{name!r:.60} has {end - begin:,} bytes for the shape "
                                     f"{info['shape']}")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from None
    return apart(path, found)


def shards(folder: Path, index: dict | None) -> list[Path]:
    """The weight files of a folder. Raises ValueError for none, or a path that leads out of it."""
    if index is not None:
        names = sorted({str(name) for name in index["weight_map"].values()})
        if any(name != Path(name).name or not name.endswith(".safetensors") for name in names):
            raise ValueError("its index names files outside the folder")
    else:
        names = [path.name for path in folder.glob("*.safetensors")]
        names = ["model.safetensors"] if "model.safetensors" in names else names
        if not names:
            raise ValueError("holds no .safetensors file; .bin files can hold programs, and are "
                             "not read")
        if len(names) > 1:
            raise ValueError("holds several .safetensors files, and no index of them")
    return [folder / name for name in names]


def write_safetensors(path: Path, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype,
                      make: Callable[[str], Tensor]) -> None:
    """Write tensors of these names and shapes, of which one is made at a time."""
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    at = 0
    kind = next(kind for kind, known in SAFE.items() if known == dtype)
    for name, shape in shapes.items():
        size = math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with whole(path) as temporary, open(temporary, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for name in shapes:
            f.write(make(name).to(dtype).contiguous().view(torch.uint8).numpy().data)


# ---------------------------------------------------------------------------- GGUF

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
