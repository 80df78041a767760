"""
Real bilingual text on 2 CPU cores in under an hour: 5M parameters, vocabulary 8,192.

    python tokenizer.py --input=PATHS --vocab_size=8192 --out=out/real/tokenizer.txt
    python data.py --input=PATHS --tokenizer=out/real/tokenizer.txt --out_dir=out/real/data
    python train_pt.py config/pt_hour.py

40 minutes led to 1.74 bits per byte of English and 2.16 of Chinese (docs/results.md). A larger
model would see too little text in an hour. The rate is level until the last 40 % of the steps, so a
run can be prolonged before it falls: --resume --max_steps=MORE.
"""
data_dir = "out/real/data"
out_dir = "out/real/pt"

n_layer = 4
n_head = 4
n_kv_head = 2
n_embd = 256
n_hidden = 704
max_seq_len = 256

batch_tokens = 4096
batch_size = 16
max_steps = 1000
optimizer = "muon"
learning_rate = 5e-3
muon_lr = 0.02
schedule = "wsd"
decay_fraction = 0.4
final_lr = 0.0
warmup_steps = 20
eval_every = 250
eval_tokens = 20_000
save_every = 100
sample_every = 500
log_every = 20
compile = True
