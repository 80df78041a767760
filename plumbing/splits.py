"""
Opens the chats, pairs or prompts that a stage learns from. The rest may be skipped.
"""
from dataclasses import dataclass
from typing import Literal

from configurator import Share
from plumbing.examples import Kind, Rows, load_examples
from plumbing.runtime import Dist, Settings, first_rank_first
from tokenizer import Tokenizer


@dataclass(frozen=True)
class RowSettings(Settings):
    """What a stage that learns from chats, pairs or prompts can be told of them."""
    data: str = ""  # what to learn from: JSONL files or folders, comma-separated
    val_data: str = ""  # what to judge by, of the same kind; empty: a part of data
    val_fraction: Share = 0.05  # share of data to judge by, if there is no val_data
    on_bad_line: Literal["stop", "skip"] = "stop"  # what to do at a line that cannot be read


def load_splits(cfg: RowSettings, kind: Kind, tok: Tokenizer, max_len: int, dist: Dist,
                least: int = 0) -> tuple[Rows, Rows]:
    """What a stage trains on and what it is judged by: `cfg.val_data`, or a part of `cfg.data`.
    Raises ValueError if that is fewer than `least` examples."""
    with first_rank_first(dist):
        found = load_examples(cfg.data, kind, tok, max_len, f"{cfg.out_dir}/data",
                              0.0 if cfg.val_data else cfg.val_fraction, cfg.on_bad_line)
        train, val = found["train"], found["val"]
        if cfg.val_data:
            val = load_examples(cfg.val_data, kind, tok, max_len, f"{cfg.out_dir}/val_data", 0.0,
                                cfg.on_bad_line)["train"]
    if len(val) < least:
        many = "only one" if len(val) else "no"
        raise ValueError(f"{cfg.val_data or cfg.data}: {many} {kind} fell into the held-out part: "
                         "raise --val_fraction or give another --val_data")
    return train, val
