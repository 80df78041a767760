"""
Fine-tuning of the model of config/pt_hour.py on real chats. 2 CPU cores, half an hour.

    python train_sft.py config/sft_hour.py --data=chats.jsonl

After it 75 % of the English and 40 % of the Chinese answers end by themselves (docs/results.md).
"""
init_from = "out/real/pt"
pt_data = "out/real/data"
out_dir = "out/real/sft"

batch_tokens = 4096
batch_size = 16
max_steps = 300
optimizer = "muon"
learning_rate = 2e-3
muon_lr = 0.01
schedule = "wsd"
decay_fraction = 0.4
final_lr = 0.0
eval_every = 150
eval_rows = 200
eval_answers = 16
answer_tokens = 96
save_every = 100
log_every = 20
