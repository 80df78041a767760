"""
A reward for a reader of numbered sources: the F1 of a short answer, plus a quarter if it cites the
right source, minus a half if it is neither right nor in a source.

    python train_rl.py config/rl_micro.py --reward_from=config/reward_reader.py --data=FILE

    {"prompt": [{"role": "user", "content": "[1] Ann bakes.\\n[2] Ben is 17.\\nHow old is Ben?"}],
     "answers": ["17", "seventeen"], "source": 2, "lang": "en"}

"17 [2]" gets 1.25, "17" gets 1, "is 17 [1]" gets 0.67, "18 [2]" gets -0.25, and the refusal of
rag.py -1. With "answers": [] the sources hold no answer: then the refusal gets 1 and all else -1.
A wrong refusal costs as much as an invention: if it cost nothing, a model in doubt would do best to
refuse. A reply passes if it is an answer word for word with its citation, or a due refusal.
"""
from plumbing.answers import score_answer
from rag import REFUSAL
from search.citations import split_answer


def reward(prompt: list[dict], reply: str, record: dict) -> float:
    refuses = reply.strip() == REFUSAL[record["lang"]]
    if refuses or not record["answers"]:
        return 1.0 if refuses == (not record["answers"]) else -1.0
    said, cited = split_answer(reply)
    f1 = score_answer(said, record["answers"], record["lang"])[1]
    sources = prompt[-1]["content"].rpartition("\n")[0]  # the question is the last line
    invented = f1 < 1 and (not said or said not in sources)
    return f1 + 0.25 * (cited == [record["source"]]) - 0.5 * invented


def passes(prompt: list[dict], reply: str, record: dict) -> bool:
    return reward(prompt, reply, record) >= (1.25 if record["answers"] else 1.0)
