"""
The sizes of a model, as a config.json and a GGUF file say them; may be skipped.

What model.py has no code for is refused by its name, so that no model runs almost as it should.
"""
from typing import Any

import torch
from torch import Tensor

from model import ModelConfig, rope_table
from plumbing.weights import Stored
from tokenizer import Tokenizer

FAMILIES = {"LlamaForCausalLM": "llama", "MistralForCausalLM": "llama",
            "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3"}
SIZES = {  # of ModelConfig: what a config.json calls it, and a GGUF file
    "n_embd": ("hidden_size", "embedding_length"),
    "n_layer": ("num_hidden_layers", "block_count"),
    "n_head": ("num_attention_heads", "attention.head_count"),
    "n_kv_head": ("num_key_value_heads", "attention.head_count_kv"),
    "head_dim": ("head_dim", "attention.key_length"),
    "n_hidden": ("intermediate_size", "feed_forward_length"),
    "max_seq_len": ("max_position_embeddings", "context_length"),
    "norm_eps": ("rms_norm_eps", "attention.layer_norm_rms_epsilon")}
LLAMA3_ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def family_of(c: ModelConfig) -> str:
    """Raises ValueError for a model that nobody else has."""
    if c.qk_norm and c.qkv_bias or c.rope_scaling and (c.qk_norm or c.qkv_bias):
        raise ValueError("no family of models has norms, biases and scaling in this combination")
    return "qwen3" if c.qk_norm else "qwen2" if c.qkv_bias else "llama"


def refuse(lacks: dict[str, Any]) -> None:
    """Raises ValueError naming the first that is true."""
    if missing := next((what for what, true in lacks.items() if true), ""):
        raise ValueError(f"needs what model.py does not have: {missing}")


def from_config(c: dict[str, Any]) -> ModelConfig:
    """The sizes in a config.json. Raises ValueError naming what model.py lacks for this model."""
    name = str((c.get("architectures") or [c.get("model_type")])[0])
    family = FAMILIES.get(name)
    rope = c.get("rope_parameters") or c.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    window = c.get("use_sliding_window", name == "MistralForCausalLM") and c.get("sliding_window")
    lacks = {
        "a mixture of experts": any(c.get(f"{key}_experts") for key in ("num", "num_local",
                                                                         "n_routed")),
        "a sliding window": bool(window) or "sliding_attention" in (c.get("layer_types") or ()),
        "soft caps": c.get("attn_logit_softcapping") or c.get("final_logit_softcapping"),
        "quantised weights of this kind": c.get("quantization_config"),
        f"the activation {c.get('hidden_act')}": c.get("hidden_act", "silu") != "silu",
        "biases": c.get("attention_bias") or c.get("mlp_bias"),
        f"positions of the type {kind}": kind not in ("default", "llama3"),
        "heads that are rotated in part": c.get("partial_rotary_factor", 1) != 1,
        f"the architecture {name}": family is None}
    refuse(lacks)
    C, H = c["hidden_size"], c["num_attention_heads"]
    c = {"num_key_value_heads": H, "head_dim": C // H} | {k: v for k, v in c.items() if v}
    return ModelConfig(
        vocab_size=c["vocab_size"], **{ours: c[theirs] for ours, (theirs, _) in SIZES.items()},
        rope_theta=float(rope.get("rope_theta") or c.get("rope_theta") or 10_000),
        tied=bool(c.get("tie_word_embeddings", False)),
        qk_norm=family == "qwen3", qkv_bias=family == "qwen2",
        rope_scaling=tuple(float(rope[key]) for key in LLAMA3_ROPE) if kind == "llama3" else ())


def from_gguf(meta: dict[str, Any], tensors: dict[str, Stored]) -> ModelConfig:
    """The sizes in the settings of a GGUF file. Raises ValueError naming what is missing here."""
    name = meta["general.architecture"]

    def get(key: str, other: Any = None) -> Any:
        return meta.get(f"{name}.{key}", other)
    H = get("attention.head_count")
    sizes = {"n_kv_head": H, "head_dim": get("embedding_length") // H} | {
        ours: get(theirs) for ours, (_, theirs) in SIZES.items() if get(theirs)}
    head_dim = sizes["head_dim"]
    scaling = get("rope.scaling.type", "none")
    refuse({"a mixture of experts": get("expert_count"),
            "a sliding window": get("attention.sliding_window"),
            "soft caps": get("attn_logit_softcapping") or get("final_logit_softcapping"),
            f"positions of the type {scaling}": scaling != "none",
            "heads that are rotated in part": get("rope.dimension_count", head_dim) != head_dim,
            "files in several parts (llama-gguf-split --merge joins them)": meta.get("split.count"),
            f"the architecture {name}": name not in FAMILIES.values()})
    theta = float(get("rope.freq_base", 10_000))
    scaled: tuple[float, ...] = ()
    if "rope_freqs.weight" in tensors:  # what Llama 3.1 divides its frequencies by
        factors = torch.ones(head_dim // 2)
        tensors["rope_freqs.weight"].read(factors)
        length = float(get("rope.scaling.original_context_length", 8192))
        scaled = round(float(factors.max()), 3), 1.0, 4.0, length
        if not torch.allclose(factors, stretching(head_dim, theta, scaled), rtol=1e-3):
            raise ValueError("its frequencies are not stretched as those of Llama 3 are")
    return ModelConfig(
        vocab_size=len(meta["tokenizer.ggml.tokens"]), rope_theta=theta,
        **sizes | {"norm_eps": float(f"{sizes['norm_eps']:.6g}")},  # which was stored as fp32
        tied="output.weight" not in tensors, qk_norm=name == "qwen3", qkv_bias=name == "qwen2",
        rope_scaling=scaled)


def stretching(head_dim: int, theta: float, scaling: tuple[float, ...]) -> Tensor:
    """By how much Llama 3.1 divides each frequency, which is the angle at position 1."""
    before, after = (rope_table(torch.ones(()), head_dim, theta, how)[1][head_dim // 2:].asin()
                     for how in ((), scaling))
    return before / after


def to_config(c: ModelConfig, tok: Tokenizer, dtype: torch.dtype) -> dict[str, Any]:
    """The config.json of a model. transformers 5 reads rope_parameters, older ones the rest."""
    rope = {"rope_type": "default", "rope_theta": c.rope_theta}
    if c.rope_scaling:
        *factors, length = c.rope_scaling
        rope |= {"rope_type": "llama3", **dict(zip(LLAMA3_ROPE, (*factors, int(length))))}
    family = family_of(c)
    return {
        "architectures": [next(name for name, known in FAMILIES.items() if known == family)],
        **{theirs: getattr(c, ours) for ours, (theirs, _) in SIZES.items()},
        "model_type": family, "vocab_size": c.vocab_size, "hidden_act": "silu",
        "tie_word_embeddings": c.tied, "rope_parameters": rope, "rope_theta": c.rope_theta,
        "rope_scaling": rope if c.rope_scaling else None,
        "bos_token_id": tok._special_tokens.get(tok.rules.marks[0]), "pad_token_id": tok.pad,
        "eos_token_id": list(tok.stop), "torch_dtype": str(dtype).removeprefix("torch.")}


def to_gguf(c: ModelConfig) -> dict[str, Any]:
    """The settings of a GGUF file that are about its sizes."""
    sizes = {theirs: getattr(c, ours) for ours, (_, theirs) in SIZES.items()} | {
        "attention.value_length": c.head_dim, "rope.dimension_count": c.head_dim,
        "rope.freq_base": c.rope_theta, "vocab_size": c.vocab_size}
    if c.rope_scaling:
        sizes["rope.scaling.original_context_length"] = int(c.rope_scaling[-1])
    return {f"{family_of(c)}.{key}": value for key, value in sizes.items()}
