"""What every stage says it will take against what it takes: the scripts' own `train`, at two sizes,
in a process that has loaded torch's code and that counts from before the model is loaded."""
import contextlib
import gc
import io
import json
import multiprocessing
import re
import signal
import sys
from dataclasses import asdict, replace
from pathlib import Path
from random import Random

import pytest
import torch
from conftest import multiplies_bf16

import train_dpo
import train_rl
import train_rm
import train_sft
from model import ModelConfig, RewardModel, Transformer
from plumbing import checkpoint, costs, rewards, runtime
from tokenizer import HAN_PATTERN, Tokenizer, dump

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
SCRIPTS = {"sft": train_sft, "rm": train_rm, "dpo": train_dpo, "rl": train_rl}
# vocabulary, layers, heads, kv heads, width, head, hidden, window; rows at once; characters of a
# prompt and of a reply
WARM = (260, 1, 2, 1, 32, 16, 64, 64), 4, 20, 8
SIZES = {"state": ((2052, 4, 6, 3, 384, 64, 1024, 64), 2, 24, 8),  # 16 bytes a weight are most
         "rows": ((2052, 3, 4, 2, 256, 64, 704, 128), 8, 78, 16),  # activations are most
         "judged": ((2052, 1, 4, 2, 256, 64, 1408, 128), 8, 78, 16),  # one layer: not training
         "49k": ((49_152, 2, 4, 2, 256, 64, 704, 128), 8, 78, 16),  # the head is most
         "152k": ((151_936, 2, 4, 2, 256, 64, 704, 64), 2, 24, 8)}
KINDS = {
    "sft": ("sft", {}), "sft lora": ("sft", dict(lora_rank=4)),
    "sft extra": ("sft", dict(lora_rank=4, lora_extra=True)),
    "dpo lora": ("dpo", dict(lora_rank=4)), "rl lora": ("rl", dict(lora_rank=4)),
    "rm lora": ("rm", dict(lora_rank=4)),
    "sft muon": ("sft", dict(optimizer="muon")),
    "rm": ("rm", {}), "dpo": ("dpo", {}), "dpo unsampled": ("dpo", dict(eval_samples=0)),
    "rl": ("rl", {}),
    "sft bf16": ("sft", dict(dtype="bfloat16")), "dpo bf16": ("dpo", dict(dtype="bfloat16"))}
if multiplies_bf16() < 1:  # it would take minutes
    KINDS = {kind: how for kind, how in KINDS.items() if "bf16" not in kind}
CASES = [(kind, size) for kind in KINDS for size in ("state", "rows")]
CASES += [("sft", "judged"), ("rl", "judged")]
CASES += [(kind, size) for kind in KINDS if kind in ("sft", "sft lora", "sft bf16")
          for size in ("49k", "152k")]


def make(folder: Path, shape: tuple, prompt: int, reply: int) -> None:
    """A model, a reward model, and chats, rankings, pairs and prompts of about one length."""
    two = range(min(shape[0], 2052) - 260)  # a model may have more rows than there are tokens
    tok = Tokenizer(dump([bytes([i]) for i in range(256)]
                         + [bytes([128 + i // 256, i % 256]) for i in two], HAN_PATTERN))
    model = Transformer(ModelConfig(*shape))
    for kind, module in (("sft", model), ("rm", RewardModel(model))):
        checkpoint.save(str(folder / kind), 0, {
            "format": 1, "kind": kind, "step": 0, "model": module.state_dict(), "optimizer": [],
            "model_config": asdict(model.config), "config": {}, "tokenizer": tok.text})
    r = Random(0)

    def text(n: int) -> str:
        return "".join(r.choices("abcdefgh", k=n))

    rows: dict[str, list] = {"chat": [], "ranking": [], "pair": [], "prompt": []}
    for _ in range(32):
        asked = [{"role": "user", "content": text(prompt)}]
        rows["chat"].append({"messages": [*asked, {"role": "assistant", "content": text(reply)}]})
        rows["ranking"].append({"prompt": asked, "ranking": [text(reply) for _ in range(3)]})
        rows["pair"].append({"prompt": asked, "chosen": text(reply), "rejected": text(reply)})
        rows["prompt"].append({"prompt": asked})
    for name, some in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))


def settings(kind: str, folder: Path, shape: tuple, B: int, reply: int):
    """Two optimizer steps of two micro-steps (RL: four) of about B rows, a validation before and
    behind."""
    stage, changes = KINDS[kind]
    data = {"sft": "chat", "rm": "ranking", "dpo": "pair", "rl": "prompt"}[stage]
    cfg = SCRIPTS[stage].Config(
        init_from=str(folder / "sft"), data=str(folder / f"{data}.jsonl"),
        val_data=str(folder / f"{data}.jsonl"), out_dir=str(folder / f"{kind} run"),
        answer_tokens=reply, max_steps=2, warmup_steps=0, learning_rate=1e-4, save_every=9,
        device="cpu", dtype="float32")
    return replace(cfg, **{
        "sft": dict(batch_size=B, batch_tokens=2 * B * shape[-1], eval_answers=4),
        "rm": dict(batch_size=B // 2, batch_pairs=B, norm_samples=4),
        "dpo": dict(batch_size=B // 2, batch_pairs=B, eval_samples=4),
        "rl": dict(reward_from=str(folder / "rm"), batch_size=B, group=4, prompts_per_step=B,
                   rollout_size=4 * B, eval_prompts=4)}[stage] | changes)


def measure(folder: Path, cases: list[tuple[str, str]]) -> dict | str:
    """For each case (bytes foretold, bytes at most, what was printed); or why it cannot be told."""
    torch.set_num_threads(1)
    foretold = []

    def remembered(*shape, stage_memory=costs.stage_memory, **moments) -> dict[str, int]:
        parts = stage_memory(*shape, **moments)
        foretold.append(sum(parts.values()))
        return parts
    costs.stage_memory, found = remembered, {}
    # of random weights no reply ends: all rewards are equal, and no update would be made
    train_rl.that_teach = lambda A, *rest: rewards.that_teach(A * 0 + 1, *rest)
    for kind, size in [(kind, "warm") for kind in KINDS] + cases:
        shape, B, prompt, reply = SIZES.get(size, WARM)
        place = folder / size
        if not place.exists():
            make(place, shape, prompt, reply)
        cfg = settings(kind, place, shape, B, reply)
        gc.collect()
        try:  # the most so far is what there is now
            Path("/proc/self/clear_refs").write_text("5")
        except OSError as error:
            return f"{error}"
        dist = runtime.setup("cpu", cfg.dtype)
        try:
            with contextlib.redirect_stdout(io.StringIO()) as out:
                SCRIPTS[KINDS[kind][0]].train(cfg, dist)
        finally:  # a run stops at its next step when asked to; the pool asks once and waits
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        found[kind, size] = foretold[-1], costs.peak_memory(dist.device), out.getvalue()
    return found


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> dict:
    """With this threshold malloc gives back what is freed; else it holds up to a third more."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found = pool.apply(measure, (tmp_path_factory.mktemp("memory"), CASES))
    if isinstance(found, str):
        pytest.skip(f"the peak cannot be reset here: {found}")
    return found


@pytest.mark.parametrize("kind, size", CASES)
def test_a_stage_takes_what_it_says(measured, kind, size):
    """Within 15 % of what the two lines say that a run prints."""
    need, peak, out = measured[kind, size]
    line = re.search(r"^memory: ([\d.]+) GB = .*", out, re.M)
    print(f"{kind}, {size}: {need / 1e6:.1f} MB foretold, {peak / 1e6:.1f} taken; {line[0]}")
    assert float(line[1]) == pytest.approx(need / 1e9, abs=0.0051)
    said = re.search(r"^peak memory ([\d.]+) GB, beside [\d.]+ GB of Python and torch$", out, re.M)
    assert float(said[1]) == pytest.approx(peak / 1e9, abs=0.0051)
    assert need == pytest.approx(peak, rel=0.15)


def test_what_is_fullest_is_named(measured):
    for case, part in {("sft", "rows"): "activations", ("dpo", "rows"): "reference",
                       ("sft", "judged"): "evaluation", ("rl", "judged"): "writing",
                       ("rl", "state"): "reward model"}.items():
        assert f" {part} " in re.search(r"^memory: .*", measured[case][2], re.M)[0], case


if __name__ == "__main__":
    pytest.main([__file__, "-rP"])
