"""
The demo: 0.22M parameters on the toy world, 2 CPU cores, about 8 minutes.

    python train_pt.py config/pt_micro.py --data_dir=out/demo/data --out_dir=out/demo/pt

Small model, small vocabulary, a high rate and Muon are what lets the copying circuit form quickly:
the loss falls to "format known, values guessed" within 200 steps and then, slowly, below it. With
AdamW alone 2,400 steps restate 71 % of the values. While the circuit forms, the rate must not fall:
it is level until the last 30 %. Numbers come last, for they are copied digit by digit: of four runs
of 2,000 steps, three seeds and one of them again with two threads, which round differently, three
had them and one restated 1 %, after 3,000 steps 99 %. Hence 3,000.
"""
data_dir = "out/demo/data"
out_dir = "out/demo/pt"

n_layer = 4
n_head = 4
n_kv_head = 2
n_embd = 64
n_hidden = 176
max_seq_len = 256

batch_tokens = 4096
batch_size = 16
max_steps = 3000
optimizer = "muon"
learning_rate = 1e-2
muon_lr = 0.02
schedule = "wsd"
decay_fraction = 0.3
final_lr = 0.0
warmup_steps = 50
eval_every = 400
save_every = 400
sample_every = 800
log_every = 50
