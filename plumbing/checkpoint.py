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
import os
import pickletools
import re
import stat
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from plumbing.files import put_in_place
from plumbing.terminal import printable

SAFE_TORCH = (2, 10)  # below, weights_only=True can be made to run code: CVE-2026-24747
# all that our checkpoints name in their pickle: tensors and containers of them
WIDTH = {f"torch {kind}Storage": width for kind, width in {
    "Float": 4, "Double": 8, "Half": 2, "BFloat16": 2, "Long": 8, "Int": 4, "Short": 2, "Char": 1,
    "Byte": 1, "Bool": 1}.items()}  # bytes of a number
NAMES = {"torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter",
         "collections OrderedDict", "torch Size", "torch device", *WIDTH}
MAX_OPS = 500_000  # of a pickle: 30 for each tensor
NAME = re.compile(r"step(\d{8,})-([0-9a-f]{16})\.pt")
_known_good: dict[Path, tuple[int, int]] = {}  # (size, mtime) of files written or checked here
LARGE = 1 << 28  # bytes that take longer to check than to load: that they are good is noted beside


class _HashingFile:
    """A file that hashes what is written, and keeps the first OSError, which torch.save hides."""

    def __init__(self, path: Path):
        self.file = open(path, "wb")
        self.sha = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data) -> int:
        try:
            n = self.file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise
        self.sha.update(data)
        return n

    def flush(self) -> None:
        self.file.flush()


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
    f = None
    try:
        f = _HashingFile(temporary)
        write(state, f)
        f.flush()
        os.fsync(f.file.fileno())
        f.file.close()
        path = folder / f"step{step:08d}-{f.sha.hexdigest()[:16]}.pt"
        put_in_place(temporary, path)
    except (OSError, RuntimeError, ValueError) as error:
        cause = (f and f.error) or error
        if f:
            with suppress(OSError):  # what could not be written before cannot be written now
                f.file.close()
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
        elif valid >= keep:
            old.unlink(missing_ok=True)
    return path


def _stamp(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def _remember(path: Path) -> None:
    stamp = _known_good[path] = _stamp(path)
    if stamp[0] >= LARGE:
        with suppress(OSError):  # a folder that cannot be written to
            (path.parent / ".checked").write_text(f"{path.name} {stamp}")


def _is_known(path: Path) -> bool:
    stamp = _stamp(path)
    if _known_good.get(path) != stamp and stamp[0] >= LARGE:
        with suppress(OSError, UnicodeDecodeError):
            return (path.parent / ".checked").read_text() == f"{path.name} {stamp}"
    return _known_good.get(path) == stamp


def list_checkpoints(out_dir: str) -> list[Path]:
    """The checkpoint files of a folder, newest first."""
    found = [(int(m[1]), p.stat().st_mtime_ns, p) for p in Path(out_dir).glob("step*.pt")
             if (m := NAME.fullmatch(p.name))]
    return [p for *_, p in sorted(found, reverse=True)]


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint file, or None. The contents are compared with the hash in the
    name, or with the checksums inside the file if it was renamed."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # reading a pipe could wait forever
            return "not a file"
        if _is_known(path):
            return None
        if match := NAME.fullmatch(path.name):
            with open(path, "rb") as f:
                if hashlib.file_digest(f, "sha256").hexdigest()[:16] != match[2]:
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


def load(where: str, device: str | torch.device = "cpu") -> tuple[dict, Path]:
    """The state in a file, or in the newest valid file of a folder, and the path of that file. For
    the CPU, tensors stay on disk until they are used. Raises ValueError when there is none."""
    if os.path.isdir(where):
        paths = list_checkpoints(where)
        if not paths:
            raise ValueError(f"{where}: no checkpoint in this folder")
    elif os.path.exists(where):
        paths = [Path(where)]
    else:
        raise ValueError(f"{where}: no such file or folder; train_pt.py writes checkpoints")
    for path in paths:
        wrong = damage(path) or foreign(path)
        if wrong is None:
            try:
                mmap = torch.device(device).type == "cpu"
                state = torch.load(path, map_location=device, weights_only=True, mmap=mmap)
                wrong = untrue(state, path.stat().st_size)
                if wrong is None:
                    return state, path
            except Exception as error:  # whatever a hostile file makes torch raise
                wrong = f"cannot be read: {str(error).splitlines()[0]}"
        if len(paths) > 1:
            print(printable(f"{path}: {wrong}; passed over"), file=sys.stderr)
    raise ValueError(f"{where}: damaged or not a checkpoint: {wrong}" if len(paths) == 1
                     else f"{where}: none of its {len(paths)} checkpoints is valid")


def restore(cfg, kind: str, optimizers: list, tokenizer: str, shape: dict,
            data_id: int) -> tuple[int, dict]:
    """The step at which a run starts, and the state to load: those of the newest checkpoint with
    --resume, else (0, {}). Prints which settings have changed, and whether the training data has.
    Raises ValueError if that checkpoint does not fit, or if a fresh run would be mixed with an
    older one."""
    say = print if os.environ.get("RANK", "0") == "0" else lambda text: None
    found = list_checkpoints(cfg.out_dir)
    if found and not cfg.resume:
        raise ValueError(f"{cfg.out_dir} holds a run already: continue it with --resume, or give "
                         "another --out_dir")
    if not found:
        if cfg.resume:
            say(f"nothing to resume in {cfg.out_dir}: starting at step 0")
        return 0, {}
    state, path = load(cfg.out_dir)
    if state["kind"] != kind:
        raise ValueError(f"{path}: is a checkpoint of stage {state['kind']}, not of {kind}")
    fits(path, state, tokenizer, shape)
    if len(state["optimizer"]) != len(optimizers):
        raise ValueError(f"{path}: was trained with another --optimizer")
    for key, value in state["config"].items():
        if getattr(cfg, key, value) != value and key not in ("resume", "device"):
            say(f"  {key} was {value!r}, now {getattr(cfg, key)!r}")
    if state.get("data", data_id) != data_id:
        say("WARNING: the training data is not what this run began with: examples may repeat")
    say(f"loaded {path}")
    return state["step"], state


def fits(path: Path, state: dict, tokenizer: str, shape: dict) -> None:
    """Raises ValueError unless a checkpoint's model has this shape and uses this tokenizer."""
    differ = [f"{key} is {value}, asked for {shape[key]}"
              for key, value in state["model_config"].items() if value != shape[key]]
    if differ:
        raise ValueError(f"{path}: its model has another shape: {', '.join(differ)}")
    if state["tokenizer"] != tokenizer:
        raise ValueError(f"{path}: made with another tokenizer than that of the data")


# ---------------------------------------------------------------------------- strangers

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
            if len(pickles) != 1 or any("/code/" in name for name in names):
                return "not written by torch.save"
            sizes = {name.rpartition("/")[2]: part.file_size for name, part in zip(names, parts)
                     if "/data/" in name}
            return _foreign_pickle(z.read(pickles[0]), sizes)
    except (OSError, zipfile.BadZipFile, RuntimeError, NotImplementedError) as error:
        return str(error)


def _foreign_pickle(pickle: bytes, sizes: dict[str, int]) -> str | None:
    """The first thing in a pickle that torch.save would not write, or None: a name outside NAMES,
    an operation for other kinds of objects, a storage of another size than its part in `sizes`."""
    pushed: list = []  # what went on the pickle machine's stack so far: plain values, None for more
    memo: dict = {}
    try:
        for n, (op, value, _) in enumerate(pickletools.genops(pickle)):
            if n == MAX_OPS:
                return f"its pickle has more than {MAX_OPS:,} operations"
            if op.name == "GLOBAL" and value not in NAMES:
                name = str(value).replace(" ", ".")
                return f"refers to {name!r:.80}, which a checkpoint never does"
            if op.name in ("STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2",
                           "EXT4", "PERSID", "MEMOIZE", "PUT", "GET"):
                return f"holds the operation {op.name}, which torch.save never writes"
            if op.name in ("BINPUT", "LONG_BINPUT"):
                memo[value] = pushed[-1]
            elif op.name == "BINPERSID":  # of ("storage", type, part, device, numbers)
                kind, part, _, numbers = pushed[-5:-1]
                if numbers * WIDTH[kind] != sizes[part]:
                    return f"says that its part {part!r:.20} holds {numbers:,} numbers"
            elif op.name in ("BINGET", "LONG_BINGET"):
                pushed.append(memo[value])
            elif op.stack_after:
                pushed.append(value)
    except Exception as error:  # pickletools raises whatever comes to its mind
        return f"its pickle is damaged: {str(error)[:80]}"
    return None


def untrue(state, size: int) -> str | None:
    """What a state from a file of `size` bytes claims and does not hold, or None: the model that it
    describes will be allocated next."""
    if not isinstance(state, dict) or state.get("format") != 1:
        return "not a checkpoint of this program"
    weights = state.get("model", {})
    if not isinstance(weights, dict) or not all(
            isinstance(t, torch.Tensor) and t.device.type != "meta" for t in weights.values()):
        return "its model is not made of tensors"
    for name, t in tensors_of(state):
        held = t.untyped_storage().nbytes() if t.layout == torch.strided else 0
        if t.numel() * t.element_size() > held or held > size:
            return f"{name} claims {t.numel():,} numbers and holds fewer"
    config = state.get("model_config")
    if config is None:
        return None
    try:
        heads = 2 * (config["n_head"] + config["n_kv_head"]) * config["head_dim"]
        layer = config["n_embd"] * (heads + 3 * config["n_hidden"])
        asked = config["vocab_size"] * config["n_embd"] + config["n_layer"] * layer
        held = sum(t.numel() for t in weights.values())
        return None if asked <= held else (f"its shape asks for {asked:,} parameters, it holds "
                                           f"{held:,}")
    except (KeyError, TypeError):
        return "holds no language model: its shape is damaged"


def tensors_of(value, name: str = "state") -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor inside a state, with where it stands: "state.model.norm.weight"."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from tensors_of(part, f"{name}.{key}")
    elif isinstance(value, (list, tuple)):
        for i, part in enumerate(value):
            yield from tensors_of(part, f"{name}.{i}")
