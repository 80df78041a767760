"""
124M parameters, the size of GPT-2 small, on 10B tokens of your own text.

    torchrun --nproc_per_node=8 train_pt.py config/pt_124m.py --data_dir=DIR
    python train_pt.py config/pt_124m.py --data_dir=DIR

Both make the same updates. One H200 learns from 420,000 tokens a second (docs/results.md), so it
needs seven hours. Eight GPUs were not tried.
"""
data_dir = "out/124m/data"
out_dir = "out/124m/pt"

n_layer = 12
n_head = 12
n_kv_head = 12
n_embd = 768
n_hidden = 2048
max_seq_len = 1024
batch_tokens = 524_288
max_steps = 19_000
optimizer = "muon"
learning_rate = 3e-3
warmup_steps = 500
eval_every = 500
eval_tokens = 1_000_000
save_every = 1000
sample_every = 1000
compile = True
