"""
Refuses a stranger's model file before anything in it is unpacked. The rest may be skipped.

A checkpoint is data, never code. torch.load(weights_only=True) already refuses code; the checks
here come before it, so that a file of a kilobyte cannot ask for a terabyte either.
"""
import pickletools
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch

SAFE_TORCH = (2, 10)  # below, weights_only=True can be made to run code: CVE-2026-24747
# all that our checkpoints name in their pickle: tensors and containers of them
WIDTH = {f"torch {kind}Storage": width for kind, width in {
    "Float": 4, "Double": 8, "Half": 2, "BFloat16": 2, "Long": 8, "Int": 4, "Short": 2, "Char": 1,
    "Byte": 1, "Bool": 1}.items()}  # bytes of a number
NAMES = {"torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter",
         "collections OrderedDict", "torch Size", "torch device", *WIDTH}
MAX_OPS = 500_000  # of a pickle: 30 for each tensor


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
