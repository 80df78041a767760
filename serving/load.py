"""
How much faster do several clients of serve.py get their texts together than one after the other?

    python serve.py --checkpoint=out/smol &
    python -m serving.load --clients=8

Each client asks its own question at temperature 0, first alone, then all at once. Printed are the
tokens per second of both, their ratio, and how many texts were the same to the last letter.
"""
import json
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from configurator import Count, configure
from plumbing.terminal import fail, run

QUESTIONS = ("What is the moon?", "How is tea made?", "Tell me of a river.", "Who was Newton?",
             "Why is the sky blue?", "What does a baker do?", "Name an animal.", "What is paper?")


@dataclass(frozen=True)
class Config:
    address: str = "http://127.0.0.1:8000"  # where serve.py listens
    clients: Count = 8  # that ask at once
    max_tokens: Count = 100  # of each text


def ask(cfg: Config, i: int) -> tuple[str, int]:
    """The text that a client gets, and its tokens."""
    body = {"messages": [{"role": "user", "content": f"{i}. {QUESTIONS[i % len(QUESTIONS)]}"}],
            "temperature": 0, "max_tokens": cfg.max_tokens}
    request = urllib.request.Request(cfg.address + "/v1/chat/completions", json.dumps(
        body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as reply:
        said = json.load(reply)
    return said["choices"][0]["message"]["content"], said["usage"]["completion_tokens"]


def main() -> None:
    cfg = configure(Config)
    try:
        ask(cfg, 0)  # the first request warms up
        start = time.monotonic()
        alone = [ask(cfg, i) for i in range(cfg.clients)]
        one = sum(n for _, n in alone) / (time.monotonic() - start)
        start = time.monotonic()
        with ThreadPoolExecutor(cfg.clients) as pool:
            together = [*pool.map(lambda i: ask(cfg, i), range(cfg.clients))]
        many = sum(n for _, n in together) / (time.monotonic() - start)
    except urllib.error.URLError as error:
        fail(f"{cfg.address}: {error}")
    same = sum(a == b for a, b in zip(alone, together))
    print(f"one after the other {one:.1f} tok/s, {cfg.clients} at once {many:.1f} tok/s: "
          f"{many / one:.2f} times; {same} of {cfg.clients} texts the same")


if __name__ == "__main__":
    run(main)
