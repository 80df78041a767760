"""
Chats, pairs and prompts in the layouts that people keep them in; the rest may be skipped.

    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
    {"prompt": [… up to a user's message], "chosen": "good", "rejected": "bad", "margin": 1.0}
    {"prompt": […], "ranking": ["best", …, "worst"]}                    stands for all its pairs
    {"prompt": […]}

Roles are system, user and assistant; "margin" and "lang" may be missing, other fields are ignored.
Read as well: ShareGPT ("conversations" of "from" and "value"), Alpaca ("instruction", "input",
"output"), a content in parts of text, a prompt that is a string, and pairs whose "chosen" and
"rejected" are lists of messages, with or without a "prompt" before them.
"""
from plumbing.corpus import LineError, check_text

ROLES = ("system", "user", "assistant")
SHAREGPT = {"human": "user", "gpt": "assistant"}
CHATS = ("messages", "conversations", "instruction")  # fields that may hold a chat
PROMPTS = ("prompt", "conversations", "instruction")
MARGIN = 1000  # more than any reward differs by
Messages = list[dict[str, str]]


def read_chat(record: dict) -> Messages:
    """A chat that ends with a reply. Raises LineError."""
    field = next((name for name in CHATS if name in record), "messages")
    return ending(field, read_messages(record, field), "assistant")


def read_prompt(record: dict) -> Messages:
    """Messages up to a user's. Raises LineError."""
    field = next((name for name in PROMPTS if name in record), "prompt")
    return ending(field, read_messages(record, field), "user")


def read_comparison(record: dict) -> tuple[Messages, list[str], float]:
    """Of a pair or ranking the prompt, the replies, best first, and the margin by which the better
    of two should score higher. Raises LineError."""
    margin = record.get("margin", 0.0)
    if isinstance(margin, bool) or not isinstance(margin, (int, float)):
        raise LineError("margin", "field of a wrong type", "'margin' must be a number")
    if not abs(margin) <= MARGIN:
        raise LineError("margin", "number too large", f"'margin' must lie between -{MARGIN} and "
                         f"{MARGIN}: it is a difference of rewards")
    if "ranking" in record:
        replies = record["ranking"]
        if not isinstance(replies, list) or len(replies) < 2 or not all(
                isinstance(reply, str) for reply in replies):
            raise LineError("ranking", "field of a wrong type",
                             "'ranking' must be a list of at least two strings, best first")
        return read_prompt(record), [check_text(r, "ranking") for r in replies], margin
    sides = [read_reply(record, side) for side in ("chosen", "rejected")]
    n = 0  # messages that both begin with
    while n < min(map(len, sides)) - 1 and sides[0][n] == sides[1][n]:
        n += 1
    for side, messages in zip(("chosen", "rejected"), sides):
        if len(messages) != n + 1 or messages[n]["role"] != "assistant":
            raise LineError(side, "bad message", "chosen and rejected must differ in one message, "
                             "the assistant's at the end")
    prompt = sides[0][:n]
    if not n or any(name in record for name in PROMPTS):
        before = read_prompt(record)
        prompt = prompt if all(m in prompt for m in before) else before + prompt
    replies = [side[n]["content"] for side in sides]
    return ending("chosen", prompt, "user"), replies, margin


def read_question(record: dict) -> Messages:
    """The prompt, also of a pair that has its prompt within its replies. Raises LineError."""
    inside = isinstance(record.get("chosen"), list)
    return read_comparison(record)[0] if inside else read_prompt(record)


def said_in(record: dict) -> str | None:
    """All that is said in a chat, pair, ranking or prompt, one message a line, as text to train a
    tokenizer on; None if the record is none of them. Raises LineError for a damaged one."""
    if any(name in record for name in ("chosen", "ranking")):
        prompt, replies, _ = read_comparison(record)
    elif field := next((name for name in (*CHATS, *PROMPTS) if name in record), ""):
        prompt, replies = read_messages(record, field), []
    else:
        return None
    return "\n".join([m["content"] for m in prompt] + replies)


def read_messages(record: dict, field: str) -> Messages:
    """The messages in a field, and in those that go with it. Raises LineError."""
    given = record.get(field)
    if field == "prompt" and isinstance(given, str):
        given = [{"role": "user", "content": given}]
    elif field == "instruction" and isinstance(given, str):
        if record.get("history"):
            raise LineError("history", "bad message", "'history' is not read: write the line as "
                             '{"messages": […]}')
        more = record.get("input") or ""
        text = f"{given}\n\n{more}" if isinstance(more, str) and more else more or given
        given = [{"role": "user", "content": text}]
        if "output" in record:
            given.append({"role": "assistant", "content": record["output"]})
    messages = read_list(given, field, record, "a list of messages")
    system = record.get("system")
    if system and isinstance(system, str) and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": check_text(system, "system")})
    return messages


def read_message(message: object, field: str, where: str) -> dict[str, str]:
    """Role and content of a message, whatever else is in it. Raises LineError."""
    given = message if isinstance(message, dict) else {}
    role, content = given.get("role", given.get("from")), given.get("content", given.get("value"))
    role = SHAREGPT.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        raise LineError(field, "bad message", f"{where} must be an object with a role of "
                         f"{', '.join(ROLES)}")
    if isinstance(content, list):  # in parts: pictures and sounds cannot be learnt here
        texts = [text for part in content if isinstance(part, dict)
                 and isinstance(text := part.get("text"), str)]
        content = "".join(texts) if len(texts) == len(content) else None
    if not isinstance(content, str):
        raise LineError(field, "bad message", f"{where}['content'] must be a string, or a list of "
                         '{"type": "text", "text": "…"}')
    return {"role": role, "content": check_text(content, field)}


def read_reply(record: dict, side: str) -> Messages:
    """The messages of one side of a pair; a string is the assistant's. Raises LineError."""
    given = record.get(side)
    if isinstance(given, str):
        given = {"role": "assistant", "content": given}
    return read_list([given] if isinstance(given, dict) else given, side, record,
                     "a string or a list of messages")


def read_list(given: object, field: str, record: dict, wanted: str) -> Messages:
    """The messages in a list. Raises LineError."""
    if not isinstance(given, list) or not given:
        raise LineError(field, "field missing" if field not in record else "field of a wrong type",
                        f"'{field}' must be {wanted}" + advice(record))
    return [read_message(message, field, f"{field}[{i}]") for i, message in enumerate(given)]


def ending(field: str, messages: Messages, last: str) -> Messages:
    """The messages, which must end with one of role `last`. Raises LineError."""
    if messages[-1]["role"] != last:
        raise LineError(field, "bad message", f"{field} must end with a message of role '{last}', "
                         f"ends with '{messages[-1]['role']}'")
    return messages


def advice(record: dict) -> str:
    """How to write a record of another layout, so that it can be read."""
    ask, answer = (next((name for name in names if name in record), "") for names in
                   (("prompt", "question", "query", "instruction", "input"),
                    ("completion", "response", "answer", "output")))
    if not ask or not answer:
        return f"; the line has {', '.join(record)}" if record else ""
    chat = (f'{{"messages": [{{"role": "user", "content": {ask}}}, '
            f'{{"role": "assistant", "content": {answer}}}]}}')
    if "label" not in record:
        return f"; write the line as {chat}"
    return (f"; this is a KTO row: write those of label true as {chat}, or a true and a false one "
            f'of the same {ask} as {{"prompt": {ask}, "chosen": …, "rejected": …}}')
