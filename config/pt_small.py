"""
27M parameters at a vocabulary of 16,384, for real text on one GPU, or a long day on a CPU.

    python train_pt.py config/pt_small.py --data_dir=DIR

Nobody has run it to its end. On 2 CPU cores config/pt_hour.py learns more in an hour.
"""
data_dir = "out/real/data"
out_dir = "out/real/pt_small"

n_layer = 8
n_head = 7
n_kv_head = 7
n_embd = 448
n_hidden = 1216
max_seq_len = 512

batch_tokens = 32_768
batch_size = 8
max_steps = 6000
optimizer = "muon"
learning_rate = 5e-3
muon_lr = 0.02
warmup_steps = 100
schedule = "wsd"
eval_every = 250
save_every = 250
sample_every = 500
