"""
Characters of a small text of your own, an input.txt of a megabyte. 2 CPU cores.

    python tokenizer.py --input=input.txt --kind=char --out=out/char/tokenizer.txt
    python data.py --input=input.txt --tokenizer=out/char/tokenizer.txt \\
                   --out_dir=out/char/data --val_fraction=0.1
    python train_pt.py config/pt_char.py

The size is that of nanoGPT's laptop run, with a third of its steps. On tiny Shakespeare the
validation loss ends at 1.55 (docs/results.md).
"""
data_dir = "out/char/data"
out_dir = "out/char/pt"

n_kv_head = 4
n_embd = 128
n_hidden = 352
max_seq_len = 64
batch_tokens = 768
batch_size = 12
max_steps = 667
optimizer = "muon"
final_lr = 0.0
warmup_steps = 20
eval_every = 100
eval_tokens = 20_000
save_every = 200
sample_every = 400
sample_tokens = 56
log_every = 50
