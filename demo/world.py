"""
A tiny bilingual world in which every fact holds for one document only: to answer is to read.

    python -m demo.world --show                    a document, a list, a question and its answers
    python -m demo.world --out_dir=out/toyworld    JSON lines for each stage, and floor.json

A pre-training document states K facts about K names and restates them on a second line. pt.jsonl
has lists, too (`list_document`); there either kind costs -log2 of its share besides:

    -log2 P(text) =  log2 #K  +  2                            how many facts; language, form
                  +  sum over i < K of  log2(N - i) + log2 |values of attribute i|
                  -  log2( (1 - a) / 5^K  +  a [all attributes equal] / 5 )
                  -  log2( (1 - e) / (4 K!)  +  e [second half == first half] )

N names are drawn in order, none twice; attributes and values may coincide. The second half is an
exact repeat with probability e (0 in held-out files); else its order (K!), language and form (4)
are drawn anew. The sum over a file, divided by its UTF-8 bytes, is its floor: a model that has not
seen the file undercuts it by b bits with probability at most 2^-b (Markov's inequality). A model
cannot tell test names from others and pays log2 of all names for each: `pt_heldout_all_names`.

A reply names what it is about before its value, as a restated fact does; what the context does not
say is "unknown". Of two replies the one whose score is d more is preferred with probability
sigmoid(d). So Bradley-Terry is right, and its best loss known.
"""
import json
import os
import re
import zlib
from collections import Counter
from dataclasses import dataclass
from math import comb, exp, factorial, log, log1p, log2, perm, prod
from random import Random
from tempfile import TemporaryDirectory
from typing import NamedTuple

from configurator import Count, FilePath, configure, fail
from plumbing import terminal
from plumbing.files import write_text

PT_FACTS = (1, 4)  # least and most facts in a pre-training document, each about another name
EXACT_REPEAT = 0.3  # share of those in pt.jsonl whose second half repeats the first word for word
LISTS, LIST_ITEMS = 0.4, (4, 8)  # share of pt.jsonl that is lists; least and most items in one
MAX_CHAT_FACTS = 6  # facts in the context of a question are 1 to this many


@dataclass(frozen=True)
class Config:
    out_dir: FilePath = "out/toyworld"  # where the files go
    show: bool = False  # print what the world looks like, and write nothing
    seed: int = 0  # same seed and settings, same bytes
    n_train: Count = 100_000  # pre-training documents
    n_chat: Count = 40_000  # chats for supervised fine-tuning
    n_pairs: Count = 16_000  # pairs of replies for DPO
    n_rankings: Count = 24_000  # rankings of four replies for the reward model
    n_prompts: Count = 4_000  # questions for reinforcement learning
    n_val: Count = 2_000  # rows in each held-out file, on test names only


LANGS = ("en", "zh")
Pair = tuple[str, str]  # a word in each of LANGS; a name is the same in both


def _pairs(words: str) -> list[Pair]:
    return list(zip(words.split()[::2], words.split()[1::2]))


VALUES: dict[Pair, list[Pair]] = {
    ("colour", "颜色"): _pairs("red 红色 blue 蓝色 green 绿色 white 白色 black 黑色 yellow 黄色 "
                             "pink 粉色 grey 灰色 brown 棕色 gold 金色 silver 银色 purple 紫色"),
    ("pet", "宠物"): _pairs("cat 猫咪 dog 狗狗 parrot 鹦鹉 frog 青蛙 pigeon 鸽子 sheep 绵羊 "
                          "rabbit 兔子 turtle 乌龟 duck 鸭子 goat 山羊 hamster 仓鼠 mouse 老鼠"),
    ("fruit", "水果"): _pairs("apple 苹果 peach 桃子 grape 葡萄 lemon 柠檬 melon 甜瓜 cherry 樱桃 "
                            "mango 芒果 banana 香蕉 orange 橙子 plum 李子 fig 无花果 kiwi 猕猴桃"),
    ("job", "职业"): _pairs("doctor 医生 teacher 老师 farmer 农民 driver 司机 cook 厨师 nurse 护士 "
                          "singer 歌手 writer 作家 painter 画家 lawyer 律师 baker 面包师 "
                          "pilot 飞行员"),
    ("tool", "工具"): _pairs("hammer 锤子 saw 锯子 wrench 扳手 rope 绳子 pliers 钳子 brush 刷子 "
                           "shovel 铲子 ladder 梯子 drill 电钻 axe 斧头 rake 耙子 broom 扫帚"),
}
WORDS = [pair for pairs in VALUES.values() for pair in pairs]
SYLLABLES = ("ba bu de du fi fo ga gu hi ho je jo ka ki le lu ma mu ne no pa pi re ru so su ti to "
             "ve vi we wi yo yu za zu").split()
HAN = "安柏川岱恩帆涵荷虹桦嘉江锦景岚兰莉林铃柳洛曼梅萌敏宁诺培琪晴瑞珊诗松薇晓雅雨云芝"
UNFIT = "Fiji Gaza Kaka Paki Peru Pipi Titi Zulu 雅安".split()  # insults, places, peoples


def split_of(text: str) -> str:
    """Where a name (or a pair of words) may be used. A hash decides: nobody has to keep a list."""
    return {0: "test", 1: "val"}.get(zlib.crc32(text.encode()) % 10, "train")


_all = [n for a in SYLLABLES for b in SYLLABLES if (n := (a + b).capitalize()) not in UNFIT]
_all += [n for a in HAN for b in HAN if a != b and (n := a + b) not in UNFIT]
NAMES = {split: [n for n in _all if split_of(n) == split] for split in ("train", "val", "test")}

FACTS = {"en": ("{n}'s {a} is {v}.", "The {a} of {n} is {v}."),
         "zh": ("{n}的{a}是{v}。", "说到{a}，{n}的是{v}。")}
STATED = re.compile(r"(?: is |是)(\w+)[.。]")  # the value in each of FACTS; no name has a 是
QUESTIONS = {"en": ("What is {n}'s {a}?", "Tell me the {a} of {n}."),
             "zh": ("{n}的{a}是什么？", "请告诉我{n}的{a}。")}
CONTEXT = {"en": "Context: {c}\nQuestion: {q}", "zh": "资料：{c}\n问题：{q}"}
ANSWERS = {"en": {"direct": "{n}'s {a} is {v}.",
                  "hedged": "I guess {n}'s {a} may be {v}.",
                  "terse": "{n}: {v}.",
                  "padded": "Well, let me think about it, the {a} of {n} should be {v}."},
           "zh": {"direct": "{n}的{a}是{v}。",
                  "hedged": "我猜{n}的{a}也许是{v}。",
                  "terse": "{n}：{v}。",
                  "padded": "嗯，让我想一想，{n}的{a}应该是{v}。"}}
STYLES = tuple(ANSWERS["en"])
UNKNOWN = ("unknown", "未知的")  # the value, where the context does not say
ALIKE = 0.5  # share of the texts whose facts have one attribute: only names tell them apart
ABSENT = 0.4  # share of the questions for which it does not
NEARLY = 0.5  # share of those, in files to train on, that ask about nearly a name of the context
GOLD = {"direct": 3.0, "terse": 1.5, "padded": 1.5, "hedged": 0.0}  # score of a right answer
SHY, WRONG = -2.0, -4.0  # of a needless "unknown", and of a wrong value
PAIRS = {"style": 40, "tie": 10, "value": 50}  # per cent: what the two replies of a pair differ in
SPACE, COMMA, STOP = (dict(zip(LANGS, marks)) for marks in ((" ", ""), (", ", "、"), (".", "。")))
ECHO = {"en": ("Repeat after me: {x}", "Please repeat: {x}"),
        "zh": ("请跟我念：{x}", "请重复：{x}")}
ITEM = {"en": ("What is the {w} item? {x}", "Tell me the {w} item: {x}"),
        "zh": ("{w}是什么？{x}", "请告诉我{w}：{x}")}
WHICH = (("first", "第一项"), ("last", "最后一项"))
TRANSLATE = {"en": ("Translate into Chinese: {x}", "Say in Chinese: {x}"),
             "zh": ("请译成英语：{x}", "用英语怎么说：{x}")}
TASKS = {"qa": 75, "echo": 9, "item": 8, "translate": 8}  # per cent of the chats


class Fact(NamedTuple):
    name: str
    attribute: Pair
    value: Pair


def facts(r: Random, split: str, k: int) -> list[Fact]:
    """k facts about k different names of a split, good for one document."""
    attributes = [r.choice(list(VALUES)) for _ in range(k)]
    attributes = attributes[:1] * k if r.random() < ALIKE else attributes
    return [Fact(n, a, r.choice(VALUES[a])) for n, a in zip(r.sample(NAMES[split], k), attributes)]


def _fill(template: str, lang: str, fact: Fact) -> str:
    i = LANGS.index(lang)
    return template.format(n=fact.name, a=fact.attribute[i], v=fact.value[i])


def answer(fact: Fact, lang: str, style: str) -> str:
    return _fill(ANSWERS[lang][style], lang, fact)


def fact_text(fact: Fact, lang: str, form: int) -> str:
    return _fill(FACTS[lang][form], lang, fact)


def _half(fs: list[Fact], lang: str, form: int) -> str:
    return SPACE[lang].join(fact_text(fact, lang, form) for fact in fs)


def pt_document(r: Random, split: str, min_facts: int, max_facts: int, exact_repeat: float) -> dict:
    """{"text", "lang" of the first half, "bits" = -log2 P(text)}."""
    k, lang = r.randint(min_facts, max_facts), r.choice(LANGS)
    fs = facts(r, split, k)
    first = second = _half(fs, lang, r.choice((0, 1)))
    if r.random() >= exact_repeat:
        second = _half(r.sample(fs, k), r.choice(LANGS), r.choice((0, 1)))
    alike = len({f.attribute for f in fs}) == 1
    chances = (max_facts - min_facts + 1) * 4 * perm(len(NAMES[split]), k)
    chances *= prod(len(VALUES[f.attribute]) for f in fs)
    bits = log2(chances) - log2((1 - ALIKE) / len(VALUES)**k + ALIKE * alike / len(VALUES))
    bits -= log2((1 - exact_repeat) / (4 * factorial(k)) + exact_repeat * (second == first))
    return {"text": first + "\n" + second, "lang": lang, "bits": bits}


def list_document(r: Random, split: str, lang: str, min_items: int, max_items: int) -> dict:
    """Words and names, and again from a random place on: "red, Kimu, saw, Tifo." and "saw, Tifo."
    Only the item before tells what comes next. Keys as above; the bits are given the language."""
    n = r.randint(min_items, max_items)
    words = [pair[LANGS.index(lang)] for pair in r.sample(WORDS, n // 2)]
    items = r.sample([*words, *r.sample(NAMES[split], n - n // 2)], n)
    lines = (COMMA[lang].join(items[start:]) + STOP[lang] for start in (0, r.randrange(n - 1)))
    chances = (max_items - min_items + 1) * comb(n, n // 2) * (n - 1)
    chances *= perm(len(WORDS), n // 2) * perm(len(NAMES[split]), n - n // 2)
    return {"text": "\n".join(lines), "lang": lang, "bits": log2(chances)}


def restated_values(text: str) -> list[tuple[int, int]]:
    """(start, end) in characters of each value in the second half, which says it again."""
    return [m.span(1) for m in STATED.finditer(text, text.index("\n"))]


def asked(r: Random, lang: str, about: Fact) -> str:
    return _fill(r.choice(QUESTIONS[lang]), lang, about)


def wrong(r: Random, fact: Fact, shy: bool = False) -> Fact:
    """The fact with another value of its attribute, or, as likely as any of them, UNKNOWN."""
    values = (*VALUES[fact.attribute], *[UNKNOWN] * shy)
    return fact._replace(value=r.choice([v for v in values if v != fact.value]))


def pick(r: Random, split: str, known: list[Fact]) -> Fact:
    """What a question is about: a fact of the context, or what it does not say. In training, the
    name is then often nearly one of the context's, as Zabu is nearly Mabu: half is not enough."""
    if known and r.random() >= ABSENT:
        return r.choice(known)
    names = [fact.name for fact in known]
    like = r.choice(names) if names and r.random() < NEARLY * (split == "train") else ""
    half, name = len(like) // 2, r.choice(NAMES[split])
    while name in names or like[:half] != name[:half] and like[half:] != name[half:]:
        name = r.choice(NAMES[split])
    return Fact(name, r.choice(list(VALUES)), UNKNOWN)


def prompt(r: Random, lang: str, context: list[Fact], about: Fact) -> str:
    """A user's question about a fact after the facts of the context, or alone without any."""
    q = asked(r, lang, about)
    c = SPACE[lang].join(fact_text(fact, lang, r.choice((0, 1))) for fact in context)
    return CONTEXT[lang].format(c=c, q=q) if context else q


def _qa(r: Random, split: str, lang: str, max_facts: int) -> list[str]:
    """One to six questions about a context, which the first brings, and their answers."""
    fs = facts(r, split, r.randint(0, max_facts))
    said: list[str] = []
    for i in range(r.randint(1, 6)):
        about = pick(r, split, fs)
        said += [prompt(r, lang, [] if i else fs, about), answer(about, lang, r.choice(STYLES))]
    return said


def _copy(r: Random, split: str, lang: str, task: str) -> list[str]:
    """Say a list of words and a name again, or its first or last item."""
    i = LANGS.index(lang)
    items = [pair[i] for pair in r.sample(WORDS, r.randint(1, 3))] + [r.choice(NAMES[split])]
    r.shuffle(items)
    x, form, end = COMMA[lang].join(items), r.choice((0, 1)), r.choice((0, -1))
    if task == "echo":
        return [ECHO[lang][form].format(x=x), x]
    return [ITEM[lang][form].format(w=WHICH[end][i], x=x), items[end] + STOP[lang]]


def _translate(r: Random, split: str, lang: str) -> list[str]:
    """Two words into the other language. It holds no name, so the pair of words has a split."""
    words = r.sample(WORDS, 2)
    while split_of(" ".join(sorted(en for en, _ in words))) != split:
        words = r.sample(WORDS, 2)
    en, zh = (COMMA[to].join(word) for to, word in zip(LANGS, zip(*words)))
    source, target = (en, zh) if lang == "en" else (zh, en)
    return [TRANSLATE[lang][r.choice((0, 1))].format(x=source), target]


def chat(r: Random, split: str, max_facts: int) -> dict:
    """{"messages": one question and its reply, or several, "lang" of the questions, "task"}."""
    lang, task = r.choice(LANGS), r.choices(list(TASKS), list(TASKS.values()))[0]
    said = (_qa(r, split, lang, max_facts) if task == "qa" else
            _translate(r, split, lang) if task == "translate" else _copy(r, split, lang, task))
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": text}
                         for i, text in enumerate(said)], "lang": lang, "task": task}


def score(fact: Fact, about: Fact, style: str) -> float:
    """Of a reply that gives the value of `fact`, where `about` has the right one."""
    return GOLD[style] if fact.value == about.value else SHY if fact.value == UNKNOWN else WRONG


def bayes(pairs: list[dict]) -> dict[str, float]:
    """The most that can be known of drawn labels: {"accuracy", "loss"} of the true scores."""
    gaps = [row["gold"][0] - row["gold"][1] for row in pairs]
    return {"accuracy": sum(1.0 if g > 0 else 0.5 if g == 0 else 0.0 for g in gaps) / len(gaps),
            "loss": sum(log1p(exp(-g)) for g in gaps) / len(gaps)}


def _asked(r: Random, split: str, max_facts: int) -> tuple[str, Fact, list[dict]]:
    """Language, the fact that is asked for, and the prompt with its context."""
    lang, fs = r.choice(LANGS), facts(r, split, r.randint(1, max_facts))
    about = pick(r, split, fs)
    return lang, about, [{"role": "user", "content": prompt(r, lang, fs, about)}]


def rl_prompt(r: Random, split: str, max_facts: int) -> dict:
    """{"prompt", "lang", "fact" that is asked for, in English: name, attribute, value}."""
    lang, about, messages = _asked(r, split, max_facts)
    return {"prompt": messages, "lang": lang,
            "fact": [about.name, about.attribute[0], about.value[0]]}


def pair(r: Random, split: str, max_facts: int) -> dict:
    """{"prompt", "chosen", "rejected", "lang", "kind" in PAIRS, "gold": scores of both}."""
    lang, about, messages = _asked(r, split, max_facts)
    kind = r.choices(list(PAIRS), list(PAIRS.values()))[0]
    one, other = about, about
    if kind == "tie":
        styles = ["terse", "padded"]
    elif kind == "style":
        styles = r.sample(STYLES, 2)
        while GOLD[styles[0]] == GOLD[styles[1]]:
            styles = r.sample(STYLES, 2)
    else:
        styles, other = [r.choice(STYLES), r.choice(STYLES)], wrong(r, about, shy=True)
    both = [(answer(fact, lang, style), score(fact, about, style))
            for fact, style in zip((one, other), styles)]
    r.shuffle(both)
    if r.random() > 1 / (1 + exp(both[1][1] - both[0][1])):
        both.reverse()
    return {"prompt": messages, "chosen": both[0][0], "rejected": both[1][0], "lang": lang,
            "kind": kind, "gold": [both[0][1], both[1][1]]}


def ranking(r: Random, split: str, max_facts: int) -> dict:
    """{"prompt", "ranking": three right replies in different styles and a wrong one, "lang",
    "gold"}. Scores plus Gumbel noise decide the order: of each two the one that scores d more
    stands first with probability sigmoid(d), as in `pair` (Luce 1959)."""
    lang, about, messages = _asked(r, split, max_facts)
    drawn = [*((about, s) for s in r.sample(STYLES, 3)),
             (wrong(r, about, shy=True), r.choice(STYLES))]
    scored = [(score(fact, about, style), answer(fact, lang, style)) for fact, style in drawn]
    scored.sort(key=lambda s: log(-log(r.random() or 1e-300)) - s[0])
    return {"prompt": messages, "ranking": [text for _, text in scored], "lang": lang,
            "gold": [gold for gold, _ in scored]}


def floors(docs: list[dict], split: str, n_names: int) -> dict[str, float]:
    """Floor of a split's documents, bits per UTF-8 byte, {"en", "zh", "all"}, of n_names names."""
    bits, size = Counter(), Counter()
    for doc in docs:
        k = len(restated_values(doc["text"]))
        for key in (doc["lang"], "all"):
            bits[key] += doc["bits"] + log2(perm(n_names, k) / perm(len(NAMES[split]), k))
            size[key] += len(doc["text"].encode())
    return {key: bits[key] / size[key] for key in (*LANGS, "all") if size[key]}


def write_files(out_dir: str, files: dict[str, list[dict]]) -> None:
    """JSON lines, written aside first: a full disk leaves the old files as they are."""
    os.makedirs(out_dir, exist_ok=True)
    with TemporaryDirectory(dir=out_dir) as aside:
        for name, rows in files.items():
            write_text(os.path.join(aside, name), "".join(
                json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        for name in files:
            os.replace(os.path.join(aside, name), os.path.join(out_dir, name))


def generate(cfg: Config) -> dict[str, list[dict]]:
    """The rows of every file, each file with a Random of its own."""
    def document(r: Random, split: str, most: int) -> dict:
        listed = r.random() < (share := LISTS * (split == "train"))
        doc = (list_document(r, split, r.choice(LANGS), *LIST_ITEMS) if listed else
               pt_document(r, split, *PT_FACTS, EXACT_REPEAT * (split == "train")))
        return doc | {"bits": doc["bits"] - log2(share / len(LANGS) if listed else 1 - share)}

    found = {}
    for name, n, make in (("pt", cfg.n_train, document), ("chat", cfg.n_chat, chat),
                          ("pairs", cfg.n_pairs, pair), ("rankings", cfg.n_rankings, ranking),
                          ("prompts", cfg.n_prompts, rl_prompt)):
        for file, split, size in (name, "train", n), (f"{name}_heldout", "test", cfg.n_val):
            r = Random(f"{cfg.seed}/{file}")
            found[file] = [make(r, split, MAX_CHAT_FACTS) for _ in range(size)]
    del found["rankings_heldout"]  # the pairs judge the reward model
    return found


def show(seed: int) -> str:
    """In both languages a document, a list, a question with its context, and all kinds of reply."""
    r, parts = Random(f"{seed}/shown"), []
    for lang in LANGS:
        first, about = fs = facts(r, "train", 2)
        replies = [f"{answer(about, lang, style)}  ({style}: {GOLD[style]:g})" for style in GOLD]
        replies.append(f"{answer(wrong(r, about), lang, 'direct')}  (wrong: {WRONG:g})")
        rows = [("a document", _half(fs, lang, 1)), ("", _half([about, first], lang, 0))]
        listed, question = list_document(r, "train", lang, *LIST_ITEMS), prompt(r, lang, fs, about)
        rows += zip(("a list", "", "a question", ""), f"{listed['text']}\n{question}".split("\n"))
        rows += zip(("its answers", *[""] * len(replies)), replies)
        parts.append("".join(f"{label:<14}{text}\n" for label, text in rows))
    return "\n".join(parts)


def main() -> None:
    cfg = configure(Config, show=False)
    if cfg.show:
        print(show(cfg.seed))
        return
    data, n_all = generate(cfg), sum(map(len, NAMES.values()))
    floor = {"pt": floors(data["pt"], "train", len(NAMES["train"])),
             "pt_heldout": floors(data["pt_heldout"], "test", len(NAMES["test"])),
             "pt_heldout_all_names": floors(data["pt_heldout"], "test", n_all),
             "pairs_heldout_bayes": bayes(data["pairs_heldout"])}
    files = {f"{name}.jsonl": rows for name, rows in data.items()} | {"floor.json": [floor]}
    try:
        write_files(cfg.out_dir, files)
    except OSError as error:
        fail(str(error))
    print(f"{cfg.out_dir}: {', '.join(f'{name} {len(rows):,}' for name, rows in data.items())}")
    for name, by_lang in floor.items():
        print(f"floor of {name:<20}", *(f"{key} {value:.4f}" for key, value in by_lang.items()),
              sep=" | ", end=" bits/byte\n" if "all" in by_lang else "\n")


if __name__ == "__main__":
    terminal.run(main)
