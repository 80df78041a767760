"""
Opens the chats, pairs or prompts that a stage learns from; its settings. The rest may be skipped.
"""
import math
from dataclasses import dataclass
from typing import Literal

from configurator import Count, FilePath, Positive, Share
from model import Transformer
from plumbing.costs import count_parameters
from plumbing.examples import Kind, Rows, load_examples
from plumbing.log import describe_run
from plumbing.lora import LoraSettings
from plumbing.order import Order
from plumbing.runtime import Dist, first_rank_first, print0
from tokenizer import Tokenizer


@dataclass(frozen=True)
class RowSettings(LoraSettings):
    """What a stage that learns from chats, pairs or prompts can be told of them."""
    data: str = ""  # what to learn from: JSONL files or folders, comma-separated
    val_data: str = ""  # what to judge by, of the same kind; empty: a part of data
    val_fraction: Share = 0.05  # share of data to judge by, if there is no val_data
    on_bad_line: Literal["stop", "skip"] = "stop"  # what to do at a line that cannot be read


@dataclass(frozen=True)
class PairSettings(RowSettings):
    """What train_rm.py and train_dpo.py can be told of their pairs."""
    init_from: FilePath = "out/sft"  # checkpoint to start from: a file, or a folder's newest
    data: str = "out/toyworld/pairs.jsonl"  # pairs to learn: JSONL files or folders, with commas
    max_len: Count | None = None  # drop pairs with more tokens; None: what the model can read
    epochs: Positive = 1.0  # how often every pair is seen; a second time often overfits
    max_steps: Count | None = None  # optimizer steps; None: as many as the epochs need
    batch_pairs: Count = 64  # pairs an optimizer step learns from
    batch_size: Count = 8  # pairs that a process puts through the model at once
    eval_pairs: Count = 500  # pairs in a validation; the last one takes all
    answer_tokens: Count = 64  # most tokens of a reply that the model is asked for


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
        many, what = "only one" if len(val) else "no", "pair" if kind == "ranking" else kind
        raise ValueError(f"{cfg.val_data or cfg.data}: {many} {what} fell into the held-out part: "
                         "raise --val_fraction or give another --val_data")
    return train, val


def open_pairs(cfg: PairSettings, kind: Kind, model: Transformer, tok: Tokenizer,
               dist: Dist) -> tuple[Rows, Rows, Order, int, int]:
    """The pairs to learn from, those held out, the order in which they are seen, the number of
    optimizer steps, and of micro-steps in each. Prints how much that is. Raises ValueError for
    settings that do not fit together."""
    micro_steps, rest = divmod(cfg.batch_pairs, cfg.batch_size * dist.world)
    if rest:
        unit = cfg.batch_size * dist.world
        raise ValueError(f"batch_pairs {cfg.batch_pairs} must be a multiple of batch_size x "
                         f"processes = {cfg.batch_size} x {dist.world} = {unit}; try "
                         f"{(micro_steps + 1) * unit}")
    reads = model.config.max_seq_len
    if cfg.max_len is not None and cfg.max_len > reads:
        raise ValueError(f"max_len {cfg.max_len} is more than the {reads} tokens that {model.path} "
                         "reads")
    pairs, val = load_splits(cfg, kind, tok, cfg.max_len or reads, dist, least=1)
    order, max_steps = Order(len(pairs), cfg.seed, pairs.name), cfg.max_steps
    if max_steps is None:
        max_steps = math.ceil(cfg.epochs * len(pairs) / cfg.batch_pairs)
    if cfg.warmup_steps >= max_steps:
        raise ValueError(f"warmup_steps {cfg.warmup_steps} must be less than the {max_steps} steps")
    print0(describe_run(dist))
    print0(f"{count_parameters(model.config):,} parameters; {len(pairs):,} pairs of "
           f"{int(pairs.lengths().sum()):,} tokens, {len(val):,} held out; {max_steps:,} steps, "
           f"{max_steps * cfg.batch_pairs / len(pairs):.2f} epochs")
    if model.kind == "pt":
        print0(f"WARNING: {model.path} has not learnt to answer: start from an SFT model")
    return pairs, val, order, max_steps, micro_steps
