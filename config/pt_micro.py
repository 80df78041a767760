"""
The demo's pre-training: 0.3M parameters on the toy world. 2 CPU cores, about 4 minutes.

    python train_pt.py config/pt_micro.py --data_dir=out/demo/data --out_dir=out/demo/pt

To copy a value, a model must first build a copying circuit: attention that finds the fact, and
another head that repeats its value. A high rate and Muon build it quickly, and the rate must not
fall while it forms. The vocabulary matters: with the demo's 768 tokens a Chinese name is two. With
512 it is about five, and fewer values are restated right; with 1,024, too (docs/results.md).
"""
data_dir = "out/demo/data"
out_dir = "out/demo/pt"

n_head = 2
n_hidden = 176
max_seq_len = 256
tied = False
mask_documents = True
batch_tokens = 2048
batch_size = 8
max_steps = 1600
optimizer = "muon"
muon_lr = 0.03
schedule = "wsd"
decay_fraction = 0.25
final_lr = 0.0
eval_every = 200
save_every = 800
sample_every = 800
log_every = 50
dtype = "float32"  # a model 64 wide does not gain by bfloat16
