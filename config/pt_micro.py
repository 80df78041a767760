"""
The demo's pre-training: 0.25M parameters on the toy world. 2 CPU cores, about 3 minutes.

    python train_pt.py config/pt_micro.py --data_dir=out/demo/data --out_dir=out/demo/pt

To copy a value, a model must first build a copying circuit: attention that finds the fact, and
another head that repeats its value. A high rate and Muon build it quickly, and the rate must not
fall while it forms. With a vocabulary of 1,200, a token for each value, four heads and no mask, it
had not formed after 1,000 steps; of pieces of words each is seen more often. Masked documents and
two heads instead of four change little by themselves (docs/results.md).
"""
data_dir = "out/demo/data"
out_dir = "out/demo/pt"

n_head = 2
n_hidden = 176
max_seq_len = 256
tied = False
mask_documents = True
batch_size = 16
max_steps = 1400
optimizer = "muon"
schedule = "wsd"
decay_fraction = 0.25
final_lr = 0.0
eval_every = 350
save_every = 350
sample_every = 700
log_every = 50
dtype = "float32"  # a model 64 wide does not gain by bfloat16
