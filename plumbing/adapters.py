"""
What LoRA saves: the trained part of a model, and the name of its base. The rest may be skipped.

    state, path = open_whole("out/sft")     # as checkpoint.load, base and update made one model

Such a checkpoint has, where others have their "model", the "adapter": {name: tensor}, with a matrix
A as layers.0.mlp.up_proj.a, its B as ….b, and whatever else was trained by its own name; and the
"base": {"path": seen from the file's folder, "sha256": first 16 digits}, perhaps an adapter too.
"""
import os
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from kernels import quantised
from model import ModelConfig
from plumbing import checkpoint, weights
from plumbing.lora import LORA_ALPHA, updates
from plumbing.runtime import Settings


def contents(model: nn.Module, tensors: dict[str, Tensor], out_dir: str) -> dict:
    """What a checkpoint in `out_dir` keeps of a model's `tensors`: all, or what was trained."""
    if not updates(model):
        return {"model": tensors}
    frozen = {name for name, p in model.named_parameters(remove_duplicate=False)
              if not p.requires_grad}
    base = Path(getattr(model, "backbone", model).path)
    return {"adapter": {name: t for name, t in tensors.items() if name not in frozen},
            "base": {"path": os.path.relpath(base, out_dir), "sha256": checkpoint.hash_of(base)}}


def check_same(cfg: Settings, model: nn.Module, state: dict) -> None:
    """Raises ValueError unless a run with or without LoRA goes on as it began."""
    for key in ("lora_rank", "lora_extra"):
        was, now = state["config"].get(key, 0), getattr(cfg, key, 0)
        if was != now:
            raise ValueError(f"{cfg.out_dir}: was trained with --{key}={was}, asked for {now}")
    base = Path(getattr(model, "backbone", model).path)
    if "adapter" in state and state.get("base", {}).get("sha256") != checkpoint.hash_of(base):
        raise ValueError(f"{cfg.out_dir}: was adapted from another model than {base}")


def open_state(where: str) -> tuple[dict, Path]:
    """As `checkpoint.load`. The state of an adapter gets the "model" of its base, and as "adapters"
    the updates to that, the oldest first. Raises ValueError if it is no longer that base."""
    state, path = checkpoint.load(where)
    if "adapter" not in state:
        return state, path
    try:
        base = find_base(path, **state["base"])
        below, _ = open_state(str(base))
        adapter = {name.removeprefix("backbone."): t for name, t in state["adapter"].items()}
        if below["kind"] == "rm" or any(below[key] != state[key]
                                        for key in ("model_config", "tokenizer")):
            raise ValueError(f"{path}: does not fit its base {base}")
        model = below["model"]
        if "lm_head.q" in model:  # stored in 8 or 4 bits
            model = quantised.unpack(ModelConfig(**state["model_config"]), model)
        fit(adapter, model)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: its adapter is damaged: {str(error)[:200]}") from None
    return {**state, "model": model,
            "adapters": [*below.get("adapters", []), adapter]}, path


def find_base(path: Path, /, **base: str) -> Path:
    """The file that an adapter was made for: where it was then, seen from the adapter, or beside
    it. Raises ValueError if it is gone, or another."""
    there = Path(os.path.normpath(path.parent / base["path"]))
    found = next((p for p in (there, path.parent / there.name) if p.is_file()), None)
    if found is None:
        raise ValueError(f"{path}: is an adapter for {there}, which is not there")
    if checkpoint.hash_of(found) != base["sha256"]:
        raise ValueError(f"{path}: is an adapter for a model that {found} held once: its contents "
                         "are others now")
    return found


def fit(adapter: dict[str, Tensor], model: dict[str, Tensor]) -> None:
    """Raises KeyError for a tensor that the model does not have, TypeError for another shape."""
    for name, t in adapter.items():
        stem, _, what = name.rpartition(".")
        if what in ("a", "b"):
            a, b, whole = adapter[f"{stem}.a"], adapter[f"{stem}.b"], model[f"{stem}.weight"]
            if (b.shape[0], a.shape[1]) != whole.shape or a.shape[0] != b.shape[1]:
                raise TypeError(f"{stem} has another shape")
        elif name not in ("score.weight", "mean", "std") and t.shape != model[name].shape:
            raise TypeError(f"{name} has another shape")


def updated(name: str, tensor: Tensor, adapters: list[dict[str, Tensor]]) -> Tensor:
    """One tensor of a base after its updates, in fp32 if there are any."""
    stem = name.removesuffix(".weight")
    for adapter in adapters:
        tensor = adapter.get(name, tensor).float()
        if name.endswith(".weight") and f"{stem}.a" in adapter:
            a, b = adapter[f"{stem}.a"], adapter[f"{stem}.b"]
            tensor = tensor + LORA_ALPHA / len(a) * (b @ a)
    return tensor


def with_extra(state: dict) -> dict[str, Tensor]:
    """The tensors of the base, those replaced that an update holds whole."""
    model = dict(state["model"])
    for adapter in state.get("adapters", []):
        model |= {name: t for name, t in adapter.items() if name in model}
    return model


def merged(state: dict) -> dict[str, Tensor]:
    """All tensors of the model in a state of `open_state`, its updates added to its matrices."""
    if not state.get("adapters"):
        return state["model"]
    model = {name: updated(name, t, state["adapters"]) for name, t in state["model"].items()
             if name != "lm_head.weight" or not state["model_config"]["tied"]}
    if state["model_config"]["tied"]:
        model["lm_head.weight"] = model["embed_tokens.weight"]
    return model


def open_whole(where: str) -> tuple[dict, Path]:
    """As `checkpoint.load`, with base and update made one model."""
    state, path = open_state(where)
    return {key: value for key, value in state.items()
            if key not in ("adapter", "adapters", "base")} | {"model": merged(state)}, path


def write_merged(out_dir: str) -> Path:
    """Write the newest checkpoint of `out_dir`, base and update as one model, into its folder
    `merged`. One tensor is in memory at a time."""
    state, _ = open_state(out_dir)
    prefix = "backbone." if state["kind"] == "rm" else ""
    found = {prefix + name: t for name, t in state["model"].items()}
    found |= {name: state["adapters"][-1][name] for name in ("score.weight", "mean", "std")
              if prefix}
    model = {name: torch.empty(t.shape) for name, t in found.items()}
    if state["model_config"]["tied"]:
        model[f"{prefix}lm_head.weight"] = model[f"{prefix}embed_tokens.weight"]

    def fill(name: str, out: Tensor) -> None:
        out.copy_(updated(name.removeprefix(prefix), found[name], state["adapters"]))
    whole = {key: value for key, value in state.items()
             if key not in ("adapter", "adapters", "base")} | {"model": model, "optimizer": []}
    return checkpoint.save(f"{out_dir}/merged", state["step"], whole, keep=1,
                           write=partial(weights.stream, fill=fill))
