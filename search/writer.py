"""
Lets a server that speaks OpenAI's protocol write the answer: ollama, llama.cpp, vLLM, serve.py.

    "".join(written("http://127.0.0.1:11434/v1#qwen3", messages, 200))     the text as it grows

The key, if the server wants one, is read from the environment variable OPENAI_API_KEY.
"""
import json
import os
import urllib.request
from collections.abc import Iterator
from http.client import HTTPException
from urllib.error import HTTPError

SILENCE = 300  # seconds without a word that end the wait


def request(url: str, path: str, body: dict) -> urllib.request.Request:
    """A POST to the server of a URL; what stands after its # is not sent."""
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("OPENAI_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    base = url.partition("#")[0].rstrip("/")
    return urllib.request.Request(base + path, json.dumps(body).encode(), headers)


def written(url: str, messages: list[dict], max_tokens: int) -> Iterator[str]:
    """The pieces of a reply, greedily written. Raises ValueError in one line."""
    base, _, model = url.partition("#")
    body = {"model": model or "default", "messages": messages, "max_tokens": max_tokens,
            "temperature": 0, "stream": True}
    try:
        with urllib.request.urlopen(request(url, "/chat/completions", body),
                                    timeout=SILENCE) as reply:
            for line in reply:
                data = line.removeprefix(b"data:").strip()
                if line.startswith(b"data:") and data != b"[DONE]":
                    for choice in json.loads(data)["choices"]:
                        yield choice["delta"].get("content") or ""
    except HTTPError as error:
        why = " ".join(error.read(300).decode(errors="replace").split())
        raise ValueError(f"{base}: {error}: {why}") from None
    except (OSError, HTTPException, ValueError) as error:
        raise ValueError(f"{base}: {error}") from None
    except (KeyError, TypeError, AttributeError):
        raise ValueError(f"{base}: not a stream of OpenAI's chat completions: "
                         f"{data.decode(errors='replace')[:200]}") from None
