"""
The demo's fine-tuning: questions about facts in the context, in two languages and four styles.

    python train_sft.py config/sft_micro.py
"""
init_from = "out/demo/pt"
data = "out/demo/world/chat.jsonl"
val_data = "out/demo/world/chat_heldout.jsonl"
pt_data = "out/demo/data"
out_dir = "out/demo/sft"

batch_tokens = 4096
batch_size = 16
max_steps = 1200
learning_rate = 3e-3
warmup_steps = 20
eval_every = 400
eval_answers = 100
answer_tokens = 48
save_every = 400
log_every = 50
