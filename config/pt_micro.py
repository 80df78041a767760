"""
The demo's pre-training: 0.25M parameters on the toy world. 2 CPU cores, about 2 minutes.

    python train_pt.py config/pt_micro.py --data_dir=out/demo/data --out_dir=out/demo/pt
"""
data_dir = "out/demo/data"
out_dir = "out/demo/pt"

n_head = 2
n_kv_head = 2
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
