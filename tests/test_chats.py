"""The layouts in which people keep chats and pairs: read into one, or refused with the line that
converts them."""
import re

import pytest

from plumbing.chats import read_chat, read_comparison, read_prompt, read_question, said_in
from plumbing.corpus import LineError

USER, BOT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}
SYSTEM = {"role": "system", "content": "be kind"}
SHAREGPT = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]
PARTS = [{"role": "user", "content": [{"type": "text", "text": letter} for letter in "hi"]}, BOT]
NO = {"role": "assistant", "content": "no"}


@pytest.mark.parametrize("record", [
    {"messages": [USER, BOT]},
    {"messages": [USER | {"name": None, "id": 3}, BOT | {"tool_calls": None}], "prompt": "other"},
    {"messages": PARTS},
    {"conversations": SHAREGPT},
    {"conversations": [USER, BOT]},  # ShareGPT's name with our roles, as MiniMind has it
    {"instruction": "hi", "output": "hello"},
    {"instruction": "hi", "input": "", "output": "hello", "history": [], "source": "alpaca"}])
def test_a_chat_is_read_from_its_usual_layouts(record):
    """ShareGPT and Alpaca, in which most public chats come, ended with "field missing: 'messages'".
    A content in parts, as the servers' API has it, was no string."""
    assert read_chat(record) == [USER, BOT] and said_in(record) == "hi\nhello"


def test_an_instruction_is_followed_by_its_input_and_a_system_text_comes_first():
    record = {"system": "be kind", "instruction": "Translate.", "input": "hi", "output": "hello"}
    assert read_chat(record) == [SYSTEM, {"role": "user", "content": "Translate.\n\nhi"}, BOT]
    assert read_chat({"system": "be kind", "conversations": SHAREGPT}) == [SYSTEM, USER, BOT]
    assert read_chat({"system": "x", "messages": [SYSTEM, USER, BOT]}) == [SYSTEM, USER, BOT]


@pytest.mark.parametrize("record", [
    {"prompt": [USER], "chosen": "hello", "rejected": "no"},
    {"prompt": "hi", "chosen": "hello", "rejected": "no"},
    {"prompt": [USER], "chosen": [BOT], "rejected": [NO]},  # TRL, prompt apart
    {"chosen": [USER, BOT], "rejected": [USER, NO]},  # TRL, prompt inside
    {"prompt": "hi", "chosen": [USER, BOT], "rejected": [USER, NO]},  # UltraFeedback
    {"conversations": SHAREGPT[:1], "chosen": SHAREGPT[1], "rejected": NO},
    {"instruction": "hi", "input": "", "chosen": "hello", "rejected": "no"},
    {"prompt": [USER], "ranking": ["hello", "no"]}])
def test_a_pair_is_read_from_its_usual_layouts(record):
    """Lists of messages, as most preference data on Hugging Face has them, were "must be a
    string"."""
    assert read_comparison(record) == ([USER], ["hello", "no"], 0.0)
    assert said_in(record) == "hi\nhello\nno"


def test_a_prompt_within_the_replies_of_a_pair_is_found():
    """As RM and DPO find it: RL trained on another prompt, or read no such file."""
    ask, more = {"role": "user", "content": "hi"}, {"role": "user", "content": "2+2?"}
    yo, four, five = ({"role": "assistant", "content": text} for text in ("yo", "4", "5"))
    for record in ({"chosen": [ask, yo, more, four], "rejected": [ask, yo, more, five]},
                   {"prompt": "hi", "chosen": [ask, yo, more, four],
                    "rejected": [ask, yo, more, five]}):
        assert read_question(record) == read_comparison(record)[0] == [ask, yo, more]
    assert read_question({"prompt": "hi", "chosen": "a", "rejected": "a"}) == [ask]  # judged by RL


def test_the_part_that_two_lists_share_is_the_prompt():
    longer = [SYSTEM, USER, BOT, USER]
    pair = {"chosen": [*longer, BOT], "rejected": [*longer, NO]}
    assert read_comparison(pair)[0] == longer
    assert read_comparison(pair | {"prompt": "hi"})[0] == longer
    assert read_comparison({"chosen": [USER, BOT], "rejected": [USER, BOT]})[1] == [
        "hello", "hello"]  # which is counted later as a pair of equal replies
    for chosen, rejected in (([USER, BOT], [SYSTEM, NO]), ([BOT, USER], [BOT, SYSTEM])):
        with pytest.raises(LineError, match="must differ in one message, the assistant's at the "):
            read_comparison({"chosen": chosen, "rejected": rejected})


@pytest.mark.parametrize("read, record, message", [
    (read_chat, {"prompt": "q", "completion": "a", "label": True},
     "a KTO row: write those of label true as {\"messages\": .*\"content\": prompt.*completion"),
    (read_comparison, {"prompt": "q", "completion": "a", "label": True}, "this is a KTO row"),
    (read_chat, {"question": "q", "answer": "a"}, "write the line as .*: question.*: answer}"),
    (read_comparison, {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "c"},
     "'prompt' must be a list of messages; the line has chosen, rejected"),
    (read_chat, {"text": "x"}, "'messages' must be a list of messages; the line has text"),
    (read_chat, {"instruction": "a", "output": "b", "history": [["c", "d"]]}, "'history' is not"),
    (read_chat, {"instruction": "a", "input": 3, "output": "b"}, r"instruction\[0\]\['content'\]"),
    (read_chat, {"instruction": 3, "output": "b"}, "'instruction' must be a list of messages"),
    (read_chat, {"messages": [USER, {"role": "assistant", "content": [{"type": "image_url"}]}]},
     r"messages\[1\]\['content'\] must be a string, or a list of"),
    (read_chat, {"conversations": [{"from": "observation", "value": "x"}]}, r"conversations\[0\]"),
    (read_chat, {"messages": [{"role": ["user"], "content": "x"}]}, r"messages\[0\] must be an"),
    (read_chat, {"conversations": SHAREGPT[:1]}, "conversations must end with a message of"),
    (read_prompt, {"prompt": []}, "must be a list of messages"),
    (read_comparison, {"prompt": "q", "chosen": [], "rejected": "b"}, "'chosen' must be a string")])
def test_another_layout_is_refused_with_the_line_that_converts_it(read, record, message):
    with pytest.raises(LineError) as error:
        read(record)
    assert re.search(message, error.value.args[2])


@pytest.mark.parametrize("margin, fine", [
    (2, True), (-0.5, True), (1000, True), (1e999, False), (10**400, False), (-1e30, False),
    (True, False), ("2", False)], ids=range(8))
def test_a_margin_is_a_number_that_means_something(margin, fine):
    """1e999 is infinity to json: the loss was inf for ever, without a word about the line; 400
    digits were an OverflowError."""
    record = {"prompt": "q", "chosen": "a", "rejected": "b", "margin": margin}
    if fine:
        assert read_comparison(record)[2] == margin
    else:
        with pytest.raises(LineError, match="'margin' must"):
            read_comparison(record)
