"""
The demo's pre-training: 0.3M parameters on the toy world. 2 CPU cores, about 3 minutes.

    python train_pt.py config/pt_micro.py --data_dir=out/demo/data --out_dir=out/demo/pt

To find a value by its name, two tokens must know the name: the one before a restated value, and the
value in the first half. Neither gains by it before the other does. Lists, which are 40 % of the
documents, teach both to look at the word before; without them about half of the seeds never start.
The vocabulary matters, too: with 1,000 tokens every value is one token and most names are two
(docs/results.md).
"""
data_dir = "out/demo/data"
out_dir = "out/demo/pt"

n_head = 2
n_hidden = 176
max_seq_len = 256
tied = False
mask_documents = True
batch_size = 16
optimizer = "muon"
learning_rate = 2e-2
schedule = "wsd"
decay_fraction = 0.3
final_lr = 0.0
eval_every = 200
save_every = 500
log_every = 50
dtype = "float32"  # a model 64 wide does not gain by bfloat16
