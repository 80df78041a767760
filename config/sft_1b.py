"""
Fine-tuning of the 1B model on chats, for a node of 8 GPUs with 80 GB; not tried.

    torchrun --nproc_per_node=8 train_sft.py config/sft_1b.py --data=chats.jsonl

On one small GPU or a CPU add --lora_rank=16 --learning_rate=2e-4: weights, gradients and moments
then take 6 GB instead of 16.
"""
init_from = "out/1b/pt"
out_dir = "out/1b/sft"

batch_tokens = 131_072
batch_size = 4
warmup_steps = 30
