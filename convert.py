"""
Open weights in, our models out: a Hugging Face folder or a GGUF file becomes a checkpoint of ours,
and a checkpoint of ours becomes what other programs open.

    python convert.py --input=Qwen3-0.6B/ --out_dir=out/qwen        (or --input=qwen3.gguf)
    python generate.py --checkpoint=out/qwen

    python convert.py --checkpoint=out/sft --to=hf --out=my-model   for transformers, vLLM
    python convert.py --checkpoint=out/sft --to=gguf --out=my.gguf --dtype=q8_0   llama.cpp, ollama
    python convert.py --checkpoint=out/qwen --to=int8 --out=out/qwen8   in 8 bits, loads fast

A model file holds three things: the sizes of the model (`ModelConfig`), each matrix with its name
and shape (`shapes`), and the tokenizer. Others use the same matrices under other names. We read
Qwen3, Qwen2.5, Llama 3, SmolLM2 and models of their shape; if one needs a part that we do not have,
you are told before any weight is read.

Needs no network. GGUF files need a package: pip install '.[weights]'
"""
from plumbing.terminal import fail, only_talk, run, stop_imports
stop_imports(__name__)  # Ctrl-C during the imports below, which take seconds

import ctypes
import math
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from configurator import FilePath, configure
from kernels import quantised
from model import ModelConfig
from plumbing import checkpoint, families, vocabulary, weights
from plumbing.adapters import open_whole
from plumbing.files import write_text
from plumbing.jobs import Progress
from plumbing.loading import empty
from plumbing.vocabulary import Vocabulary, read_json
from plumbing.weights import Stored
from tokenizer import Tokenizer


@dataclass(frozen=True)
class Config:
    input: FilePath = ""  # a Hugging Face folder, a .gguf file, or an installed package with one
    out_dir: FilePath = ""  # where the checkpoint goes
    checkpoint: FilePath = ""  # a checkpoint of ours, to make a file for others of
    to: Literal["", "hf", "gguf", "int8", "int4"] = ""  # what to make of it
    out: FilePath = ""  # where that goes: a file for gguf, else a folder
    dtype: Literal["auto", "float32", "bfloat16", "float16", "q8_0"] = "auto"  # of the matrices


@cache
def shapes(c: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of a model, by its name in model.py: a matrix (n_out, n_in) turns n_in numbers
    into n_out. Raises ValueError for more layers than anybody has, or such sizes."""
    if c.n_layer > 1000:
        raise ValueError(f"says that it has {c.n_layer:,} layers")
    try:
        tensors = empty(c).state_dict().items()
    except RuntimeError:
        raise ValueError("says that it has tensors larger than any should be") from None
    return {name: tuple(t.shape) for name, t in tensors if not (c.tied and "lm_head" in name)}


def in_gguf(c: ModelConfig) -> dict[str, str]:
    """Our name of each tensor, by its name in GGUF: blk.3.ffn_up.weight is
    layers.3.mlp.up_proj.weight. (Hugging Face puts "model." before all of ours but lm_head.)"""
    import gguf
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, c.n_layer)  # which has all of ours
    return {names.get_name(name, (".weight", ".bias")) or name: name for name in shapes(c)}


def reordered(t: Tensor, heads: int, back: bool) -> Tensor:
    """RoPE rotates pairs of numbers of a head: in llama.cpp (0, 1), (2, 3), …, here (0, D/2), (1,
    D/2 + 1), …. So its Llamas have the rows of q and k in another order."""
    parts = (-1, 2) if back else (2, -1)
    return t.view(heads, *parts, *t.shape[1:]).transpose(1, 2).reshape(t.shape)


# ---------------------------------------------------------------------------- in

def open_folder(folder: Path) -> tuple[ModelConfig, dict[str, Stored], Vocabulary]:
    """Sizes, tensors by our names, and tokenizer of a Hugging Face folder."""
    config, index = read_json(folder / "config.json"), folder / "model.safetensors.index.json"
    sizes, found = families.from_config(config), {}
    for path in weights.shards(folder, read_json(index) if index.exists() else None):
        for name, tensor in weights.read_safetensors(path).items():
            name = name.removeprefix("model.")
            if name in found:
                raise ValueError(f"{name} is in two of its files")
            if not name.endswith("rotary_emb.inv_freq"):  # of old folders, and computed here
                found[name] = tensor
    says = "tie_word_embeddings" in config
    if sizes.tied or not says and "lm_head.weight" not in found:
        sizes = replace(sizes, tied=True)
        found.pop("lm_head.weight", None)
    return sizes, found, vocabulary.from_folder(folder, config)


def open_gguf(path: Path) -> tuple[ModelConfig, dict[str, Stored], Vocabulary]:
    """The same of a GGUF file."""
    meta, tensors = weights.read_gguf(path)
    sizes = families.from_gguf(meta, tensors)
    head, embedding = tensors.get("output.weight"), tensors["token_embd.weight"]
    if head and weights.same(head, embedding):  # some write a tied matrix twice
        sizes = replace(sizes, tied=True)
        del tensors["output.weight"]
    tensors.pop("rope_freqs.weight", None)
    ours = in_gguf(sizes)
    found = {ours.get(name, name): t for name, t in tensors.items()}
    return sizes, found, vocabulary.from_gguf(meta)


def fit(sizes: ModelConfig, found: dict[str, Stored]) -> None:
    """Raises ValueError unless these are the tensors of a model of these sizes."""
    wanted = shapes(sizes)
    for name in sorted(wanted.keys() | found.keys()):
        there = found[name].shape if name in found else "not there"
        if there != wanted.get(name):
            raise ValueError(f"{name} is {there}, and should be "
                             f"{wanted.get(name, 'not there')} in a model of its sizes")


def in_package(name: str) -> Path | None:
    """The .gguf file of an installed package of this name, of which nothing is run."""
    package = find_spec(name) if name.isidentifier() and not Path(name).exists() else None
    places = package.submodule_search_locations if package else None
    return next((path for place in places or () for path in Path(place).glob("*.gguf")), None)


def take_in(cfg: Config) -> None:
    """Make a checkpoint of somebody's model. One tensor is in memory at a time."""
    with suppress(AttributeError, TypeError, OSError):  # only glibc knows mallopt
        ctypes.CDLL(None).mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD: what is freed leaves at once
    path = in_package(cfg.input) or Path(cfg.input)
    sizes, found, tokenizer = open_folder(path) if path.is_dir() else open_gguf(path)
    fit(sizes, found)
    text, rows = vocabulary.our_text(tokenizer, sizes.vocab_size)
    first = found["embed_tokens.weight"].kind
    dtype = {"auto": torch.float32 if first == torch.float32 else torch.bfloat16,
             "float32": torch.float32, "bfloat16": torch.bfloat16}[cfg.dtype]
    heads = {"q_proj": sizes.n_head, "k_proj": sizes.n_kv_head}
    permuted = path.is_file() and not sizes.qk_norm and not sizes.qkv_bias  # a Llama as GGUF
    sizes = replace(sizes, vocab_size=rows)

    progress, done = Progress(sys.stderr), count(1)

    def fill(name: str, out: Tensor) -> None:
        progress.show(f"converting: {next(done):,} of {len(found):,} tensors")
        part = name.split(".")[-2]
        try:  # of an embedding, rows beyond the file's are for bytes that its tokenizer lacked
            found[name].read(out)
        except ValueError as error:
            raise ValueError(f"{name} {error}") from None
        if permuted and part in heads:
            out.copy_(reordered(out, heads[part], back=True))
    model = {name: torch.empty(shape, dtype=dtype) for name, shape in shapes(sizes).items()}
    if sizes.tied:
        model["lm_head.weight"] = model["embed_tokens.weight"]
    state = {"format": 1, "kind": "sft" if tokenizer.rules.jinja else "pt", "step": 0,
             "model": model, "optimizer": [], "model_config": asdict(sizes), "config": {},
             "tokenizer": text}
    del tokenizer  # 100 MB of words
    try:
        saved = checkpoint.save(cfg.out_dir, 0, state, write=partial(weights.stream, fill=fill))
    finally:
        progress.end()
    write_text(str(saved.parent / "tokenizer.txt"), text)
    n, size = sum(map(math.prod, shapes(sizes).values())), saved.stat().st_size / 1e9
    print(f"saved {saved}: {n:,} parameters in {str(dtype)[6:]}, {size:.2f} GB")


# ---------------------------------------------------------------------------- out

def give_out(cfg: Config) -> None:
    """Export a checkpoint of ours for other programs, or store it in 8 or 4 bits."""
    state, path = open_whole(cfg.checkpoint)
    if state["kind"] == "rm":
        raise ValueError(f"{path}: a reward model, which other programs have no place for")
    sizes, tok = ModelConfig(**state["model_config"]), Tokenizer(state["tokenizer"], str(path))
    if "lm_head.q" in state["model"]:
        raise ValueError(f"{path}: is stored in 8 or 4 bits; give the checkpoint it was made of")
    if cfg.to in ("int8", "int4"):
        state |= {"model": quantised.pack(sizes, state["model"], int(cfg.to[3:])), "optimizer": []}
        checkpoint.save(cfg.out, state["step"], state)
    else:
        (as_folder if cfg.to == "hf" else as_gguf)(sizes, tok, state, cfg)
    print(f"wrote {cfg.out}")


def as_folder(sizes: ModelConfig, tok: Tokenizer, state: dict, cfg: Config) -> None:
    """Write config.json, the tokenizer's files and the weights, in one file."""
    folder, model = Path(cfg.out), state["model"]
    stored = model["norm.weight"].dtype
    dtype = stored if cfg.dtype == "auto" else getattr(torch, cfg.dtype)
    ours = {("" if name.startswith("lm_head") else "model.") + name: name for name in shapes(sizes)}
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary.to_folder(tok, folder, sizes.max_seq_len, state["kind"] != "pt")
    vocabulary.write_json(folder / "config.json", families.to_config(sizes, tok, dtype))
    weights.write_safetensors(
        folder / "model.safetensors", {name: shapes(sizes)[ours[name]] for name in ours}, dtype,
        lambda name: model[ours[name]])


def as_gguf(sizes: ModelConfig, tok: Tokenizer, state: dict, cfg: Config) -> None:
    """Write one file. Vectors stay in fp32, as do matrices whose rows are no whole blocks."""
    family = families.family_of(sizes)
    # what GGUF calls a type of numbers; below, what it calls a file of these
    number = {"float32": 0, "float16": 1, "auto": 1, "bfloat16": 30, "q8_0": 8}[cfg.dtype]
    block = 32 if cfg.dtype == "q8_0" else 1
    settings = {"general.name": "khaosz", "general.file_type": {0: 0, 1: 1, 8: 7, 30: 32}[number],
                **families.to_gguf(sizes),
                **vocabulary.to_gguf(tok, sizes.vocab_size, state["kind"] != "pt")}
    ours = in_gguf(sizes)
    tensors = {name: (shape, number if len(shape) == 2 and shape[1] % block == 0 else 0)
               for name, shape in ((name, shapes(sizes)[ours[name]]) for name in ours)}
    heads = {"q_proj": sizes.n_head, "k_proj": sizes.n_kv_head} if family == "llama" else {}

    if sizes.rope_scaling:
        tensors["rope_freqs.weight"] = (sizes.head_dim // 2,), 0

    def make(name: str) -> Tensor:
        if name == "rope_freqs.weight":
            return families.stretching(sizes.head_dim, sizes.rope_theta, sizes.rope_scaling)
        part = ours[name].split(".")[-2]
        t = state["model"][ours[name]]
        return reordered(t, heads[part], back=False) if part in heads else t
    weights.write_gguf(cfg.out, family, settings, tensors, make)


def main() -> None:
    only_talk()
    cfg = configure(Config)
    takes, gives = bool(cfg.input and cfg.out_dir), bool(cfg.checkpoint and cfg.to and cfg.out)
    if takes == gives or bool(cfg.input) == bool(cfg.checkpoint):
        fail("give --input=… and --out_dir=… to make a checkpoint, or --checkpoint=…, --to=… and "
             "--out=… to make what others open of one")
    if cfg.dtype in (("float16", "q8_0") if takes else ("q8_0",) if cfg.to == "hf" else ()):
        fail(f"--dtype={cfg.dtype} is not written there")
    if takes and checkpoint.list_checkpoints(cfg.out_dir):  # the newest would be taken for ours
        fail(f"{cfg.out_dir} holds a model already: give another --out_dir")
    there = Path(cfg.out)
    if gives and (there.is_file() or any(there.glob("*.safetensors*"))
                  or checkpoint.list_checkpoints(cfg.out)):
        fail(f"{cfg.out} holds a model already: give another --out")
    where = cfg.input or cfg.checkpoint
    try:
        take_in(cfg) if takes else give_out(cfg)
    except KeyError as error:
        fail(f"{where}: does not say {error}")
    except ModuleNotFoundError as error:
        fail(f"{error.name} is not installed: pip install '.[weights]'")
    except OSError as error:
        fail(f"{error.filename or where}: {error.strerror}")
    except (ValueError, ArithmeticError) as error:
        fail(str(error) if str(error).startswith(where) else f"{where}: {error}")
    except (TypeError, AttributeError, IndexError) as error:  # a list where a number should be
        fail(f"{where}: damaged: {error}")


if __name__ == "__main__":
    run(main)
