"""
Scores a short answer against the right ones, as SQuAD and CMRC do; may be skipped.
"""
import re
import string
import unicodedata
from collections import Counter
from decimal import Decimal
from difflib import SequenceMatcher

NUMBER = re.compile(r"(?:(?<![A-Za-z0-9])[-−－])?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?"
                    r"(?:[eE][-+]?\d{1,3})?")
UNIT = re.compile(r"[^\W\u3400-\u9fff\uf900-\ufaff_]+|\S")  # a word, a Han character, a sign


def english_words(text: str) -> list[str]:
    """Lower case, without punctuation and articles, as SQuAD's evaluation has it."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def chinese_units(text: str) -> list[str]:
    """Han characters and words of other scripts, without punctuation, as CMRC's evaluation."""
    return [unit for unit in UNIT.findall(text.lower())
            if not unicodedata.category(unit[0]).startswith(("P", "S"))]


def score_answer(said: str, answers: list[str], lang: str) -> tuple[float, float]:
    """(exact match, F1), the best over the answers, 0 to 1. F1 counts shared words in English and
    the longest common run in Chinese. Of a text like "A" or "+" all is compared."""
    units = english_words if lang == "en" else chinese_units
    best = (0.0, 0.0)
    for answer in answers:
        a, b = (units(text) or [text.strip()] for text in (said, answer))
        same = (Counter(a) & Counter(b)).total() if lang == "en" else (
            SequenceMatcher(None, a, b, autojunk=False).find_longest_match().size)
        best = max(best, (float(a == b), 2 * same / (len(a) + len(b))))
    return best


def last_number(text: str) -> Decimal | None:
    """The last number in a text: "so 3 * 6 = 18 eggs." -> 18, and "pages 5-10" -> 10."""
    found = NUMBER.findall(text)
    return Decimal(re.sub("[−－]", "-", found[-1]).replace(",", "")) if found else None
