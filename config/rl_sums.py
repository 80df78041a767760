"""
RL on the sums of `python -m demo.sums`, judged by a function in a file. 2 CPU cores, a minute.

    python train_rl.py config/rl_sums.py

A validation answers each of 200 sums eight times: pass@8 is the share of those that are right at
least once. SFT has learnt to forget the carry in six of ten replies, so that a policy that never
does is -log 0.4 = 0.92 nats away; beta makes that cost 0.02 of a reward of 1.
"""
init_from = "out/sums/sft"
reward_from = "config/reward_numbers.py"
data = "out/sums/data/prompts.jsonl"
val_data = "out/sums/data/prompts_heldout.jsonl"
out_dir = "out/sums/rl"

advantage = "grpo"
beta = 0.02
prompts_per_step = 32
batch_size = 64
answer_tokens = 6
max_steps = 40
learning_rate = 5e-4
warmup_steps = 5
eval_every = 40
eval_prompts = 200
save_every = 40
dtype = "float32"  # a model 64 wide does not gain by bfloat16
