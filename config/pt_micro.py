"""
The demo's pre-training: 0.3M parameters on the toy world. 2 CPU cores, about 3 minutes.

    python train_pt.py config/pt_micro.py --data_dir=out/demo/data --out_dir=out/demo/pt

To copy a value, a model must first build a copying circuit: attention that finds the fact, and
another head that repeats its value. A high rate and Muon build it quickly, and the rate must not
fall while it forms. The vocabulary matters most: with the demo's 976 tokens nearly every value is
one token. With 768 it is two to seven, with 1,024 some are one with the words before them; either
way fewer are restated right (docs/results.md).
"""
data_dir = "out/demo/data"
out_dir = "out/demo/pt"

n_head = 2
n_hidden = 176
max_seq_len = 256
tied = False
mask_documents = True
batch_size = 16
max_steps = 1000
optimizer = "muon"
learning_rate = 2e-2
schedule = "wsd"
decay_fraction = 0.3
final_lr = 0.0
eval_every = 200
save_every = 500
sample_every = 500
log_every = 50
dtype = "float32"  # a model 64 wide does not gain by bfloat16
