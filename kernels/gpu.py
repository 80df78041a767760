"""
A model that writes on a GPU: a step, which reads one token of each text, is one CUDA graph.

    model = capture(model)               # a Transformer on a GPU, in fp32 or bf16
    generate(model, prompts, 100)        # as with any model

To write one token all weights are read once, so the memory's speed is the limit, and what stands in
its way are the starts of kernels: a layer of model.py has 30. Here it has five, in Triton, which
comes with torch for CUDA; several texts need products of matrices, which are torch's. The kernels
of a step are recorded once for each cache; then a step replays them. Prompts go through model.py.
"""
from threading import Lock

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.nn import functional as F

from model import Attention, KVCache, Transformer, rope_table

AT_ONCE = 16_384  # weights that a program multiplies
KEYS = 64  # that a head compares at once
STEPS = 16  # recordings that a model keeps
LOCK = Lock()  # a process makes one recording at a time


@triton.jit
def matvec(W, x, gain, bias, y, N, K, eps, NORM: tl.constexpr, GATED: tl.constexpr,
           BIAS: tl.constexpr, ADD: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
           EARLY: tl.constexpr):
    """y (N,) = W n, or += with ADD: W (N, K), n = x (K,) or its RMSNorm. GATED: W has twice as many
    rows, and y = silu(W n) * W' n. A program computes ROWS of them."""
    row, col = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLS)
    at, inside = row[:, None] * K + col, (row[:, None] < N) & (col < K)
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    w = tl.load(W + at, inside, 0.0)
    if GATED:
        up = tl.load(W + N * K + at, inside, 0.0)
    if EARLY:
        tl.extra.cuda.gdc_wait()
    w = w.to(tl.float32)
    n = tl.load(x + col, col < K, 0.0).to(tl.float32)
    if NORM:
        n *= tl.rsqrt(tl.sum(n * n) / K + eps) * tl.load(gain + col, col < K, 0.0).to(tl.float32)
    out = tl.sum(w * n, 1)
    if GATED:
        out = out / (1 + tl.exp(-out)) * tl.sum(up.to(tl.float32) * n, 1)
    if BIAS:
        out += tl.load(bias + row, row < N, 0.0).to(tl.float32)
    if ADD:
        out += tl.load(y + row, row < N, 0.0)
    tl.store(y + row, out, row < N)


@triton.jit
def attend(qkv, q_gain, k_gain, cos, sin, keys, values, y, last, pad, row_stride,
           head_stride, GROUP, HEADS, eps, scale, NORM: tl.constexpr, D: tl.constexpr,
           COLS: tl.constexpr, KEYS: tl.constexpr, EARLY: tl.constexpr):
    """Attention of one query head of one text: keys and values of the new token, which qkv (B,
    HEADS + 2 HEADS / GROUP, D) has, go into the cache at `last`; then it sees all from `pad` on."""
    b, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    g, d = h // GROUP, tl.arange(0, COLS)
    other, inside = (d + D // 2) % D, d < D  # RoPE turns these two
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    end, start = tl.load(last), tl.load(pad + b)
    angle = tl.maximum(end - start, 0) * D + d  # padding has no position
    turn, cross = tl.load(cos + angle, inside, 0.0), tl.load(sin + angle, inside, 0.0)
    mine = qkv + b * (HEADS + 2 * (HEADS // GROUP)) * D
    q = tl.load(mine + h * D + d, inside, 0.0).to(tl.float32)
    k = tl.load(mine + (HEADS + g) * D + d, inside, 0.0).to(tl.float32)
    v = tl.load(mine + (HEADS + HEADS // GROUP + g) * D + d, inside, 0.0).to(tl.float32)
    q2 = tl.load(mine + h * D + other, inside, 0.0).to(tl.float32)
    k2 = tl.load(mine + (HEADS + g) * D + other, inside, 0.0).to(tl.float32)
    if NORM:
        q_size, k_size = tl.rsqrt(tl.sum(q * q) / D + eps), tl.rsqrt(tl.sum(k * k) / D + eps)
        q *= q_size * tl.load(q_gain + d, inside, 0.0).to(tl.float32)
        k *= k_size * tl.load(k_gain + d, inside, 0.0).to(tl.float32)
        q2 *= q_size * tl.load(q_gain + other, inside, 0.0).to(tl.float32)
        k2 *= k_size * tl.load(k_gain + other, inside, 0.0).to(tl.float32)
    at = b * row_stride + g * head_stride + d
    q, k = q * turn + q2 * cross, (k * turn + k2 * cross).to(keys.dtype.element_ty)
    if h % GROUP == 0:
        tl.store(keys + at + end * D, k, inside)
        tl.store(values + at + end * D, v.to(values.dtype.element_ty), inside)
    best, total = tl.sum(q * k.to(tl.float32)) * scale, 1.0  # of the new token, which sees itself
    while start < end:
        key = start + tl.arange(0, KEYS)
        there, seen = at + key[:, None] * D, (key[:, None] < end) & inside
        score = tl.sum(tl.load(keys + there, seen, 0.0).to(tl.float32) * q, 1) * scale
        score = tl.where(key < end, score, float("-inf"))
        most = tl.maximum(best, tl.max(score))
        p, less = tl.exp(score - most), tl.exp(best - most)
        v = v * less + tl.sum(p[:, None] * tl.load(values + there, seen, 0.0).to(tl.float32), 0)
        best, total, start = most, total * less + tl.sum(p), start + KEYS
    tl.store(y + (b * HEADS + h) * D + d, v / total, inside)


def capture(model: Transformer) -> Transformer:
    """The same model, whose steps are recorded. Raises what Triton raises where it cannot compile:
    it needs a C compiler."""
    one = torch.ones(1, 1, device=model.norm.weight.device)
    matvec[1,](one, one, one, one, one.clone(), 1, 1, 0.0, False, False, False, False, 1, 1, False)
    Captured.prepare(model)  # type: ignore[arg-type]
    model.__class__ = Captured  # last: who cannot be prepared writes as before
    return model


class Captured(Transformer):
    """A Transformer whose q, k and v lie together, and gate and up. Made by `capture`."""

    def prepare(self) -> None:
        c, place = self.config, self.norm.weight.device
        self.rope = rope_table(torch.arange(c.max_seq_len, device=place), c.head_dim, c.rope_theta,
                               c.rope_scaling)
        self.fused = [(together(b.self_attn.q_proj, b.self_attn.k_proj, b.self_attn.v_proj),
                       together(b.mlp.gate_proj, b.mlp.up_proj)) for b in self.layers]
        self.steps: dict[tuple, Step] = {}

    def forward(self, idx: Tensor, cache: KVCache | None = None, hidden: bool = False,
                segments: Tensor | None = None) -> Tensor:
        """As Transformer.forward. A prompt's end that fills its cache is not worth a recording."""
        if cache is None or idx.size(1) != 1 or torch.is_grad_enabled() or (
                torch.is_autocast_enabled(idx.device.type)
                or cache.length + 1 >= min(cache.max_len, self.config.max_seq_len)):
            return super().forward(idx, cache, hidden, segments)
        cache.check_room(*idx.shape)
        kv = cache.kv
        key = (kv.data_ptr(), kv.shape, kv.stride(), kv.dtype)
        with LOCK:
            if key not in self.steps:
                # a new step takes over the stream of the oldest, for with its graph torch frees
                # what products on that stream have worked in
                full = len(self.steps) >= STEPS
                stream = self.steps.pop(next(iter(self.steps))).stream if full else None
                self.steps[key] = Step(self, idx, cache, stream)
            step = self.steps[key] = self.steps.pop(key)  # now the newest
            state = step.run(self, idx, cache)
        cache.length += 1
        return state if hidden else self.lm_head(state)


def together(*parts: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """One matrix, and one bias or None, of which those of the parts are views from now on."""
    sizes, made = [len(p.weight) for p in parts], []
    for kind in ("weight", "bias"):
        pieces = [getattr(part, kind) for part in parts]
        made.append(None if pieces[0] is None else torch.cat([p.data for p in pieces]))
        if made[-1] is not None:
            for piece, view in zip(pieces, made[-1].split(sizes)):
                piece.data = view
    return made[0], made[1]


class Step:
    """What a captured model does with one token of each text in a cache. It holds neither of them:
    another cache may lie in the same place later, and is served as well."""

    def __init__(self, model: Captured, idx: Tensor, cache: KVCache,
                 stream: "torch.cuda.Stream | None"):
        self.B, place = len(idx), idx.device
        with torch.inference_mode(False), torch.no_grad():  # else they could not be written outside
            self.idx = torch.zeros(self.B, dtype=torch.long, device=place)
            self.last = torch.zeros(1, dtype=torch.int32, device=place)
            self.pad = torch.zeros(self.B, dtype=torch.int32, device=place)
            self.stream, self.state = stream, torch.empty(0)
            self.tell(idx, cache)
            if place.type == "cuda":  # it compiles, then records
                self.stream = stream = stream or torch.cuda.Stream(place)
                stream.wait_stream(torch.cuda.current_stream(place))
                with torch.cuda.stream(stream):
                    self.read(model, cache.kv)
                torch.cuda.current_stream(place).wait_stream(stream)
                self.graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self.graph, stream=stream,
                                      capture_error_mode="thread_local"):
                    self.read(model, cache.kv)

    def tell(self, idx: Tensor, cache: KVCache) -> None:
        self.idx.copy_(idx[:, 0])
        self.last.fill_(cache.length)
        self.pad.copy_(cache.pad)

    def run(self, model: Captured, idx: Tensor, cache: KVCache) -> Tensor:
        """The state of each text, (B, 1, C), after its token of idx (B, 1)."""
        self.tell(idx, cache)
        if idx.is_cuda:
            self.graph.replay()
        else:
            self.read(model, cache.kv)
        return self.state[:, None].clone()  # the next step writes there

    def read(self, model: Captured, cached: Tensor) -> None:
        c = model.config
        x = model.embed_tokens(self.idx)  # (B, C); of one text in fp32, as its sum is kept
        x, kind = x.float() if self.B == 1 else x, x.dtype
        for block, kv, ((qkv, bias), (gate_up, _)) in zip(model.layers, cached, model.fused):
            attn, mlp = block.self_attn, block.mlp
            first, second = block.input_layernorm, block.post_attention_layernorm
            y = x.new_empty(self.B, c.n_head * c.head_dim, dtype=kind)
            if self.B == 1:
                self.attend(model, attn, self.times(qkv, x, first, bias), kv, y)
                self.times(attn.o_proj.weight, y, into=x)
                h = self.times(gate_up, x, second, gated=True)
                self.times(mlp.down_proj.weight, h, into=x)
            else:
                self.attend(model, attn, F.linear(first(x), qkv, bias), kv, y)
                x = torch.addmm(x, y, attn.o_proj.weight.t())
                gate, up = F.linear(second(x), gate_up).chunk(2, -1)
                x = torch.addmm(x, F.silu(gate) * up, mlp.down_proj.weight.t())
        self.state = model.norm(x.to(kind))

    def times(self, W: Tensor, x: Tensor, norm: nn.RMSNorm | None = None,
              bias: Tensor | None = None, gated: bool = False,
              into: Tensor | None = None) -> Tensor:
        """W n of one text, see `matvec`."""
        N, K = len(W) // (1 + gated), W.size(1)
        y = x.new_empty(1, N, dtype=torch.float32) if into is None else into
        cols = triton.next_power_of_2(K)
        rows = max(1, AT_ONCE // cols // (1 + gated))
        matvec[triton.cdiv(N, rows),](
            W, x, norm.weight if norm else x, x if bias is None else bias, y, N, K,
            norm.eps if norm else 0.0, norm is not None, gated, bias is not None,
            into is not None, rows, cols, **may_overlap(x))
        return y

    def attend(self, model: Captured, attn: Attention, qkv: Tensor, kv: Tensor,
               y: Tensor) -> None:
        """Attention of all heads of all texts: y (B, n_head D)."""
        c, D = model.config, attn.head_dim
        gains = [getattr(norm, "weight", qkv) for norm in (attn.q_norm, attn.k_norm)]
        attend[self.B, c.n_head](
            qkv, *gains, *model.rope, kv[0], kv[1], y, self.last, self.pad, kv.stride(1),
            kv.stride(2), c.n_head // c.n_kv_head, c.n_head, c.norm_eps, D ** -0.5,
            c.qk_norm, D, triton.next_power_of_2(D), KEYS, **may_overlap(qkv))


def may_overlap(x: Tensor) -> dict[str, bool]:
    """Whether a kernel may start before the last one has ended: from NVIDIA's Hopper on."""
    yes = x.is_cuda and torch.version.cuda is not None and (
        torch.cuda.get_device_capability(x.device) >= (9, 0))
    return {"EARLY": yes} | ({"launch_pdl": True} if yes else {})
