"""train_pt.py: the loss, the resume, the processes, and what a user may get wrong."""
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import convert
import data
import train_pt
from demo.world import pt_document
from generate import complete
from model import Transformer
from plumbing import checkpoint, runtime
from plumbing.files import write_text
from plumbing.jobs import Progress
from plumbing.loading import load_model
from plumbing.optim import make_optimizers
from tokenizer import HAN_PATTERN, count_pieces, dump, train_bpe

ROOT = Path(train_pt.__file__).parent
ALONE = runtime.Dist(0, 1, torch.device("cpu"), torch.float32)


def prepare(text: Path, tok: Path, out_dir: Path) -> None:
    data.prepare(data.Config(str(text), str(tok), str(out_dir), val_fraction=0.1, workers=1),
                 Progress())


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> str:
    """A prepared folder: 600 documents of the toy world, vocabulary 300."""
    folder = tmp_path_factory.mktemp("pt")
    docs = [pt_document(random.Random(i), "train", 2, 3, 0.3) for i in range(600)]
    lines = [json.dumps({k: d[k] for k in ("text", "lang")}) + "\n" for d in docs]
    write_text(folder / "pt.jsonl", "".join(lines))
    tokens = train_bpe(count_pieces(d["text"] for d in docs), 296)
    write_text(folder / "tok.txt", dump(tokens, HAN_PATTERN))
    prepare(folder / "pt.jsonl", folder / "tok.txt", folder / "data")
    return str(folder / "data")


@pytest.fixture
def cfg(data_dir, tmp_path) -> train_pt.Config:
    return train_pt.Config(
        data_dir=data_dir, out_dir=str(tmp_path / "run"), n_layer=2, n_embd=32, n_head=2,
        n_kv_head=1, max_seq_len=32, batch_tokens=256, batch_size=8, max_steps=30, warmup_steps=5,
        eval_every=10, eval_tokens=500, save_every=10, sample_every=0, log_every=10,
        dtype="float32")


def losses(cfg: train_pt.Config) -> list[str]:
    rows = [json.loads(line) for line in open(os.path.join(cfg.out_dir, "log.jsonl"))]
    return [row["loss"].hex() for row in rows if "loss" in row]


def command(cfg: train_pt.Config, **more) -> list[str]:
    settings = {**{k: v for k, v in vars(cfg).items() if v != getattr(train_pt.Config, k)}, **more}
    return ["train_pt.py", *(f"--{k}={v}" for k, v in settings.items())]


def start(arguments: list[str], runner=(sys.executable,)) -> subprocess.Popen:
    return subprocess.Popen([*runner, *arguments], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_loss_and_gradients_are_those_of_cross_entropy():
    """Seen to fail with reduction="mean", and with hidden instead of targets flattened wrongly."""
    torch.manual_seed(0)
    hidden = torch.randn(3, 50, 16, requires_grad=True)
    head = torch.randn(1000, 16, requires_grad=True)
    targets = torch.randint(0, 1000, (3, 50))
    targets[0, :7] = data.IGNORE
    ours = train_pt.pt_loss(hidden, head, targets)
    plain = F.cross_entropy((hidden @ head.T).flatten(0, 1), targets.flatten(), reduction="sum")
    assert ours.item() == pytest.approx(plain.item(), rel=1e-6)
    both = (torch.autograd.grad(loss, (hidden, head)) for loss in (ours, plain))
    for a, b in zip(*both):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def test_a_masked_document_costs_what_it_costs_alone(cfg, tmp_path):
    """Each piece of a window is read by itself, from <|endoftext|> to the next. Seen to fail with
    documents counted from the token after, and with a run that passes no segments."""
    torch.manual_seed(0)
    tok, splits = data.open_data(cfg.data_dir)
    model, file = Transformer(train_pt.shape(cfg, tok.n_vocab)), splits["val"][0]
    nats, n = 0.0, 0
    for x, y in data.passages(file, 32, 8):
        for inputs, targets in zip(x, y):
            begins = [0, *(i for i in range(1, 32) if inputs[i] == tok.endoftext), 32]
            for a, b in zip(begins, begins[1:]):
                nats += F.cross_entropy(model(inputs[None, a:b])[0], targets[a:b],
                                        ignore_index=data.IGNORE, reduction="sum").item()
            n += int((targets != data.IGNORE).sum())
    masked, whole = (train_pt.evaluate(model, tok, [file], 8, ALONE, None, apart)[file.lang][0]
                     for apart in (True, False))
    assert masked == pytest.approx(nats / n, abs=1e-5) and abs(masked - whole) > 1e-5
    runs = [replace(cfg, mask_documents=mask, out_dir=str(tmp_path / str(mask)), log_every=5)
            for mask in (True, False)]
    for run in runs:
        train_pt.train(run, ALONE)
    assert losses(runs[0]) != losses(runs[1])


def test_training_starts_at_ln_v_and_falls_below_the_unigram_entropy(cfg):
    train_pt.train(replace(cfg, max_steps=100), ALONE)
    trace = [float.fromhex(x) for x in losses(cfg)]
    files = data.open_data(cfg.data_dir)[1]["train"]
    counts = Counter(np.concatenate([f.ids for f in files]).tolist())
    entropy = -sum(n / counts.total() * math.log(n / counts.total()) for n in counts.values())
    assert trace[0] == pytest.approx(math.log(300), abs=0.1) and trace[-1] < entropy - 0.5


def test_a_run_killed_anywhere_gives_the_same_losses_to_the_last_bit(cfg, tmp_path):
    """SIGKILL at random moments of a run that saves each step; every start resumes. Seen to fail
    when the optimizer was not restored, and when the batch depended on the process's first step."""
    whole, torn = cfg, replace(cfg, out_dir=str(tmp_path / "torn"), save_every=1, resume=True)
    train_pt.train(whole, ALONE)
    r, kills = random.Random(0), 0

    def newest() -> str:
        return max((p.name for p in Path(torn.out_dir).glob("step*.pt")), default="")

    for _ in range(100):
        seen, more = newest(), r.randrange(1, 8)  # checkpoints it may write before it is killed
        pid = os.fork()
        if pid == 0:
            try:
                sys.stdout = open(os.devnull, "w")
                train_pt.train(torn, ALONE)
                os._exit(0)
            finally:
                os._exit(1)
        while more and not (ended := os.waitpid(pid, os.WNOHANG))[0]:
            time.sleep(0.001)
            more, seen = more - (newest() > seen), newest()
        if not ended[0]:
            time.sleep(r.uniform(0, 0.02))  # anywhere in a step, or while it is saved
            os.kill(pid, signal.SIGKILL)
            ended = os.waitpid(pid, 0)
        code = os.waitstatus_to_exitcode(ended[1])
        if code == 0:
            break
        assert code == -signal.SIGKILL
        kills += 1
    assert code == 0 and kills >= 2
    assert losses(torn) == losses(whole)
    ours, theirs = checkpoint.load(whole.out_dir)[0], checkpoint.load(torn.out_dir)[0]
    assert all(torch.equal(ours["model"][k], theirs["model"][k]) for k in ours["model"])


def test_sigterm_saves_at_the_step_and_says_how_to_go_on(cfg):
    arguments = command(cfg, max_steps=100_000)
    process = start(arguments)
    while not (line := process.stdout.readline()).startswith("step "):
        assert line, "ended early"
    process.terminate()
    said = process.communicate(timeout=20)[0]
    assert process.returncode == 0
    step = checkpoint.load(cfg.out_dir)[0]["step"]
    assert f"stopped by SIGTERM at step {step:,}" in said and "--resume" in said
    assert "Traceback" not in said
    assert len(losses(cfg)) == step


def test_two_processes_give_the_losses_of_one(cfg, tmp_path):
    """Seen to fail when each rank divided by its own share of the tokens."""
    cfg = replace(cfg, learning_rate=1e-3)  # at 1e-2 rounding grows by 10 every few steps
    train_pt.train(cfg, ALONE)
    both = replace(cfg, out_dir=str(tmp_path / "two"), batch_size=4)
    torchrun = (sys.executable, "-m", "torch.distributed.run")
    process = start(["--nproc_per_node=2", *command(both)], torchrun)
    said = process.communicate(timeout=400)[0]
    assert process.returncode == 0, said
    one, two = ([float.fromhex(x) for x in losses(c)] for c in (cfg, both))
    assert two == pytest.approx(one, rel=1e-5)
    assert "2 x cpu" in said and said.count("saved ") == 3


def test_accumulation_does_not_change_the_update(cfg, tmp_path):
    cfg = replace(cfg, learning_rate=1e-3)
    train_pt.train(cfg, ALONE)
    parts = replace(cfg, out_dir=str(tmp_path / "parts"), batch_size=2)
    train_pt.train(parts, ALONE)
    one, four = ([float.fromhex(x) for x in losses(c)] for c in (cfg, parts))
    assert four == pytest.approx(one, rel=1e-5)


def test_muon_takes_the_matrices_of_the_blocks_and_learns(cfg):
    from model import Transformer
    cfg = replace(cfg, optimizer="muon", learning_rate=5e-3)
    model = Transformer(train_pt.shape(cfg, 300))
    adamw, muon = make_optimizers(model, cfg)
    matrices = {id(p) for p in model.layers.parameters() if p.dim() == 2}
    assert {id(p) for p in muon.param_groups[0]["params"]} == matrices
    taken = [id(p) for o in (adamw, muon) for g in o.param_groups for p in g["params"]]
    assert sorted(taken) == sorted(id(p) for p in model.parameters())
    assert [g["weight_decay"] for g in adamw.param_groups] == [cfg.weight_decay, 0.0]
    train_pt.train(cfg, ALONE)
    trace = [float.fromhex(x) for x in losses(cfg)]
    assert trace[-1] < trace[0] - 1
    train_pt.train(replace(cfg, resume=True, max_steps=30), ALONE)  # both optimizers come back


@pytest.mark.parametrize("tied", [True, False])
def test_matrices_decay_but_not_an_embedding_that_is_only_looked_up(cfg, tied):
    from model import Transformer
    model = Transformer(train_pt.shape(replace(cfg, tied=tied), 300))
    adamw, = make_optimizers(model, cfg)
    decays = {id(p): g["weight_decay"] for g in adamw.param_groups for p in g["params"]}
    for name, p in model.named_parameters():
        wanted = p.dim() == 2 and (tied or name != "embed_tokens.weight")
        assert decays[id(p)] == cfg.weight_decay * wanted, name


def test_a_gradient_that_is_not_finite_ends_the_run_with_finite_checkpoints(cfg):
    process = start(command(cfg, learning_rate=1e25, warmup_steps=0, save_every=1))
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 4 and "skipped 3/3" in said and "Traceback" not in said
    assert said.splitlines()[-1].count(cfg.out_dir)
    state, _ = checkpoint.load(cfg.out_dir)
    assert all(torch.isfinite(w).all() for w in state["model"].values())


def test_bits_per_byte_is_the_whole_cost_over_the_exact_bytes(cfg):
    """By hand, window by window: nats of every token but a file's first, over its bytes."""
    train_pt.train(replace(cfg, max_steps=10, eval_tokens=10**9), ALONE)
    model, tok = load_model(cfg.out_dir, ALONE.device, torch.float32)
    rows = [json.loads(line) for line in open(f"{cfg.out_dir}/log.jsonl")]
    last = [row["val"] for row in rows if "val" in row][-1]
    for file in data.open_data(cfg.data_dir)[1]["val"]:
        ids, nats = torch.from_numpy(file.ids.astype(np.int64)), 0.0
        for at in range(0, len(ids) - 1, cfg.max_seq_len):
            part = ids[at:at + cfg.max_seq_len + 1][None]
            nats += F.cross_entropy(model(part[:, :-1])[0], part[0, 1:], reduction="sum").item()
        n_bytes = len(tok.decode_bytes([t for t in ids[1:].tolist() if t != tok.endoftext]))
        bits = nats / math.log(2)
        assert last[file.lang]["bits_per_byte"] == pytest.approx(bits / n_bytes, rel=1e-5)
        assert file.n_bytes == n_bytes + len(tok.decode_single_token_bytes(int(ids[0])))


def test_eval_only_scores_a_checkpoint_on_any_split(cfg, capsys):
    train_pt.train(cfg, ALONE)
    said = capsys.readouterr().out.splitlines()
    last = [line for line in said if line.startswith("val at step 30")][-1]
    # no sizes given
    judge = train_pt.Config(data_dir=cfg.data_dir, eval_only=True, init_from=cfg.out_dir)
    train_pt.judge(judge, ALONE)
    assert last.partition("|")[2] in capsys.readouterr().out
    scores = {}
    for split in ("train", "all"):
        train_pt.judge(replace(judge, split=split), ALONE)
        scores[split] = capsys.readouterr().out.splitlines()[-1]
    assert scores["train"].split("|")[1:] != scores["all"].split("|")[1:]
    assert "| zh" in scores["all"]
    with pytest.raises(ValueError, match="--eval_only needs --init_from"):
        train_pt.judge(replace(judge, init_from=""), ALONE)


def test_a_copied_config_with_another_width_trains_resumes_and_generates(cfg, tmp_path):
    """What a fork does first."""
    text = (ROOT / "config/pt_micro.py").read_text()
    (tmp_path / "my.py").write_text(text + "n_embd = 48\n")
    common = ["train_pt.py", str(tmp_path / "my.py"), f"--data_dir={cfg.data_dir}",
              f"--out_dir={cfg.out_dir}", "--warmup_steps=1", "--max_steps=4", "--sample_every=2"]
    for more in ([], ["--resume"]):
        process = start([*common, *more])
        said = process.communicate(timeout=60)[0]
        assert process.returncode == 0 and "val at step 4" in said and "sample zh" in said, said
    model, tok = load_model(cfg.out_dir, ALONE.device, torch.float32)
    assert model.config.n_embd == 48
    text, = complete(model, tok, [tok.encode_ordinary("The")], 5)
    assert isinstance(text, str)


@pytest.mark.parametrize("change, message", [
    (dict(batch_tokens=250), "batch_tokens 250 must be a multiple of batch_size x processes x "
                             "max_seq_len = 8 x 1 x 32 = 256; try 256"),
    (dict(n_head=3), "n_embd 32 must be a multiple of n_head 3"),
    (dict(n_kv_head=3), "n_head 2 must be a multiple of n_kv_head 3"),
    (dict(warmup_steps=30), "warmup_steps 30 must be less than max_steps 30"),
    (dict(data_dir="nowhere"), "nowhere: no prepared data here; make it with python data.py"),
])
def test_a_mistake_is_one_line_before_any_work(cfg, change, message):
    with pytest.raises(ValueError, match=r"\A[^\n]*\Z") as error:
        train_pt.train(replace(cfg, **change), ALONE)
    assert message in str(error.value) and not os.path.exists(cfg.out_dir)


def test_pre_training_begins_from_8_bits_too(tiny, tmp_path):
    """Seen to fail with a traceback."""
    convert.give_out(convert.Config(checkpoint=tiny.pt, to="int8", out=str(tmp_path / "int8")))
    model = Transformer(tiny.model.config)
    train_pt.load_weights(str(tmp_path / "int8"), model, tiny.tok)
    for name, own in tiny.model.state_dict().items():
        assert (model.state_dict()[name] - own).abs().max() <= own.abs().max() / 200, name


def test_runs_are_not_mixed(cfg, data_dir, tmp_path):
    short = replace(cfg, max_steps=6)
    train_pt.train(short, ALONE)
    with pytest.raises(ValueError, match="holds a run already"):
        train_pt.train(short, ALONE)
    with pytest.raises(ValueError, match="another shape: n_layer is 2, asked for 3"):
        train_pt.train(replace(short, resume=True, n_layer=3), ALONE)
    with pytest.raises(ValueError, match="trained with another --optimizer"):
        train_pt.train(replace(short, resume=True, optimizer="muon"), ALONE)
    other = tmp_path / "other"
    tokens = [bytes([i]) for i in range(256)] + [b"ab", b"abc"]
    write_text(tmp_path / "tok.txt", dump(tokens, HAN_PATTERN))
    prepare(Path(data_dir).parent / "pt.jsonl", tmp_path / "tok.txt", other)
    with pytest.raises(ValueError, match="another (tokenizer|shape)"):
        train_pt.train(replace(short, resume=True, data_dir=str(other)), ALONE)
