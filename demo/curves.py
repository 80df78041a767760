"""
The curves of the demo: what each stage's log.jsonl says, beside what it can reach at best.

    python -m demo.curves [--out_dir=out/demo]      writes curves.png there; pip install matplotlib

The picture has a panel for each stage that has a log. Dashed lines are known before the run: the
entropy of the text (no model gets below it), log 2 (the loss of a model that cannot tell two
replies apart), the best log-loss that the drawn labels allow, the budget of the KL.
"""
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import train_rl
from configurator import FilePath, configure, fail
from plumbing import terminal

Points = dict[str, tuple[list[float], list[float]]]  # name of a curve: steps, values


@dataclass(frozen=True)
class Config:
    out_dir: FilePath = "out/demo"  # of the demo; the picture goes there too


def read(path: Path, figures: Callable[[dict], dict[str, float]]) -> Points:
    """The curves of a log: `figures` gives for a record the values it has, by name of the curve."""
    found: Points = {}
    for record in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        for name, value in figures(record).items():
            steps, values = found.setdefault(name, ([], []))
            steps.append(record["step"])
            values.append(value)
    return found


def panels(out: Path) -> list[tuple[str, str, Points, dict[str, float]]]:
    """(title, unit, curves, dashed lines) of the stages that have a log."""
    floor, file = {}, out / "world/floor.json"
    if file.exists():
        floor = json.loads(file.read_text(encoding="utf-8"))
    entropy = {f"floor {lang}": bits for lang, bits in floor.get("pt", {}).items() if lang != "all"}
    best = {"Bayes": floor["pairs_heldout_bayes"]["loss"]} if floor else {}
    config = Path(__file__).parent.parent / "config/rl_micro.py"
    budget = configure(train_rl.Config, [str(config)], show=False).kl_budget
    stages = [
        ("pt", "PT", "bits / byte", lambda r: {
            lang: v["bits_per_byte"] for lang, v in r.get("val", {}).items()}, entropy),
        ("sft", "SFT", "nats / supervised token", lambda r: r.get("val", {}), {}),
        ("rm", "RM", "log-loss", lambda r: {
            key: v["log_loss"] for key, v in r.get("val", {}).items() if key == "all"},
         {"cannot tell: log 2": math.log(2)} | best),
        ("dpo", "DPO", "loss", lambda r: {"training": r["loss"]} if "loss" in r else {
            "held out": r["val"]["pairs"]["all"]["loss"]}, {"the start: log 2": math.log(2)}),
        ("rl", "RL", "sd, nats / reply", lambda r: {
            name + (", held out" if "val" in r else ""): r.get("val", r)[key]
            for name, key in (("reward", "reward"), ("KL", "kl"))}, {"budget of the KL": budget})]
    return [(title, unit, read(out / name / "log.jsonl", figures), lines)
            for name, title, unit, figures, lines in stages if (out / name / "log.jsonl").exists()]


def draw(out: Path) -> Path | None:
    """Draw the curves into `out`/curves.png; where it is, or None and a line that says why not."""
    if not find_spec("matplotlib"):
        print("no curves: pip install matplotlib, then python -m demo.curves")
        return None
    from matplotlib.figure import Figure
    found = panels(out)
    if not found:
        print(f"no curves: there is no log.jsonl of a stage in {out}")
        return None
    figure = Figure(figsize=(11, 6), layout="constrained")
    axes = figure.subplots(2, 3)
    for ax in axes.flat[len(found):]:
        ax.set_axis_off()
    for ax, (title, unit, curves, lines) in zip(axes.flat, found):
        for name, (steps, values) in curves.items():
            ax.plot(steps, values, label=name, marker="." if len(steps) < 20 else "")
        for i, (name, value) in enumerate(lines.items()):
            ax.axhline(value, label=name, color=f"C{i}" if title == "PT" else f"{0.6 * i}",
                       linestyle="--", linewidth=1)
        ax.set(title=title, xlabel="step", ylabel=unit)
        ax.legend(fontsize="small")
    path = out / "curves.png"
    figure.savefig(path, dpi=80)
    return path


def main() -> None:
    out = Path(configure(Config).out_dir)
    if not out.is_dir():
        fail(f"--out_dir={out}: no such folder; python -m demo makes it")
    if path := draw(out):
        print(f"written to {path}")


if __name__ == "__main__":
    terminal.run(main)
