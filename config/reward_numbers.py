"""
A reward for sums: 1 if the last number of the reply is the answer of its row, else 0.

    python train_rl.py config/rl_sums.py --reward_from=config/reward_numbers.py

    {"prompt": [{"role": "user", "content": "23+45=?"}], "answer": "68"}

"20+40=60, 3+5=8: 68." gets 1, and so does "68.0"; "68, not 67" gets 0. The answer may be written
"1,068". Copy this file and change it: it is your own code, and runs with your rights.
"""
from plumbing.answers import last_number


def reward(prompt: list[dict], reply: str, record: dict) -> float:
    answer = last_number(str(record["answer"]))
    if answer is None:
        raise ValueError("the row's answer has no number")
    return float(last_number(reply) == answer)
