"""
Real bilingual text on 2 CPU cores in under an hour: 5M parameters, vocabulary 8,192.

    python tokenizer.py --input=PATHS --vocab_size=8192 --out=out/real/tokenizer.txt
    python data.py --input=PATHS --tokenizer=out/real/tokenizer.txt --out_dir=out/real/data
    python train_pt.py config/pt_hour.py

40 minutes led to 1.74 bits per byte of English and 2.16 of Chinese (docs/results.md). A larger
model would see too little text in an hour. To go on before the rate falls: --resume
--max_steps=MORE.
"""
data_dir = "out/real/data"
out_dir = "out/real/pt"

n_embd = 256
n_hidden = 704
max_seq_len = 256
batch_size = 16
optimizer = "muon"
learning_rate = 5e-3
schedule = "wsd"
decay_fraction = 0.4
final_lr = 0.0
warmup_steps = 20
eval_tokens = 20_000
save_every = 100
log_every = 20
compile = True
