"""
Serve a model to several people at once: an API like OpenAI's, and a page to chat in.

    pip install starlette uvicorn                             (the extra `serve`)
    python serve.py --checkpoint=out/sft                      then open http://127.0.0.1:8000
    python serve.py --checkpoint=out/sft --index=out/rag      answers come from your documents

    from openai import OpenAI
    client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
    client.chat.completions.create(model="any", messages=[{"role": "user", "content": "Hi"}])

All requests share one batch (serving/batching.py): one joins at the next token and leaves when it
ends or its client hangs up. Only this computer can connect; any other --host needs an --api_key.
"""
from plumbing.terminal import end_quietly

end_quietly(__name__, trains=False)  # before `import torch`, which takes seconds

import asyncio
import os
import queue
import secrets
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from functools import partial
from hashlib import sha256
from pathlib import Path
from threading import Thread
from typing import Any, Literal

import rag
from configurator import Count, FilePath, configure
from generate import Sampling, sample
from plumbing.files import whole
from plumbing.loading import Precision, load_writer, newest_checkpoint
from plumbing.terminal import fail, run, say
from serving import api
from serving.api import Form, Piece, Refused
from serving.batching import Batch, Text
from tokenizer import render

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
    from starlette.routing import Mount, Route, Router
except ImportError:
    if __name__ == "__main__":
        fail("serve.py needs the extra `serve`: pip install starlette uvicorn")
    raise


@dataclass(frozen=True)
class Config:
    checkpoint: FilePath = ""  # file, or folder: its newest valid one; none: the newest under out/
    index: FilePath = ""  # index of rag.py: answer from its documents
    embed: str = ""  # embedder for /v1/embeddings, and for an index with vectors; see rag.py
    upload: FilePath = ""  # folder for notes that the page adds to the index; none: no upload
    host: str = "127.0.0.1"  # address to listen at; any but this computer's own needs an api_key
    port: Count = 8000  # of that address
    api_key: str = ""  # what clients must send; else KHAOSZ_API_KEY of the environment
    rows: Count = 8  # texts that are written at once
    waiting: Count = 64  # texts that may wait; one more is refused with 429
    window: Count = 2048  # most tokens of a prompt and its reply; caches take 2 x rows x window
    max_body_kb: Count = 1024  # largest request
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # where to compute
    dtype: Precision = "auto"  # of the weights; auto: bfloat16 on cuda, int8 on a CPU if it pays


@contextmanager
def let_go(texts: list[Text]) -> Iterator[None]:
    """A client that hangs up ends the block: its texts leave the batch at the next token."""
    try:
        yield
    finally:
        for text in texts:
            text.cancelled = True


class Server:
    """The model, its batch, and the routes."""

    def __init__(self, cfg: Config):
        self.cfg, self.key = cfg, cfg.api_key or os.environ.get("KHAOSZ_API_KEY", "")
        if cfg.host not in api.AT_HOME and not self.key:
            raise ValueError(f"--host={cfg.host} lets other computers in: give an --api_key too")
        if cfg.upload and not cfg.index:
            raise ValueError("--upload needs an --index to add the notes to")
        self.model, self.tok = load_writer(cfg.checkpoint or newest_checkpoint(), cfg.device,
                                           cfg.dtype)
        self.window = min(cfg.window, self.model.config.max_seq_len)
        self.rag = rag.Config(index=cfg.index, embed=cfg.embed, device=cfg.device)
        self.index = rag.open_index(self.rag) if cfg.index else None
        self.embed = rag.embed.load(cfg.embed, cfg.device)
        self.batch = Batch(self.model, sample, cfg.rows, self.window, cfg.waiting)
        self.adding = asyncio.Lock()  # a note to the index
        self.name, self.answered, self.refused = Path(self.model.path).parent.name, 0, 0
        Thread(target=self.batch.run, daemon=True).start()

    def text(self, prompt: list[int], asked: dict, number: int, on_token: Callable,
             quoting: bool = False) -> Text:
        """Hand a prompt to the batch. Raises Refused if it is too long or too many wait."""
        room = self.window - len(prompt)
        if not prompt or room < 1:
            raise Refused(400, f"a prompt has 1 to {self.window - 1:,} tokens, not {len(prompt):,}")
        wanted, seed = asked["max_tokens"] or room, asked["seed"]
        text = Text(prompt, min(wanted, room), on_token, self.tok.stop,
                    secrets.randbits(31) if seed is None else (seed + number) % 2**63,
                    {f.name: asked[f.name] for f in fields(Sampling) if f.name in asked}, quoting,
                    asked["top_logprobs"] if asked["logprobs"] else -1)
        if not self.batch.submit(text):
            raise Refused(503, "the server ends") if self.batch.over else Refused(
                429, f"{self.cfg.waiting} texts are waiting already: try again later")
        self.answered += 1
        return text

    def write(self, prompts: list[list[int]], asked: dict, stops: list[str]
              ) -> tuple[list[Text], AsyncIterator[Piece]]:
        """Start `n` replies to each prompt. Gives the texts and their pieces as they come."""
        loop, events, texts = asyncio.get_running_loop(), asyncio.Queue(), []

        def tell(*event: Any) -> None:
            with suppress(RuntimeError):  # the server has ended
                loop.call_soon_threadsafe(events.put_nowait, event)

        for number, prompt in enumerate(p for p in prompts for _ in range(asked["n"])):
            try:
                texts.append(self.text(prompt, asked, number, partial(tell, number)))
            except Refused:
                with let_go(texts):  # those that have begun end, too
                    raise
        return texts, api.pieces_of(texts, events, self.tok, stops)

    async def look_up(self, messages: list[dict], asked: dict
                      ) -> tuple[list[Text], AsyncIterator[Piece], list[dict]]:
        """Start an answer from the documents. Gives its texts, its pieces and its sources."""
        assert self.index
        question = messages[-1]["content"]
        history = [message for message in messages[:-1] if message["role"] != "system"]
        hits = await asyncio.to_thread(self.index.search, question, self.rag.n_sources)
        if not any(hit.coverage >= self.rag.min_coverage for hit in hits):
            return [], api.one(Piece(0, rag.REFUSAL[rag.language(question)], finish="stop")), []
        try:
            prompt, hits, _ = rag.build_prompt(question, hits, self.tok, self.window, self.rag,
                                               history, self.model.config.n_embd <= 1024)
        except ValueError as error:
            raise Refused(400, str(error)) from None
        loop, said, tokens = asyncio.get_running_loop(), asyncio.Queue(), queue.Queue()
        most = min(self.rag.max_tokens, self.window // 4)
        asked |= {"temperature": 0.0, "repetition_penalty": self.rag.repetition_penalty,
                  "max_tokens": min(asked["max_tokens"] or most, most)}
        text = self.text(prompt, asked, 0, lambda token, *_: tokens.put([token]), quoting=True)

        async def pieces() -> AsyncIterator[Piece]:
            def check() -> None:  # rag.checked reads tokens as they come, so it has its own thread
                def tell(piece: str | None) -> None:
                    with suppress(RuntimeError):  # the server has ended
                        loop.call_soon_threadsafe(said.put_nowait, piece)
                rag.checked(rag.texts_of(iter(tokens.get, [None]), self.tok), len(hits), tell)
                tell(None)
            Thread(target=check, daemon=True).start()  # asyncio's threads are too few to wait in
            while (piece := await said.get()) is not None:
                yield Piece(0, piece)
            yield Piece(0, finish=text.ended or "stop")
        return [text], pieces(), [api.source(n, hit.chunk, rag.location(hit), rag.shown)
                                  for n, hit in enumerate(hits, 1)]

    async def completions(self, request: Request) -> Callable:
        """/v1/chat/completions and /v1/completions."""
        body, chat = await api.read_body(request), "chat" in request.url.path
        cited = chat and self.index is not None
        asked = api.read_numbers(body, api.OF_DOCUMENTS if cited else api.WITHOUT_EFFECT)
        if cited:
            texts, pieces, sources = await self.look_up(api.read_messages(body), asked)
        elif chat:
            how = body.get("chat_template_kwargs")
            think = isinstance(how, dict) and how.get("enable_thinking") is True
            prompts = [render(self.tok, api.read_messages(body), True, think)[0]]
        else:
            prompts = [[*self.tok.begin, *self.tok.encode_ordinary(text)]
                       for text in api.read_strings(body, "prompt") or [""]]
        if not cited:
            texts, pieces = self.write(prompts, asked, api.read_strings(body, "stop"))
        form = Form(chat, self.name, texts, {"sources": sources} if cited else {})
        if body.get("stream") is True:
            stream = StreamingResponse(form.events(pieces, body.get("stream_options")),
                                       media_type="text/event-stream")

            async def reply(*channel: Any) -> None:
                with let_go(texts):
                    await stream(*channel)
            return reply
        found = []
        with let_go(texts):
            async for piece in pieces:
                found.append(piece)
                if await request.is_disconnected():
                    raise ClientDisconnect
        return JSONResponse(form.whole(found))

    async def embeddings(self, request: Request) -> Response:
        body = await api.read_body(request)
        if self.embed is None:
            raise Refused(400, "this server was started without --embed")
        texts = api.read_strings(body, "input", 256)
        vectors = await asyncio.to_thread(self.embed, texts, "passage") if texts else []
        return JSONResponse(api.embeddings(vectors, self.cfg.embed, body.get("encoding_format")))

    async def upload(self, request: Request) -> Response:
        """Add a note to the index. Its file is named after its content, not after the request."""
        body = await api.read_body(request)
        text = "\n".join(api.read_strings(body, "text"))
        if not self.cfg.upload or not text.strip():
            raise Refused(400, "the note is empty" if self.cfg.upload else
                          "this server was started without --upload")
        raw = text.encode("utf-8", "replace")

        def add() -> None:
            path = Path(self.cfg.upload).resolve() / f"note-{sha256(raw).hexdigest()[:16]}.md"
            path.parent.mkdir(parents=True, exist_ok=True)
            chunks, _ = rag.documents.read_document(path, raw, rag.cutter(self.rag, self.embed))
            how = f"{self.rag.chunk_tokens} {self.rag.semantic}\0".encode()  # as in rag.py add
            with (rag.Index(self.rag.index, True, self.embed, self.rag.embed) as index,
                  whole(path) as file):  # if it cannot be indexed, there is no note
                file.write_bytes(raw)
                index.put(str(path), sha256(how + raw).hexdigest(), chunks)
                known, stamp = index.manifest, {str(path): file.stat().st_mtime_ns}
                index.note(known["folders"], {*known["refused"]}.difference(stamp),
                           known["stamps"] | stamp)
                index.commit()
            self.index = rag.open_index(self.rag)

        try:
            async with self.adding:
                await asyncio.to_thread(add)
        except ValueError as error:  # `rag.py add` is at work
            raise Refused(503, str(error)) from None
        return JSONResponse({"index": self.index.size() if self.index else ""})

    async def about(self, request: Request) -> Response:
        """/v1/models, /health and /metrics."""
        if "models" in request.url.path:
            one = {"id": self.name, "object": "model", "created": 0, "owned_by": "khaosz"}
            return JSONResponse({"object": "list", "data": [one]})
        if "health" in request.url.path:
            return JSONResponse({"over": self.batch.over}, 503 if self.batch.over else 200)
        found = {"requests_answered": self.answered, "requests_refused": self.refused,
                 **self.batch.counts()}
        return PlainTextResponse("".join(f"khaosz_{k} {v:g}\n" for k, v in found.items()))

    async def page(self, request: Request) -> Response:
        page = Path(__file__).parent / "serving/page.html"
        return Response(page.read_bytes(), media_type="text/html; charset=utf-8", headers={
            "Content-Security-Policy": "default-src 'self' 'unsafe-inline'"})

    async def failed(self, request: Request, error: Exception) -> Response:
        status = getattr(error, "status_code", 499 if isinstance(error, ClientDisconnect) else 500)
        self.refused += 1
        message = "an error of the server, see its terminal" if status == 500 else str(error)
        return JSONResponse(api.error(status, message), status)

    def app(self) -> Callable:
        """What uvicorn runs."""
        jobs: list[tuple[Any, ...]] = [
            ("GET", self.page, "/"), ("GET", self.about, "/health", "/metrics", "/v1/models"),
            ("POST", self.completions, "/v1/chat/completions", "/v1/completions"),
            ("POST", self.embeddings, "/v1/embeddings"), ("POST", self.upload, "/upload")]
        routes = [Route(at, job, methods=[method]) for method, job, *paths in jobs for at in paths]
        gate: Any = api.Gate(Router(routes), self.key, 1024 * self.cfg.max_body_kb)
        return Starlette(routes=[Mount("/", gate)], exception_handlers=dict.fromkeys(
            (Refused, ClientDisconnect, 404, 405, 500), self.failed))


def main() -> None:
    cfg = configure(Config, show=False)
    inet, host = ((socket.AF_INET6, f"[{cfg.host}]") if ":" in cfg.host
                  else (socket.AF_INET, cfg.host))
    at = f"http://{host}:{cfg.port}"
    try:  # uvicorn would say it in many lines
        socket.create_server((cfg.host, cfg.port), family=inet).close()
        server = Server(cfg)
    except (ValueError, RuntimeError, OSError, OverflowError) as error:
        fail(f"{at}: {error}" if isinstance(error, OSError | OverflowError) else f"{error}")
    say(f"{server.model.path}: {at} is the page, {at}/v1 the API; Ctrl-C ends it")
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)  # uvicorn raises it once more when all has ended
    listener = uvicorn.Server(uvicorn.Config(
        server.app(), cfg.host, cfg.port, log_level="warning", server_header=False,
        timeout_keep_alive=5, timeout_graceful_shutdown=1, h11_max_incomplete_event_size=32768))
    leave = listener.handle_exit  # but end all texts first
    listener.handle_exit = lambda *sent: (server.batch.stop(), leave(*sent))  # type: ignore
    listener.run()


if __name__ == "__main__":
    run(main)
