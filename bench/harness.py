"""
evaluate.py beside lm-evaluation-harness: the same figures of the same rows, and the seconds of CPU
time that each takes, which other programs on the machine change little.

    python -m bench.harness --checkpoint=out/smol --hf=FOLDER --tasks=arc_easy.jsonl --limit=100

FOLDER holds the same model for `transformers` (python convert.py --to=hf writes one). It needs
`pip install "lm_eval[hf]"`. Multiple choice, last words and perplexity are compared: for each task
the harness gets a task of its own with our rows, the same first token and the same window.
"""
import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import evaluate
from configurator import FilePath, configure
from plumbing.benchmarks import read_task
from plumbing.corpus import find_files
from plumbing.examples import evenly_spaced
from plumbing.terminal import fail, run


@dataclass(frozen=True)
class Config(evaluate.Config):
    hf: FilePath = ""  # folder with the same model for transformers


# what our figures are called there
NAMES = {"choice": {"acc": "acc,none", "acc_norm": "acc_norm,none"},
         "cloze": {"acc": "acc,none", "perplexity": "perplexity,none"},
         "text": {"bits_per_byte": "bits_per_byte,none"}}


def task_of(kind: str, name: str, rows: list[dict], joint: str, folder: str) -> Any:
    """The rows as a task of the harness."""
    from lm_eval.api.task import ConfigurableTask
    path = Path(folder, f"{name}.jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    config: dict[str, Any] = {
        "task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(path)}},
        "test_split": "test", "num_fewshot": 0, "target_delimiter": joint}
    if kind == "choice":
        config |= {"output_type": "multiple_choice", "doc_to_text": "{{query}}",
                   "doc_to_choice": "{{choices}}", "doc_to_target": "gold",
                   "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]}
    elif kind == "cloze":
        config |= {"output_type": "loglikelihood", "doc_to_text": "{{context}}",
                   "doc_to_target": joint + "{{target}}",
                   "metric_list": [{"metric": "acc"}, {"metric": "perplexity"}]}
    else:
        config |= {"output_type": "loglikelihood_rolling", "doc_to_text": "",
                   "doc_to_target": "{{text}}", "metric_list": [{"metric": "bits_per_byte"}]}
    return ConfigurableTask(config=config)


def main() -> None:
    cfg = configure(Config, show=False)
    try:
        import torch
        from lm_eval import evaluator
        from lm_eval.models.huggingface import HFLM
    except ImportError:
        fail('python -m bench.harness needs pip install "lm_eval[hf]"')
    judge = evaluate.Judge(cfg)
    there = HFLM(pretrained=cfg.hf, dtype=torch.float32, device="cpu", batch_size=8,
                 max_length=judge.window, prefix_token_id=judge.tok.endoftext)
    judge.scores([([0], [[0]])])  # the weights come into the memory before the clock runs
    there.model(torch.zeros(1, 1, dtype=torch.long))
    print("| task | rows | figure | ours | theirs | seconds, ours and theirs | times as fast |\n"
          "|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for path in find_files(cfg.tasks):
            rows, kind = read_task(path)
            chosen = [rows[i] for i in evenly_spaced(range(len(rows)), cfg.limit or None)]
            name = Path(path).stem
            joint = " " if chosen[0]["lang"] == "en" and chosen[0].get("query") != "" else ""
            task = task_of(kind, name, chosen, joint, folder)
            start = time.process_time()
            ours = getattr(judge, kind)(chosen, joint)
            middle = time.process_time()
            theirs = evaluator.evaluate(there, {name: task}, bootstrap_iters=0)["results"][name]
            mine, other = middle - start, time.process_time() - middle
            took = f"{mine:.1f}, {other:.1f} | {other / mine:.2f}"
            judge.progress.end()
            for figure, there_named in NAMES[kind].items():
                found = ours[figure][0] if isinstance(ours[figure], list) else ours[figure]
                scale = 100 if figure.startswith("acc") else 1
                print(f"| {name} | {len(chosen)} | {figure} | {found:.4g} | "
                      f"{scale * theirs[there_named]:.4g} | {took} |")
            sys.stdout.flush()


if __name__ == "__main__":
    run(main)
