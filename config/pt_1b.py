"""
1B parameters, the reference size of this project, on 20B tokens with a vocabulary of 65,536.

    torchrun --nproc_per_node=8 train_pt.py config/pt_1b.py --data_dir=DIR

It is for 8 GPUs with 80 GB, which was not tried. One H200 learns from 76,000 tokens a second.
"""
data_dir = "out/1b/data"
out_dir = "out/1b/pt"

n_layer = 24
n_head = 16
n_kv_head = 4
n_embd = 2048
n_hidden = 4096
max_seq_len = 2048
rope_theta = 100_000.0
batch_tokens = 1_048_576
batch_size = 8
max_steps = 20_000
learning_rate = 4e-4
warmup_steps = 1000
schedule = "wsd"
final_lr = 0.0
eval_every = 500
eval_tokens = 2_000_000
save_every = 1000
sample_every = 1000
sample_tokens = 100
compile = True
