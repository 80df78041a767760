"""
Reads a prompt once that gets several replies, as in RL; may be skipped.
"""
import torch
from torch import Tensor

from model import KVCache, Transformer


def read_prompts_once(model: Transformer, prompts: list[list[int]],
                      room: int) -> tuple[KVCache, Tensor]:
    """A cache of prompts of token ids, padded on the left, with room for `room` more tokens of
    each; and the model's state at the end of each, (B, 1, C)."""
    place, kind = model.norm.weight.device, model.norm.weight.device.type
    once = {ids: i for i, ids in enumerate(dict.fromkeys(map(tuple, prompts)))}
    longest = max(map(len, once))
    pad = [longest - len(ids) for ids in once]
    dtype = model.norm.weight.dtype
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    cache = KVCache(model.config, len(once), longest + room, pad, place, dtype)
    idx = torch.tensor([[0] * n + list(ids) for n, ids in zip(pad, once)], device=place)
    state = model(idx, cache, hidden=True)[:, -1:]
    if len(once) < len(prompts):
        which = [once[tuple(ids)] for ids in prompts]
        cache.take(which)
        state = state[which]
    return cache, state
