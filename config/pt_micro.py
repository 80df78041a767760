"""
The demo's pre-training: 0.3M parameters on the toy world. 2 CPU cores, about 4 minutes.

    python train_pt.py config/pt_micro.py --data_dir=out/demo/data --out_dir=out/demo/pt

To copy a value, a model must first build a copying circuit: attention that finds the fact, and
another head that repeats its value. Muon and a high rate build it sooner, but when is luck. So
the rate stays level until a validation is good `enough`, then decays: an unlucky run takes longer.
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
enough = 0.51
optimizer = "muon"
muon_lr = 0.03
schedule = "wsd"
decay_fraction = 0.3
final_lr = 0.0
eval_every = 100
eval_tokens = 20_000
log_every = 50
dtype = "float32"  # a model 64 wide does not gain by bfloat16
