"""
The reader's fine-tuning: chats about documents, by LoRA. 2 CPU cores, 25 minutes for 135M.

    python -m demo.reader --init_from=…        says the whole command
"""
init_from = "out/smol"
data = "out/reader/data/chat.jsonl"
out_dir = "out/reader/sft"

lora_rank = 16
lora_merge = True
max_len = 512
batch_tokens = 4096
epochs = 1.0
learning_rate = 1e-3
warmup_steps = 5
eval_every = 1000
eval_rows = 50
eval_answers = 20
answer_tokens = 40
log_every = 5
