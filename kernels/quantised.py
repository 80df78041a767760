"""
A model whose matrices have 8 or 4 bits: it writes on a CPU several times as fast as in fp32, and
needs a quarter or a seventh of the memory.

    fast = Quantised(model.config, pack(model.config, model.state_dict(), bits=8))
    generate(fast, prompts, 100)                     # as with any model

32 neighbouring weights of a row share a scale: w = scale (q - 8), with q from 0 to 15, at 4 bits;
scale (q - 128) at 8. At 4 bits they share a minimum too, w = scale q + minimum, if the weights lie
on such a grid already, as those of many GGUF files do: then nothing is lost. The embedding and the
output head always have 8 bits, since half of the damage would be done there.

All products take their inputs as int8 too, and what stands between them is fp32. The tokens of a
text are worked on in the same order however many come at once, so its logits are the same to the
last bit with or without a cache, alone or in a batch.
"""
import mmap
import sys
from contextlib import suppress
from ctypes import POINTER, Structure, byref, c_float, c_int32, c_int64, c_void_p

import torch
from torch import Tensor, nn

from kernels.library import library
from model import KVCache, ModelConfig, Transformer, rope_table

GROUP, PANEL = 32, 16  # as in product.c
AT_ONCE = 64  # tokens that go through a layer together
WORTH, QUICK = 100_000_000, 300_000_000  # weights: 8 bits are worth it, and rounded in seconds
MOST = {"n_in": 1 << 18, "n_out": 1 << 24, "rows": 1 << 12, "tokens": 1 << 20,
        "head_dim": 256}  # C counts in int32
FUSED = {"qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
         "o": ("self_attn.o_proj",), "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
         "down": ("mlp.down_proj",)}
VECTORS = {"input_norm": "input_layernorm.weight", "q_norm": "self_attn.q_norm.weight",
           "k_norm": "self_attn.k_norm.weight", "bias": "qkv_bias",
           "post_norm": "post_attention_layernorm.weight"}


class CMatrix(Structure):
    _fields_ = [("n_out", c_int32), ("n_in", c_int32), ("bits", c_int32), ("q", c_void_p),
                ("scale", c_void_p), ("min", c_void_p)]


class CBlock(Structure):
    _fields_ = [*((name, c_void_p) for name in VECTORS), *((name, CMatrix) for name in FUSED)]


class CModel(Structure):
    _fields_ = [*((name, c_int32)
                  for name in "n_layer n_head n_kv_head n_embd head_dim n_hidden".split()),
                ("eps", c_float), ("block", POINTER(CBlock)),
                *((name, c_void_p) for name in ("norm", "cos", "sin"))]


# ---------------------------------------------------------------------------- rounding

def shapes(c: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of the matrices and vectors of a quantised model. Raises ValueError for sizes
    that do not fit the panels."""
    q, kv = c.n_head * c.head_dim, c.n_kv_head * c.head_dim
    found: dict[str, tuple[int, ...]] = {"norm.weight": (c.n_embd,)}
    for i in range(c.n_layer):
        block: dict[str, tuple[int, ...]] = {
            "qkv": (q + 2 * kv, c.n_embd), "o": (c.n_embd, q),
            "gate_up": (2 * c.n_hidden, c.n_embd), "down": (c.n_embd, c.n_hidden),
            "input_layernorm.weight": (c.n_embd,), "post_attention_layernorm.weight": (c.n_embd,)}
        if c.qk_norm:
            block |= dict.fromkeys((VECTORS["q_norm"], VECTORS["k_norm"]), (c.head_dim,))
        if c.qkv_bias:
            block["qkv_bias"] = (q + 2 * kv,)
        found |= {f"layers.{i}.{name}": shape for name, shape in block.items()}
    tables = ("lm_head",) if c.tied else ("lm_head", "embed_tokens")
    found |= dict.fromkeys(tables, (-(-c.vocab_size // PANEL) * PANEL, c.n_embd))
    for name, shape in found.items():
        if len(shape) == 2 and (shape[0] % PANEL or shape[1] % GROUP or not (
                0 < shape[0] <= MOST["n_out"] and 0 < shape[1] <= MOST["n_in"])):
            raise ValueError(f"{name} is a matrix of {shape[0]:,} x {shape[1]:,}: 8 and 4 bits "
                             f"need multiples of {PANEL} x {GROUP}")
    if c.max_seq_len > MOST["tokens"] or c.head_dim % PANEL or c.head_dim > MOST["head_dim"]:
        raise ValueError(f"heads of {c.head_dim} and {c.max_seq_len:,} tokens: 8 and 4 bits need "
                         f"multiples of {PANEL} up to {MOST['head_dim']}, and end at "
                         f"{MOST['tokens']:,} tokens")
    return found


def sources(name: str, tied: bool) -> list[str]:
    """Which tensors of a Transformer lie one after the other in one of ours."""
    layer, _, last = name.rpartition(".")
    if last == "weight":
        return [name]
    if not layer:
        return ["embed_tokens.weight" if tied else f"{name}.weight"]
    fused, kind = ("qkv", "bias") if last == "qkv_bias" else (last, "weight")
    return [f"{layer}.{part}.{kind}" for part in FUSED[fused]]


def pack(c: ModelConfig, weights: dict[str, Tensor], bits: int) -> dict[str, Tensor]:
    """What a quantised model consists of, made of the `state_dict` of a Transformer. Raises
    ValueError for sizes that do not fit, and for weights that are not finite."""
    made = {}
    for name, shape in shapes(c).items():
        t = torch.cat([weights[source] for source in sources(name, c.tied)])
        if len(shape) == 1:
            made[name] = t.float()
        else:
            t = nn.functional.pad(t, (0, 0, 0, shape[0] - len(t)))  # of the vocabulary only
            parts = packed(t, bits if "." in name else 8)
            made |= {f"{name}.{part}": piece for part, piece in parts.items()}
    return made


def unpack(c: ModelConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The `state_dict` of a Transformer in fp32, which computes with what `pack` has rounded."""
    q, kv = c.n_head * c.head_dim, c.n_kv_head * c.head_dim
    sizes = {"qkv": [q, kv, kv], "qkv_bias": [q, kv, kv], "gate_up": [c.n_hidden, c.n_hidden]}
    made = {}
    for name, shape in shapes(c).items():
        t = (Matrix(parts_of(tensors, name, *shape), shape[0]).weight if len(shape) == 2
             else require(tensors, name, shape, torch.float32))
        t = t if "." in name else t[:c.vocab_size]
        pieces = t.split(sizes.get(name.rpartition(".")[2], len(t)))
        made |= dict(zip(sources(name, c.tied), pieces))
    return made | ({"lm_head.weight": made["embed_tokens.weight"]} if c.tied else {})


def packed(W: Tensor, bits: int) -> dict[str, Tensor]:
    """q, scale and perhaps min of a matrix, in panels as product.c reads them: (panel, group, bits,
    16, 4) uint8 and (panel, group, 16) fp16."""
    groups = W.detach().unflatten(1, (-1, GROUP))  # (n_out, n_in) -> (n_out, groups, 32)
    some = groups[::-(-len(W) // PANEL)].float()
    minimum = bits == 4 and loss(some, True) < loss(some, False) / 4
    pieces = [rounded(part.float(), bits, minimum)
              for part in groups.split(max(PANEL, (1 << 22) // W.size(1)))]
    q, *rest = (torch.cat(parts) for parts in zip(*pieces))
    q = q.view(-1, PANEL, q.size(1), 8, 4).permute(0, 2, 3, 1, 4)
    q = q if bits == 8 else q[:, :, :4] | q[:, :, 4:] << 4
    if not all(t.isfinite().all() for t in rest):
        raise ValueError("weights that are not finite, or too large")
    return {"q": q.contiguous()} | {
        name: t.view(-1, PANEL, t.size(1)).transpose(1, 2).contiguous()
        for name, t in zip(("scale", "min"), rest)}


def rounded(w: Tensor, bits: int, minimum: bool) -> list[Tensor]:
    """The numbers q nearest to w (rows, groups, 32), and of each group the scale and, if asked for,
    the minimum in fp16. Several grids are tried; each group takes the one with the least squared
    error. With a minimum, the group is supposed to hold 9 to 16 steps of its grid."""
    low, high = w.aminmax(dim=-1, keepdim=True)
    far = torch.where(-low > high, low, high)
    if bits == 8:
        scales, zero, least, most = [far.abs() / 127], 128, 1, 255
    else:  # the number of largest size becomes -8, so that all 16 are used
        scales = [(high - low) / n for n in range(15, 7, -1)] if minimum else [far / -8]
        zero, least, most = 8, 0, 15
    best: list[Tensor] = []
    for scale in (s.half() for s in scales):
        start = low.half().float() if minimum else -zero * scale.float()
        q = ((w - start) / scale.float()).nan_to_num_(0.0).round_().clamp_(least, most)
        error = (q * scale.float() + start - w).square().sum(-1, keepdim=True)
        new = [error, q.byte(), scale]
        better = error < best[0] if best else None
        best = new if better is None else [torch.where(better, a, b) for a, b in zip(new, best)]
    _, q, scale = best
    return [q, scale[..., 0], *([low.half()[..., 0]] * minimum)]


def loss(w: Tensor, minimum: bool) -> float:
    """Squared error of 4 bits."""
    q, scale, *low = (t.float() for t in rounded(w, 4, minimum))
    start = low[0] if low else -8 * scale
    return float((q * scale[..., None] + start[..., None] - w).square().sum())


# ---------------------------------------------------------------------------- the model

class Matrix:
    """A packed matrix (n_out, n_in), to multiply with and to look rows up in."""

    def __init__(self, parts: dict[str, Tensor], n_out: int):
        self.parts, self.n_out = parts, n_out
        panels, groups, bits, *_ = parts["q"].shape
        self.c = CMatrix(panels * PANEL, groups * GROUP, bits,
                         *(parts[name].data_ptr() if name in parts else None
                           for name in ("q", "scale", "min")))

    def __call__(self, x: Tensor) -> Tensor:
        """x W^T"""
        rows = x.numel() // self.c.n_in
        if x.dtype != torch.float32 or x.size(-1) != self.c.n_in or rows > 1 << 20:
            raise ValueError(f"a product of {self.c.n_in} fp32 numbers, got {tuple(x.shape)}")
        x, y = x.contiguous(), x.new_empty(*x.shape[:-1], self.c.n_out)
        if rows and not call("multiply", y, x, self.c.n_in, byref(self.c), rows, 0):
            raise MemoryError
        return y[..., :self.n_out]

    def rows(self, idx: Tensor) -> Tensor:
        """W[idx] in fp32."""
        q, bits = self.parts["q"], self.c.bits
        q = q[idx // PANEL, :, :, idx % PANEL]  # (…, groups, bits, 4)
        q = q if bits == 8 else torch.cat((q & 15, q >> 4), dim=-2)
        scale, *low = (self.parts[name][idx // PANEL, :, idx % PANEL, None].float()
                       for name in ("scale", "min") if name in self.parts)
        return (q.flatten(-2) * scale + low[0] if low else
                (q.flatten(-2).float() - (128 if bits == 8 else 8)) * scale).flatten(-2)

    @property
    def weight(self) -> Tensor:
        """All of W in fp32."""
        return self.rows(torch.arange(self.n_out))


def call(name: str, *args) -> int:
    """A function of the C library; of a tensor it gets the place."""
    if not (functions := library()):
        raise OSError("no compiled functions")
    return functions[name](*(c_void_p(a.data_ptr()) if isinstance(a, Tensor) else a for a in args))


class Quantised(Transformer):
    """A model that writes, made of what `pack` returns. Raises ValueError if that does not fit its
    sizes, so that no C function reads past the end of a tensor."""

    def __init__(self, config: ModelConfig, tensors: dict[str, Tensor]):
        nn.Module.__init__(self)
        self.config = c = config
        self.tensors = tensors = in_large_pages(tensors)
        self.bytes, matrices = sum(t.nbytes for t in tensors.values()), {}
        for name, shape in shapes(c).items():
            if len(shape) == 2:
                matrices[name] = Matrix(parts_of(tensors, name, *shape), shape[0])
            else:
                require(tensors, name, shape, torch.float32)
        self.lm_head = matrices["lm_head"]
        self.embed_tokens = matrices.get("embed_tokens", self.lm_head)
        self.lm_head.n_out = self.embed_tokens.n_out = c.vocab_size  # the rest is padding
        self.norm = nn.RMSNorm(c.n_embd, c.norm_eps)
        self.norm.weight = nn.Parameter(tensors["norm.weight"], requires_grad=False)
        self.rope = rope_table(torch.arange(c.max_seq_len), c.head_dim, c.rope_theta,
                               c.rope_scaling)
        self.blocks = (CBlock * c.n_layer)()
        for i, block in enumerate(self.blocks):
            for field, name in VECTORS.items():
                vector = tensors.get(f"layers.{i}.{name}")
                setattr(block, field, None if vector is None else vector.data_ptr())
            for field in FUSED:
                setattr(block, field, matrices[f"layers.{i}.{field}"].c)
        self.c_model = CModel(
            c.n_layer, c.n_head, c.n_kv_head, c.n_embd, c.head_dim, c.n_hidden, c.norm_eps,
            self.blocks, *(t.data_ptr() for t in (self.norm.weight, *self.rope)))

    def forward(self, idx: Tensor, cache: KVCache | None = None, hidden: bool = False,
                segments: Tensor | None = None) -> Tensor:
        """As Transformer.forward; `segments` are for training."""
        (B, T), c = idx.shape, self.config
        cache = cache or KVCache(c, B, T)
        if cache.length + T > c.max_seq_len:
            raise ValueError(f"the model reads {c.max_seq_len} tokens, got {cache.length} + {T}")
        cache.check_room(B, T)
        if segments is not None or cache.kv.dtype != torch.float32 or not 0 < B <= MOST["rows"] or (
                len(cache.pad) != B or not cache.kv[0, 0].is_contiguous()):  # rows of a larger one?
            raise ValueError("8 and 4 bits are for writing on a CPU in fp32, "
                             f"{MOST['rows']} texts at most")
        states = []
        for chunk in idx.split(max(1, AT_ONCE // B), dim=1):
            x = self.embed_tokens.rows(chunk)  # (B, t, C)
            if not call("decode", byref(self.c_model), x, B, chunk.size(1), cache.kv,
                        c_int64(cache.kv.stride(1)), cache.max_len, cache.length, cache.pad):
                raise MemoryError
            cache.length += chunk.size(1)
            states.append(x)
        x = torch.cat(states, dim=1)
        return x if hidden else self.lm_head(x)


def in_large_pages(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same in pages of 2 MB, where Linux has them. A processor stops reading ahead at the end
    of a page: from those of 4 kB it takes a row's products nearly twice as long."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return tensors
    line, page, made = 64, 2 << 20, {}
    memory = mmap.mmap(-1, page + sum(t.nbytes + line for t in tensors.values()),
                       flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    at = -whole.data_ptr() % page
    for name, t in tensors.items():
        made[name] = whole[at:at + t.nbytes].view(t.dtype).view(t.shape).copy_(t)
        at += -(-t.nbytes // line) * line
    return made


def parts_of(tensors: dict[str, Tensor], name: str, n_out: int, n_in: int) -> dict[str, Tensor]:
    """The tensors of a packed matrix. Raises ValueError if they are not of these sizes."""
    panels, groups = n_out // PANEL, n_in // GROUP
    bits = 4 if tensors[f"{name}.q"].shape[2:3] == (4,) else 8
    found = {"q": require(tensors, f"{name}.q", (panels, groups, bits, PANEL, 4), torch.uint8)}
    for part in ("scale", "min")[:1 + (f"{name}.min" in tensors)]:
        found[part] = require(tensors, f"{name}.{part}", (panels, groups, PANEL), torch.float16)
    return found


def require(tensors: dict[str, Tensor], name: str, shape: tuple[int, ...],
            dtype: torch.dtype) -> Tensor:
    t = tensors[name]
    if t.shape != shape or t.dtype != dtype or not t.is_contiguous() or t.device.type != "cpu":
        raise ValueError(f"{name} is {tuple(t.shape)} of {t.dtype}, not {shape} of {dtype}")
    return t


def writer(c: ModelConfig, weights: dict[str, Tensor], dtype: torch.dtype | None,
           device: torch.device) -> Transformer | None:
    """A model that writes in 8 or 4 bits (torch.int8, torch.int4) with weights that `pack` made, or
    those of a Transformer; None if that is not asked for, or not possible. Lines on stderr say what
    is done. dtype None: what is stored, or 8 bits where they help and are made in seconds."""
    packed_already, why = "lm_head.q" in weights, ""
    try:
        shapes(c)
    except ValueError as error:
        why = f"{error}; writes in float32"
    size = sum(t.numel() for name, t in weights.items() if not (c.tied and "lm_head.w" in name))
    if dtype is None and device.type == "cpu":
        if packed_already or WORTH <= size < QUICK and not why:
            dtype = torch.int8
            tell(f"{size:,} weights, rounded to 8 bits as by --dtype=int8 (float32 is exact, "
                 "but slow; int4 costs so small a model quality)", not packed_already)
        else:
            tell(why or f"{size:,} weights, used as they are stored; --dtype=int8 writes several "
                 "times as fast, convert.py --to=int8 rounds them for good",
                 size >= (WORTH if why else QUICK))
    bits = {torch.int8: 8, torch.int4: 4}.get(dtype, 0)
    if bits and device.type != "cpu":
        raise ValueError(f"--dtype=int{bits} is for a CPU: give --device=cpu")
    if not bits or library() is None:
        return None
    if not packed_already:
        tell(f"rounding {size:,} weights to {bits} bits", size > QUICK)
        weights = pack(c, weights, bits)
    return Quantised(c, weights)


def tell(text: str, when: bool) -> None:
    if when:
        print(text, file=sys.stderr, flush=True)
