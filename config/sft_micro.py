"""
The demo's fine-tuning: questions about facts in the context. 2 CPU cores, about 3 minutes.

    python train_sft.py config/sft_micro.py

Only the value in an answer teaches the model to read its context: one token of twenty. Each reply
names what it is about before the value, as a document does that restates a fact, so the circuit of
pre-training serves. Without the name (just "cat.") the model must carry it over from the question,
which it learnt late and never well. Six questions to a context and a high, level rate help, too.
"""
init_from = "out/demo/pt"
data = "out/demo/world/chat.jsonl"
out_dir = "out/demo/sft"

batch_tokens = 2048
max_steps = 1800
optimizer = "muon"
learning_rate = 6e-3
schedule = "wsd"
decay_fraction = 0.3
final_lr = 0.0
eval_every = 600
eval_answers = 100
answer_tokens = 48
save_every = 900
log_every = 50
dtype = "float32"  # a model 64 wide does not gain by bfloat16
