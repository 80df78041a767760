"""
Token files: a 256-byte header, then the token ids of many documents, each closed by <|endoftext|>;
`open_data` maps those of a folder, and how they are checked may be skipped.
"""
import hashlib
import os
import struct
import zlib
from dataclasses import dataclass

import numpy as np

from plumbing.folder import mapped, read_meta
from tokenizer import Tokenizer, load_tokenizer

IGNORE = -100  # target of a position that is not scored
HEADER = struct.Struct("<8sIIQQQQ32s32s16s")  # fields as in pack_header, zero-padded to 252
HEADER_BYTES = 256  # the last 4 are a crc32 of the others
HASHED_BYTES = 1 << 30  # contents up to so many are hashed when a file is opened: 1 s


@dataclass
class TokenFile:
    """A mapped token file: `ids` is (count,) uint16 or uint32, read from disk as it is used."""
    path: str
    ids: np.ndarray
    vocab_size: int
    n_bytes: int  # of the UTF-8 text that the ids stand for
    n_docs: int
    tokenizer: str  # sha256 of the tokenizer that made it
    sha256: str  # of the ids
    lang: str


def id_type(tok: Tokenizer) -> np.dtype:
    return np.dtype("<u2" if tok.n_vocab <= 1 << 16 else "<u4")


def pack_header(width: int, count: int, vocab_size: int, n_bytes: int, n_docs: int,
                tokenizer: str, payload: bytes, lang: str) -> bytes:
    """Magic, version, bytes per id, count of ids, vocabulary, text bytes, documents, sha256 of the
    tokenizer and of the payload, language."""
    head = HEADER.pack(b"KHAOSZ\0\0", 1, width, count, vocab_size, n_bytes, n_docs,
                       bytes.fromhex(tokenizer), payload, lang.encode())
    head = head.ljust(HEADER_BYTES - 4, b"\0")
    return head + struct.pack("<I", zlib.crc32(head))


def open_token_file(path: str) -> TokenFile:
    """Map a token file after a check of its header and size, and of its contents up to
    HASHED_BYTES. Raises ValueError naming the file."""
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as f:
            head = f.read(HEADER_BYTES)
            magic, version, width, count, vocab_size, n_bytes, n_docs, tok, payload, lang = (
                HEADER.unpack_from(head.ljust(HEADER_BYTES, b"\0")))
            if magic != b"KHAOSZ\0\0" or struct.unpack("<I", head[-4:])[0] != zlib.crc32(head[:-4]):
                raise ValueError(f"{path}: not a token file, or its header is damaged")
            if version != 1 or width not in (2, 4):
                raise ValueError(f"{path}: written by a newer version of data.py")
            if size != HEADER_BYTES + count * width:
                raise ValueError(f"{path}: damaged: {size:,} bytes, its header says "
                                 f"{HEADER_BYTES + count * width:,}")
            if size <= HASHED_BYTES and hashlib.file_digest(f, "sha256").digest() != payload:
                raise ValueError(f"{path}: damaged: its contents do not match their sha256")
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    ids = mapped(path, np.dtype(f"<u{width}"), HEADER_BYTES)
    return TokenFile(path, ids, vocab_size, n_bytes, n_docs, tok.hex(), payload.hex(),
                     lang.rstrip(b"\0").decode())


def check_ids(file: TokenFile, ids: np.ndarray) -> None:
    """Raises ValueError for an id outside the vocabulary, which would read past the embedding."""
    if ids.max(initial=0) >= file.vocab_size:
        raise ValueError(f"{file.path}: holds the id {ids.max()}, outside its vocabulary of "
                         f"{file.vocab_size}")


def open_data(data_dir: str) -> tuple[Tokenizer, dict[str, list[TokenFile]]]:
    """The tokenizer of a prepared folder and its files by split, languages in alphabetical order.
    Raises ValueError when something is missing, damaged or does not belong together."""
    meta = read_meta(data_dir)
    if not meta:
        raise ValueError(f"{data_dir}: no prepared data here; make it with python data.py "
                         f"--input=PATHS --tokenizer=FILE --out_dir={data_dir}")
    tok = load_tokenizer(os.path.join(data_dir, "tokenizer.txt"))
    splits: dict[str, list[TokenFile]] = {"train": [], "val": []}
    for name in sorted(meta["files"]):
        file = open_token_file(os.path.join(data_dir, name))
        if file.tokenizer != tok.sha256 or file.vocab_size != tok.n_vocab:
            raise ValueError(f"{file.path}: made with another tokenizer than {tok.name}")
        splits[name.partition("_")[0]].append(file)
    return tok, splits

