"""
How models from elsewhere write chats, and what else their tokenizers do; may be skipped.

A model comes with a small program in the language Jinja that writes a chat as text. It is asked
once, when the model is converted: it writes a chat of known words, and what it puts around them is
the `Template`, which is all that `render` needs. So no program runs later, and no message can pass
for a piece of the template.
"""
import re
from collections.abc import Callable
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Template:
    """What stands before and after a message of each role. This is how ours do it, ChatML."""
    system: tuple[str, str] = ("<|im_start|>system\n", "<|im_end|>\n")
    user: tuple[str, str] = ("<|im_start|>user\n", "<|im_end|>\n")
    assistant: tuple[str, str] = ("<|im_start|>assistant\n", "<|im_end|>\n")
    begin: str = ""  # before the first message
    default: str = ""  # what the system says where a chat has no system message
    preface: str = ""  # what the system says before anything else
    trim: bool = False  # white space around a message is left out
    think: tuple[str, str] = ("", "")  # what opens a reply that is to begin with thoughts, or not


@dataclass(frozen=True)
class Rules:
    """All else. A tokenizer file names only what differs from this."""
    nfc: bool = False  # characters are composed first: e and ´ become é
    shown: tuple[str, ...] = ()  # special tokens that belong to the text, such as <think>
    stop: tuple[str, ...] = ("<|im_end|>", "<|endoftext|>")  # end a reply, or any text
    endoftext: str = "<|endoftext|>"  # ends a document
    pad: str = "<|pad|>"
    begin: str = ""  # begins a document
    marks: tuple[str, str] = ("", "<|im_end|>")  # what the program calls bos_token and eos_token
    jinja: str = ""  # the program, unless it is CHATML, which convert.py gives back
    chat: Template = Template()


CHATML = ("{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + "
          "message['content'] + '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}"
          "{{ '<|im_start|>assistant\\n' }}{% endif %}")  # ours, for others
LLAMA3 = Template(("<|start_header_id|>system<|end_header_id|>\n\n", "<|eot_id|>"),
                  ("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"),
                  ("<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>"))
ENDS = ("<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>")
WORDS = ("Word1", "Word2", "Word3", "Word4", "Word5")  # of the chats that are written to find out
ROLES = ("system", "user", "assistant", "user", "assistant")


def read_rules(found: dict) -> Rules:
    """Raises TypeError for a rule that is none."""
    return Rules(**found | {"chat": Template(**found.get("chat", {}))})


def differing(rules: Rules | Template) -> dict:
    """The fields that are not as ours are."""
    found = {k: differing(v) if isinstance(v, Template) else v for k, v in vars(rules).items()}
    return {k: v for k, v in found.items() if v != getattr(type(rules)(), k) and v != {}}


def writer(jinja: str, begin: str, end: str) -> Callable[..., str]:
    """The program as a function of a chat. The sandbox keeps it from files and from this program;
    there is no clock, so that a chat is written today as it will be tomorrow."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment  # comes with torch

    def refuse(reason: str) -> None:
        raise ValueError(reason)
    room = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                         extensions=["jinja2.ext.loopcontrols"])
    program = room.from_string(jinja, globals={"raise_exception": refuse, "bos_token": begin,
                                               "eos_token": end, "tools": None})
    return lambda chat, reply=False, think=False: program.render(
        messages=chat, add_generation_prompt=reply, enable_thinking=think)


def chat_of(first: int, last: int, space: str = "") -> list[dict]:
    """Messages first to last of a system's message, two questions and two replies."""
    return [{"role": role, "content": space + word + space}
            for role, word in list(zip(ROLES, WORDS))[first:last]]


def ask(write: Callable[..., str], begin: str) -> Template:
    """What a program puts around the messages of a chat."""
    between, rest = [], write(chat_of(0, 5))
    for word in WORDS:
        before, _, rest = rest.partition(word)
        between.append(before)
    prompt = write(chat_of(0, 2))
    asked = prompt.partition(WORDS[1])[2]  # stands after a question
    user, reply = between[3].removeprefix(rest), between[2].removeprefix(asked)
    told = between[1].removesuffix(user)
    opening = begin if begin and between[0].startswith(begin) else ""
    start = between[0].removeprefix(opening)  # before what the system says: with a preface, or not
    system = user.replace("user", "system")
    system = system if "user" in user and start.startswith(system) else start
    alone = write(chat_of(1, 2)).removeprefix(opening).removesuffix(user + WORDS[1] + asked)
    think = [write(chat_of(0, 2), reply=True, think=on).removeprefix(prompt + reply)
             for on in (True, False)]
    return Template(
        (system, told), (user, asked), (reply, rest), opening,
        alone.removeprefix(start).removesuffix(told), start.removeprefix(system),
        f" {WORDS[1]} " not in write(chat_of(1, 2, " ")), (think[0], think[1]))


def completed(rules: Rules, special: dict[str, int]) -> Rules:
    """The rules with what the chat template says, and with all tokens that end something. Raises
    ValueError for a template that cannot be read."""
    chat, jinja = Template(), rules.jinja if rules.jinja != CHATML else ""
    if jinja:
        try:
            chat = ask(writer(jinja, *rules.marks), rules.marks[0])
        except Exception as error:  # whatever a program makes jinja2 raise
            raise ValueError(f"its chat template cannot be read: {str(error)[:100]}") from None
    elif "<|start_header_id|>" in special:
        chat = replace(LLAMA3, begin=rules.begin)
    end = re.match("<[^<>]+>", chat.assistant[1])
    if not end or end[0] not in special:
        raise ValueError("it has no token that ends a message")
    stop = dict.fromkeys((end[0], *rules.stop, *(end for end in ENDS if end in special)))
    last = min(stop, key=lambda name: (*ENDS, name).index(name))
    return replace(rules, chat=chat, jinja=jinja, stop=tuple(stop), endoftext=last,
                   pad=rules.pad or last)


def check(write: Callable[..., str], said: Callable[..., str], thinks: bool) -> None:
    """Raises ValueError unless `said`, the template put together, is what the program writes. Only
    questions are compared if it thinks: programs write the thoughts of a last reply or not."""
    lasts = (2, 4) if thinks else (2, 3, 4, 5)
    chats = [(chat_of(first, last, space), last % 2 == 0, think) for first in (0, 1)
             for last in lasts for space in ("", " ") for think in (True, False)]
    if any(write(*chat) != said(*chat) for chat in chats):
        raise ValueError("its chat template does more than to put something around each message, "
                         "which is not read here")
