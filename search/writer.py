"""
Lets a server that speaks OpenAI's protocol write the answer: ollama, llama.cpp, vLLM, serve.py.

    "".join(written("http://127.0.0.1:11434/v1#qwen3", messages, 200))     the text as it grows

The key, if the server wants one, is read from the environment variable OPENAI_API_KEY.
"""
import json
import os
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException, HTTPResponse
from urllib.error import HTTPError

SILENCE = 300  # seconds without a word that end the wait


@contextmanager
def post(url: str, path: str, body: dict, silence: float) -> Iterator[HTTPResponse]:
    """The reply of the server of a URL; what stands after its # is not sent. Whatever fails, also
    while the reply is read, is a ValueError in one line."""
    base, headers = url.partition("#")[0], {"Content-Type": "application/json"}
    if key := os.environ.get("OPENAI_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    try:
        asked = urllib.request.Request(base.rstrip("/") + path, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(asked, timeout=silence) as reply:
            yield reply
    except HTTPError as error:
        why = " ".join(error.read(300).decode(errors="replace").split())
        raise ValueError(f"{base}: {error}: {why}") from None
    except (OSError, HTTPException, ValueError, RecursionError) as error:
        raise ValueError(f"{base}: {error}") from None


def written(url: str, messages: list[dict], max_tokens: int) -> Iterator[str]:
    """The pieces of a reply, greedily written. Raises ValueError in one line, also for a reply that
    breaks off: a whole one ends with [DONE], or with the reason why it does."""
    body = {"model": url.partition("#")[2] or "default", "messages": messages,
            "max_tokens": max_tokens, "temperature": 0, "stream": True}
    whole, line = False, b""
    with post(url, "/chat/completions", body, SILENCE) as reply:
        for line in filter(bytes.strip, reply):
            data = line.removeprefix(b"data:").strip()
            whole |= data == b"[DONE]"
            if not line.startswith(b"data:") or data == b"[DONE]":
                continue
            try:
                choices = json.loads(data)["choices"]
                said = [choice["delta"].get("content") for choice in choices]
                whole |= any(choice.get("finish_reason") for choice in choices)
            except (KeyError, TypeError, AttributeError):
                break
            yield "".join(filter(None, said))
        if not whole:
            raise ValueError("not a stream of OpenAI's chat completions, or one that broke off: "
                             f"{line.decode(errors='replace').strip()[:200]}")
