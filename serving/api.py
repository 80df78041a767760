"""
Requests and replies in the form of OpenAI's API, read and written for serve.py.

    asked = read_numbers(body)                  {"temperature": 0.8, "n": 1, …}, or Refused
    Form(True, "model", texts).whole(pieces)    {"object": "chat.completion", "choices": […], …}
"""
import asyncio
import base64
import hmac
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from plumbing import chats
from plumbing.corpus import LineError
from plumbing.thoughts import Answer
from serving.batching import Text
from tokenizer import Tokenizer

AT_HOME = ("127.0.0.1", "localhost", "::1")  # names of this computer
SECONDS = 30.0  # in which a request must have arrived


class Refused(Exception):
    """A request that is not answered: the HTTP status and the reason."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status_code = status


# numbers that a request may hold: type, least, most, and what holds without them
NUMBERS: dict[str, tuple[type, float, float, Any]] = {
    "temperature": (float, 0, 100, 0.8), "top_p": (float, 1e-6, 1, 1.0), "top_k": (int, 0, 1e9, 0),
    "min_p": (float, 0, 1, 0.0), "repetition_penalty": (float, 1e-6, 100, 1.0),
    "seed": (int, -2**63, 2**63 - 1, None), "max_tokens": (int, 1, 1e9, None),
    "max_completion_tokens": (int, 1, 1e9, None), "n": (int, 1, 8, 1),
    "top_logprobs": (int, 0, 20, 0)}
# what would change the reply of another server, and its values that change nothing
WITHOUT_EFFECT: dict[str, tuple] = {
    "tools": ([],), "functions": ([],), "response_format": ({"type": "text"},), "echo": (False,),
    "best_of": (1,), "suffix": ("",), "logit_bias": ({},), "presence_penalty": (0,),
    "frequency_penalty": (0,)}
OF_DOCUMENTS = WITHOUT_EFFECT | {"n": (1,), "stop": ([],), "logprobs": (False,)}  # their answers


def read_numbers(body: dict, without_effect: dict[str, tuple]) -> dict[str, Any]:
    """The numbers of a request. Raises Refused for one out of range, and for a setting that this
    server does not have and that would change the reply."""
    for name, harmless in without_effect.items():
        if body.get(name) is not None and body[name] not in harmless:
            raise Refused(400, f"{name} is not supported")
    found = {}
    for name, (kind, least, most, default) in NUMBERS.items():
        value: Any = body.get(name)
        number = kind is not int and isinstance(value, float) or type(value) is int
        if value is not None and not (number and least <= value <= most):
            raise Refused(400, f"{name} must be {'an integer' if kind is int else 'a number'} from "
                               f"{least:g} to {most:g}, got {value!r:.40}")
        found[name] = default if value is None else kind(value)
    found["max_tokens"] = found.pop("max_completion_tokens") or found["max_tokens"]  # its old name
    wanted: Any = body.get("logprobs")  # true in a chat; in /v1/completions how many to report
    if wanted is not None and not (isinstance(wanted, int) and 0 <= wanted <= 20):
        raise Refused(400, f"logprobs must be true, false or a number up to 20, got {wanted!r:.40}")
    found["logprobs"] = wanted is not None and wanted is not False
    if not isinstance(wanted, bool):
        found["top_logprobs"] = max(found["top_logprobs"], wanted or 0)
    return found


def read_strings(body: dict, name: str, most: int = 16) -> list[str]:
    """One string or a list of them. Raises Refused."""
    found = body.get(name)
    found = [] if found is None else [found] if isinstance(found, str) else found
    if not isinstance(found, list) or len(found) > most or not all(
            isinstance(x, str) and x for x in found):
        raise Refused(400, f"{name} must be a string that is not empty, or at most {most} of them")
    return found


def read_messages(body: dict) -> chats.Messages:
    """The messages of a chat, of which the last is the user's. Raises Refused."""
    given = body.get("messages")
    if not isinstance(given, list) or not given:
        raise Refused(400, "messages must be a list with at least one message")
    try:
        return chats.ending("messages", chats.read_messages({"messages": given}, "messages"),
                            "user")
    except LineError as error:
        raise Refused(400, str(error.args[-1])) from None


class Reply:
    """The text of a reply as it grows, up to the first stop string. What may be the beginning of
    one is held back."""

    def __init__(self, decoder: Answer, stops: list[str]):
        self.decoder, self.stops, self.held, self.ended = decoder, stops, "", False

    def push(self, token: int | None) -> str:
        """What may be shown now; None for the token is the end."""
        if self.ended:
            return ""
        text = self.held + (self.decoder.flush() if token is None else self.decoder.push(token))
        found = [at for stop in self.stops if (at := text.find(stop)) >= 0]
        if found:
            self.ended = True
            return text[:min(found)]
        keep = max((n for stop in self.stops for n in range(1, min(len(stop), len(text) + 1))
                    if token is not None and text.endswith(stop[:n])), default=0)
        self.held = text[len(text) - keep:]
        return text[:len(text) - keep]


@dataclass
class Piece:
    """What is new of one choice of a reply: text, a thought, log P, or the reason of its end."""
    index: int
    text: str = ""
    thought: str = ""
    logprob: dict | None = None
    finish: str | None = None


async def one(piece: Piece) -> AsyncIterator[Piece]:
    """A reply that is known already."""
    yield piece


async def pieces_of(texts: list[Text], events: asyncio.Queue, tok: Tokenizer, stops: list[str]
                    ) -> AsyncIterator[Piece]:
    """The pieces of texts that are being written. `events` gets (number of the text, and what its
    `on_token` gets)."""
    thoughts: list[str] = []
    replies = [Reply(Answer(tok, text.prompt, thoughts.append), stops) for text in texts]
    running = len(texts)
    while running:
        i, token, logp, likeliest = await events.get()
        text, reply, piece = texts[i], replies[i], Piece(i)
        if token not in text.stop:
            piece.text, piece.thought = reply.push(token), "".join(thoughts)
            thoughts.clear()
            if token is not None and text.top_logprobs >= 0:
                piece.logprob = logprob(tok, token, logp, likeliest)
        if reply.ended:
            text.cancelled, text.ended = True, "stop"
        if token is None:
            piece.finish, running = text.ended or "stop", running - 1
        if piece.text or piece.thought or piece.logprob or piece.finish:
            yield piece


@dataclass
class Form:
    """How the pieces of the replies to one request are written down."""
    chat: bool
    model: str
    texts: list[Text]
    more: dict = field(default_factory=dict)  # beside what OpenAI's form has: {"sources": […]}
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def head(self, chunk: bool = False) -> dict:
        kind = "chat.completion" + ".chunk" * chunk if self.chat else "text_completion"
        return {"id": f"{'chatcmpl' if self.chat else 'cmpl'}-{self.id}", "object": kind,
                "created": self.created, "model": self.model}

    def usage(self) -> dict:
        read, all_ids = (sum(len(ids) for ids in found) for found in (
            [t.prompt for t in self.texts], [t.ids for t in self.texts]))
        return {"usage": {
            "prompt_tokens": read, "completion_tokens": all_ids - read, "total_tokens": all_ids,
            "prompt_tokens_details": {"cached_tokens": sum(t.reused for t in self.texts)}}}

    def logprobs(self, pieces: list[Piece]) -> dict | None:
        found = [piece.logprob for piece in pieces if piece.logprob]
        if not found or self.chat:
            return {"content": found} if found else None
        return {"tokens": [x["token"] for x in found],
                "token_logprobs": [x["logprob"] for x in found],
                "top_logprobs": [{y["token"]: y["logprob"] for y in x["top_logprobs"]}
                                 for x in found]}

    def choice(self, index: int, pieces: list[Piece], holder: str, begins: bool = True) -> dict:
        """What all pieces of one choice say. Its role is said once, for clients join what comes."""
        text, thought = "".join(p.text for p in pieces), "".join(p.thought for p in pieces)
        found: dict[str, Any] = {"index": index, "finish_reason": pieces[-1].finish,
                                 "logprobs": self.logprobs(pieces)}
        if not self.chat:
            return found | {"text": text}
        said = ({"role": "assistant"} if begins else {}) | {"content": text}
        return found | {holder: said | ({"reasoning_content": thought} if thought else {})}

    async def events(self, pieces: AsyncIterator[Piece], options: object) -> AsyncIterator[bytes]:
        """A stream: an event for each piece, and at the end the usage if it is asked for."""
        more, begun = self.more, set()
        async for piece in pieces:
            choice = self.choice(piece.index, [piece], "delta", piece.index not in begun)
            yield sse(self.head(True) | {"choices": [choice]} | more)
            more, begun = {}, begun | {piece.index}
        if isinstance(options, dict) and options.get("include_usage") is True:
            yield sse(self.head(True) | {"choices": []} | self.usage())
        yield sse("[DONE]")

    def whole(self, pieces: list[Piece]) -> dict:
        """The replies in one object."""
        choices = [self.choice(i, [piece for piece in pieces if piece.index == i], "message")
                   for i in range(max(1, len(self.texts)))]
        return self.head() | self.usage() | {"choices": choices} | self.more


def logprob(tok: Tokenizer, token: int, logp: float, likeliest: dict[int, float]) -> dict:
    def entry(token: int, logp: float) -> dict:
        raw = tok.decode_single_token_bytes(token)
        return {"token": raw.decode("utf-8", "replace"), "logprob": logp, "bytes": [*raw]}
    return entry(token, logp) | {"top_logprobs": [entry(*pair) for pair in likeliest.items()]}


def source(number: int, chunk: Any, location: str, shown: Callable[[str], str]) -> dict:
    """A passage that an answer may cite."""
    return {"number": number, "location": location, "path": chunk.doc, "line": chunk.line,
            "text": shown(chunk.text)}


def embeddings(vectors: Any, model: str, form: object) -> dict:
    """Vectors as lists, or as base64 of fp32, which the official client asks for."""
    data = [base64.b64encode(row.tobytes()).decode() if form == "base64" else row.tolist()
            for row in np.asarray(vectors, "<f4")]
    return {"object": "list", "model": model, "usage": {"prompt_tokens": 0, "total_tokens": 0},
            "data": [{"object": "embedding", "index": i, "embedding": row}
                     for i, row in enumerate(data)]}


def sse(data: dict | str) -> bytes:
    """A server-sent event."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
    return f"data: {text}\n\n".encode("utf-8", "replace")


def error(status: int, message: str) -> dict:
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


async def read_body(request: Any) -> dict:
    """The JSON object of a request, which must say that it is JSON: so no page of another site can
    make a browser send it. Raises Refused."""
    if not request.headers.get("content-type", "").startswith("application/json"):
        raise Refused(415, "the Content-Type must be application/json")
    try:
        async with asyncio.timeout(SECONDS):
            body = json.loads(await request.body())
    except TimeoutError:
        raise Refused(408, f"the request did not arrive within {SECONDS:.0f} seconds") from None
    except (ValueError, RecursionError) as failure:
        raise Refused(400, f"the body is not JSON: {failure}") from None
    if not isinstance(body, dict):
        raise Refused(400, "the body must be a JSON object")
    return body


class Gate:
    """Lets in who may come in, and no more than `most` bytes of a request. Without a key the Host
    must be this computer: else a page of another site could reach us through a name of its own.
    Raises Refused."""

    def __init__(self, app: Callable, key: str, most: int):
        self.app, self.key, self.most = app, key, most

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get(b"host", "").rsplit(":", 1)[0].strip("[]")
        sent = headers.get(b"authorization", "").removeprefix("Bearer ").encode("utf-8", "replace")
        read = 0
        if self.key and scope["path"].startswith(("/v1", "/upload", "/metrics")) and not (
                hmac.compare_digest(sent, self.key.encode())):
            raise Refused(401, "a wrong API key, or none")
        if not self.key and host not in AT_HOME:
            raise Refused(403, f"the Host must be one of {', '.join(AT_HOME)}")

        async def limited() -> dict:
            nonlocal read
            part = await receive()
            read += len(part.get("body", b""))
            if read > self.most:
                raise Refused(413, f"a request may have {self.most:,} bytes")
            return part

        await self.app(scope, limited, send)
