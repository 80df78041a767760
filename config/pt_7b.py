"""
7B parameters, a shape to fork, with a vocabulary of 65,536.

    torchrun --nproc_per_node=8 train_pt.py config/pt_7b.py --data_dir=DIR

It needs 8 GPUs of 80 GB and fills 34.5 GB of each (python -m bench.estimate config/pt_7b.py).
Nobody has run it at this size; tests/test_large.py runs this file with small ones.
"""
data_dir = "out/7b/data"
out_dir = "out/7b/pt"

n_layer = 32
n_head = 32
n_kv_head = 8
n_embd = 4096
n_hidden = 13824
max_seq_len = 4096
rope_theta = 500_000.0
tied = False
batch_tokens = 4_194_304
batch_size = 4
shard = True
recompute = True
max_steps = 35_000
learning_rate = 3e-4
warmup_steps = 2000
schedule = "wsd"
final_lr = 0.0
eval_every = 500
eval_tokens = 4_000_000
save_every = 1000
sample_every = 1000
compile = True
dist_timeout = 1800.0  # the others wait while one writes a checkpoint of 88 GB
