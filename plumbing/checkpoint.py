"""
Writes checkpoints that are whole or not there, and checks them. The rest may be skipped.

    path = save("out/pt", step, state)          # out/pt/step00001234-<first 16 of its sha256>.pt
    state, path = load("out/pt")                # the newest valid one, or load(FILE)

A checkpoint is written beside its place, flushed and renamed. Its name carries the hash of its
contents, so the one rename commits both: a crash at any moment leaves the old files or the new one.
A file that does not match its name is skipped with a message.

Files are data, never code. torch.load(weights_only=True) already refuses code in a stranger's file;
`foreign` comes before it, so that a file of a kilobyte cannot ask for a terabyte either.
"""
import hashlib
import io
import os
import pickletools
import re
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from plumbing.files import put_in_place
from plumbing.terminal import say

SAFE_TORCH = (2, 10)  # below, weights_only=True can be made to run code: CVE-2026-24747
# all that our checkpoints name in their pickle: tensors and containers of them
NAMES = {"torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter",
         "collections OrderedDict", "torch Size", "torch device", *(
             f"torch {kind}Storage" for kind in ("Float", "Double", "Half", "BFloat16", "Long",
                                                 "Int", "Short", "Char", "Byte", "Bool"))}
NAMING = {"GLOBAL", "STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"}  # operations that name code
MAX_OPS = 500_000  # of a pickle: 30 for each tensor
NAME = re.compile(r"step(\d{8,})-([0-9a-f]{16})\.pt")
_known_good: dict[Path, str] = {}  # stamps of files that were written or checked here
LARGE = 1 << 28  # bytes that take longer to check than to load: that they are good is noted beside


class _HashingFile(io.BufferedWriter):
    """A file that hashes what is written."""

    def __init__(self, path: Path):
        super().__init__(io.FileIO(path, "w"))
        self.sha = hashlib.sha256()

    def write(self, data) -> int:
        self.sha.update(data)
        return super().write(data)


def save(out_dir: str, step: int, state: dict, keep: int = 2,
         write: Callable[[dict, Any], None] = torch.save) -> Path:
    """Write `state` (tensors, numbers, strings and containers of them), then delete all but the
    newest `keep` valid files. `write` does what torch.save does, for tensors that do not exist yet
    (plumbing/weights.py). Raises FloatingPointError for weights that are not finite, OSError with
    the reason when the disk fails; older files then stay as they are."""
    for name, tensor in tensors_of(state) if write is torch.save else ():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise FloatingPointError(f"checkpoint for step {step:,} was NOT written: {name} is "
                                     "not finite")
    folder = Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob(".tmp-*"):
        stale.unlink(missing_ok=True)
    temporary = folder / f".tmp-{os.getpid()}"
    f = _HashingFile(temporary)
    try:
        with f:
            write(state, f)
            f.flush()
            os.fsync(f.fileno())
        path = folder / f"step{step:08d}-{f.sha.hexdigest()[:16]}.pt"
        put_in_place(temporary, path)
    except (OSError, RuntimeError, ValueError, KeyboardInterrupt) as error:
        cause = error if isinstance(error, OSError) else error.__context__  # which torch.save hides
        temporary.unlink(missing_ok=True)
        if not isinstance(cause, OSError):
            raise
        raise OSError(cause.errno, f"checkpoint for step {step:,} was NOT written to {folder} "
                      f"({cause.strerror}); earlier checkpoints are intact") from None
    _remember(path)
    valid = 0
    for old in list_checkpoints(out_dir):
        if valid < keep and damage(old) is None:
            valid += 1
        elif valid >= keep and old != path:
            old.unlink(missing_ok=True)
    return path


def _stamp(path: Path) -> str:
    found = path.stat()
    return f"{path.name} {found.st_size} {found.st_mtime_ns}"


def _remember(path: Path) -> None:
    _known_good[path] = _stamp(path)
    if path.stat().st_size >= LARGE:
        with suppress(OSError):  # a folder that cannot be written to
            (path.parent / ".checked").write_text(_stamp(path))


def _is_known(path: Path) -> bool:
    known = {_known_good.get(path)}
    with suppress(OSError, UnicodeDecodeError):
        known.add((path.parent / ".checked").read_text())
    return _stamp(path) in known


def list_checkpoints(out_dir: str) -> list[Path]:
    """The checkpoint files of a folder, newest first."""
    found = [(int(m[1]), p.stat().st_mtime_ns, p) for p in Path(out_dir).glob("step*.pt")
             if (m := NAME.fullmatch(p.name))]
    return [p for *_, p in sorted(found, reverse=True)]


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint file, or None. The contents are compared with the hash in the
    name, or with the checksums inside the file if it was renamed."""
    try:
        if not path.is_file():  # reading a pipe could wait forever
            return "not a file"
        if _is_known(path):
            return None
        if match := NAME.fullmatch(path.name):
            if digest(path) != match[2]:
                return "its contents do not match the hash in its name"
        else:
            if wrong := foreign(path):
                return wrong
            with zipfile.ZipFile(path) as z:
                if bad := z.testzip():
                    return f"its part {bad} does not match its checksum"
        _remember(path)
        return None
    except (OSError, zipfile.BadZipFile, RuntimeError) as error:
        return str(error)


def load(where: str) -> tuple[dict, Path]:
    """The state in a file, or in the newest valid file of a folder, and the path of that file.
    Tensors stay on disk until they are used. Raises ValueError when there is none."""
    if not os.path.exists(where):
        raise ValueError(f"{where}: no such file or folder; train_pt.py writes checkpoints")
    paths = list_checkpoints(where) if os.path.isdir(where) else [Path(where)]
    if not paths:
        raise ValueError(f"{where}: no checkpoint in this folder")
    for path in paths:
        wrong = damage(path) or foreign(path)
        if wrong is None:
            try:
                state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
                wrong = untrue(state, path.stat().st_size)
                if wrong is None:
                    return state, path
            except Exception as error:  # whatever a hostile file makes torch raise
                wrong = f"cannot be read: {str(error).splitlines()[0]}"
        if len(paths) > 1:
            say(f"{path}: {wrong}; passed over")
    raise ValueError(f"{where}: damaged or not a checkpoint: {wrong}" if len(paths) == 1
                     else f"{where}: none of its {len(paths)} checkpoints is valid")


def hash_of(path: Path | str) -> str:
    """`digest`, for which the name of a file may stand."""
    match = NAME.fullmatch(os.path.basename(path))
    return match[2] if match else digest(path)


def digest(path: Path | str) -> str:
    """The first 16 digits of the sha256 of a file's contents."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()[:16]


def fits(path: Path, state: dict, tokenizer: str, shape: dict) -> None:
    """Raises ValueError unless a checkpoint's model has this shape and uses this tokenizer."""
    differ = [f"{key} is {value}, asked for {shape[key]}"
              for key, value in state["model_config"].items() if value != shape[key]]
    if differ:
        raise ValueError(f"{path}: its model has another shape: {', '.join(differ)}")
    if state["tokenizer"] != tokenizer:
        raise ValueError(f"{path}: made with another tokenizer than that of the data")


def foreign(path: Path) -> str | None:
    """What is in a file and in no checkpoint of ours, or None. Only the list of the archive's parts
    and the names in its pickle are read: nothing is unpacked, built or allocated."""
    version = tuple(int(n) for n in re.findall(r"\d+", torch.__version__)[:2])
    if version < SAFE_TORCH:
        return (f"not opened: with torch {torch.__version__} a file can run code of its own "
                "(CVE-2026-24747); pip install 'torch>=2.10'")
    try:
        with zipfile.ZipFile(path) as z:
            parts = z.infolist()
            names = [part.filename for part in parts]
            if any(part.compress_type != zipfile.ZIP_STORED for part in parts):
                return "has compressed parts, which checkpoints never have"
            if len(set(names)) < len(names) or any(
                    ".." in name.split("/") or name.startswith(("/", "\\")) for name in names):
                return "has parts of the same name, or outside the archive"
            if sum(part.file_size for part in parts) > path.stat().st_size:
                return "has parts that overlap"
            pickles = [name for name in names if name.endswith("/data.pkl")]
            if len(pickles) != 1:
                return "not written by torch.save"
            for n, (op, value, _) in enumerate(pickletools.genops(z.read(pickles[0]))):
                if n == MAX_OPS:
                    return f"its pickle has more than {MAX_OPS:,} operations"
                if op.name in NAMING and value not in NAMES:
                    name = str(value or op.name).replace(" ", ".")
                    return f"refers to {name!r:.80}, which a checkpoint never does"
        return None
    except Exception as error:  # zipfile and pickletools raise whatever comes to their mind
        return f"damaged: {str(error)[:80]}"


def untrue(state, size: int) -> str | None:
    """What a state from a file of `size` bytes claims and does not hold, or None: the model that it
    describes will be allocated next."""
    if not isinstance(state, dict) or state.get("format") != 1:
        return "not a checkpoint of this program"
    weights = state.get("model", {})
    if not isinstance(weights, dict) or not all(
            isinstance(t, torch.Tensor) for t in weights.values()):
        return "its model is not made of tensors"
    storages = {}
    for name, t in tensors_of(state):
        held = t.untyped_storage().nbytes() if t.layout == torch.strided else 0
        if t.numel() * t.element_size() > held:
            return f"{name} claims {t.numel():,} numbers and holds fewer"
        storages[t.untyped_storage().data_ptr()] = held
    if sum(storages.values()) > size:
        return "its tensors claim more numbers than it holds"
    config = state.get("model_config")
    if config is None or "adapter" in state:  # its base too
        return None
    try:
        heads = 2 * (config["n_head"] + config["n_kv_head"]) * config["head_dim"]
        layer = config["n_embd"] * (heads + 3 * config["n_hidden"])
        asked = config["vocab_size"] * config["n_embd"] + config["n_layer"] * layer
        held = sum(t.numel() * (2 if t.dtype == torch.uint8 else 1)  # a byte may be two of 4 bits
                   for t in weights.values())
        return None if asked <= held else (f"its shape asks for {asked:,} parameters, it holds "
                                           f"{held:,}")
    except (KeyError, TypeError):
        return "holds no language model: its shape is damaged"


def tensors_of(value, name: str = "state") -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor inside a state, with where it stands: "state.model.norm.weight"."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, (dict, list, tuple)):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from tensors_of(part, f"{name}.{key}")
