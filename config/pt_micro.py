"""
The demo's pre-training: 0.25M parameters on the toy world. 2 CPU cores, about 3 minutes.

    python train_pt.py config/pt_micro.py --data_dir=out/demo/data --out_dir=out/demo/pt

To copy a value, a model must first build a copying circuit: attention that finds the fact, and
another head that repeats its value. Three things build it soon: documents that do not see each
other (mask_documents), for among the facts of four the right one is hard to find; two heads of 32
numbers instead of four of 16 (--n_head=4 --n_kv_head=2), whose attention can be sharper; and Muon.
The rate must not fall while the circuit forms. With a vocabulary of 1,200, a token for each value,
it had not formed after 1,000 steps: pieces of words are shared, so one value teaches the others.
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
