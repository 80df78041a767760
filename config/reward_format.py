"""
A reward for the form of a reply: 1 if all of it matches a pattern, else 0.

    python train_rl.py config/rl_sums.py --reward_from=config/reward_format.py

    {"prompt": [{"role": "user", "content": "23+45=?"}], "pattern": "Answer: \\\\d+"}

"Answer: 68" gets 1, "68" gets 0. A row without "pattern" is judged by PATTERN: one line, ended by a
full stop. Alone it is hacked at once (any number will do): add it to one that judges what is said.
"""
import re

PATTERN = r"[^\n]*\S[.。]"


def reward(prompt: list[dict], reply: str, record: dict) -> float:
    return float(re.fullmatch(record.get("pattern", PATTERN), reply.strip()) is not None)
