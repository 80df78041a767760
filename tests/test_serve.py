"""serve.py, asked by the official client and by hostile ones. Needs the extra `serve`."""
import asyncio
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import make_dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from notes import NOTES

import rag
from generate import replies, sample
from search.index import Index
from serving import api
from serving.batching import Batch
from tokenizer import render

pytest.importorskip("uvicorn", reason="the extra `serve`")
pytest.importorskip("starlette", reason="the extra `serve`")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="signals and /proc of Linux")
ROOT = Path(__file__).parent.parent
HI = [{"role": "user", "content": "Hi 你好"}]


def start(*settings: str, **environ: str) -> SimpleNamespace:
    """A server, once it listens."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "serve.py", f"--port={port}", *settings], cwd=ROOT, text=True,
        stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"} | environ)
    said = process.stderr.readline()
    assert "is the page" in said, said + process.stderr.read()
    server = SimpleNamespace(process=process, url=re.search(r"http\S+", said)[0], port=port)
    for _ in range(200):
        try:
            urllib.request.urlopen(server.url + "/health").close()
            break
        except urllib.error.URLError:
            time.sleep(0.05)
    return server


def end(server: SimpleNamespace) -> None:
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(20) == 0
    said = server.process.stderr.read()
    assert "Traceback" not in said and "before the first step" not in said


@pytest.fixture(scope="module")
def server(tiny):
    server = start(f"--checkpoint={tiny.pt}", "--rows=4", "--waiting=6", "--max_body_kb=64")
    yield server
    end(server)


def call(server: SimpleNamespace, path: str, body=None, **headers: str) -> tuple[int, dict]:
    """Status and JSON of a request."""
    raw = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(server.url + path, raw, {
        "Content-Type": "application/json"} | {k.replace("_", "-"): v for k, v in headers.items()})
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.status, json.loads(reply.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def figure(server: SimpleNamespace, name: str) -> float:
    with urllib.request.urlopen(server.url + "/metrics") as reply:
        return float(re.search(rf"khaosz_{name} (\S+)", reply.read().decode())[1])


def alone(tiny, messages: list[dict], n: int) -> str:
    ids, _ = render(tiny.tok, messages, add_generation_prompt=True)
    reply, = replies(tiny.model.eval(), [ids], n, stop=tiny.tok.stop, temperature=0.0)
    return tiny.tok.decode([token for token in reply if token not in tiny.tok.stop])


def test_the_official_client(server, tiny):
    """Whole and streamed, several choices, log P, usage, stop strings, text completions."""
    openai = pytest.importorskip("openai", reason="its client is the oracle")
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
    assert [m.id for m in client.models.list()] == ["pt"]
    ask = dict(model="any", messages=HI, max_tokens=20, temperature=0)
    expected = alone(tiny, HI, 20)
    whole = client.chat.completions.create(**ask, logprobs=True, top_logprobs=2, n=2)
    assert [choice.message.content for choice in whole.choices] == [expected] * 2
    found = whole.choices[0].logprobs.content
    assert all(x.top_logprobs[0].logprob == x.logprob for x in found)  # greedy: the likeliest
    n_read = len(render(tiny.tok, HI, add_generation_prompt=True)[0])
    assert whole.usage.prompt_tokens == 2 * n_read and whole.usage.completion_tokens <= 40
    events = [*client.chat.completions.create(**ask, stream=True,
                                              stream_options={"include_usage": True})]
    assert "".join(e.choices[0].delta.content for e in events if e.choices) == expected
    assert events[-1].usage.completion_tokens * 2 == whole.usage.completion_tokens
    stop = expected[len(expected) // 2:][:3]
    cut = client.chat.completions.create(**ask, stop=[stop, "never said"])
    assert cut.choices[0].message.content == expected[:expected.index(stop)]
    assert cut.choices[0].finish_reason == "stop"
    with client.chat.completions.stream(**ask, n=2, stop=stop) as stream:
        joined = stream.get_final_completion().choices
    assert [(choice.message.role, choice.message.content) for choice in joined] == [
        ("assistant", cut.choices[0].message.content)] * 2  # each event said "assistant" once more
    both = client.completions.create(model="any", prompt=["Once", "从前"], max_tokens=5, seed=1)
    again = client.completions.create(model="any", prompt=["Once", "从前"], max_tokens=5, seed=1)
    assert [c.text for c in both.choices] == [c.text for c in again.choices]
    with pytest.raises(openai.BadRequestError, match="a prompt has 1 to 255 tokens, not 1,0"):
        client.completions.create(model="any", prompt="x" * 1000)


def test_a_sampler_of_your_own_needs_no_line_here(monkeypatch):
    """A setting added to generate.Sampling, as its docstring says, made each request fail: 500."""
    import serve
    more = make_dataclass("Sampling", [("top_a", float, 0.0)], bases=(serve.Sampling,), frozen=True)
    monkeypatch.setattr(serve, "Sampling", more)
    batch = SimpleNamespace(submit=lambda text: True)
    server = SimpleNamespace(window=9, batch=batch, answered=0, tok=SimpleNamespace(stop=()))
    asked = {name: default for name, (*_, default) in api.NUMBERS.items()} | {"logprobs": False}
    text = serve.Server.text(server, [1], asked, 0, print)
    assert text.sampling["top_p"] == 1.0 and "top_a" not in text.sampling


def test_what_may_begin_a_stop_string_is_held_back():
    """Against the text as a whole. A stop string of 100,000 characters took seconds for each token,
    in which nobody was answered: each of its beginnings was compared, though the text was short."""
    r = random.Random(2)
    letters = SimpleNamespace(push="ab".__getitem__, flush=lambda: "")
    for _ in range(300):
        tokens = r.choices((0, 1), k=12)
        stops = ["".join(r.choices("ab", k=r.randrange(3, 7))) for _ in range(2)]
        reply = api.Reply(letters, stops)
        said = "".join(map(reply.push, [*tokens, None]))
        text = "".join("ab"[token] for token in tokens)
        ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
        whole = text[:min(ends, default=None)] if ends else text  # what was read when it ended
        assert said == whole[:min((whole.find(s) for s in stops if s in whole), default=None)]
    reply, begin = api.Reply(letters, ["b" * 100_000]), time.monotonic()
    assert [reply.push(0) for _ in range(20)] == ["a"] * 20 and time.monotonic() - begin < 1


def test_langchain_works_unchanged(server, tiny):
    """ChatOpenAI, which says max_completion_tokens: whole, streamed, several at once."""
    langchain = pytest.importorskip("langchain_openai", reason="pip install langchain-openai")
    chat = langchain.ChatOpenAI(base_url=server.url + "/v1", api_key="none", model="any",
                                temperature=0, max_tokens=20, max_retries=0)
    expected = alone(tiny, HI, 20)
    said = chat.invoke(HI)
    assert said.content == expected
    assert said.usage_metadata["input_tokens"] == len(
        render(tiny.tok, HI, add_generation_prompt=True)[0])
    assert "".join(part.content for part in chat.stream(HI)) == expected
    assert [one.content for one in chat.batch([HI, HI])] == [expected] * 2
    with pytest.raises(Exception, match="a prompt has 1 to 255 tokens, not 1,0"):
        chat.invoke("x" * 1000)


def test_eight_clients_get_what_each_gets_alone(server, tiny):
    questions = [[{"role": "user", "content": "Who is " + "ABCDEFGH"[i] * (3 * i + 1)}]
                 for i in range(8)]

    def ask(messages):
        return call(server, "/v1/chat/completions", {"messages": messages, "temperature": 0,
                                                     "max_tokens": 40})[1]
    with ThreadPoolExecutor(8) as pool:
        found = [*pool.map(ask, questions)]
    for messages, one in zip(questions, found):
        assert one["choices"][0]["message"]["content"] == alone(tiny, messages, 40)


@pytest.mark.parametrize("path, body, headers, status, said", [
    ("/none", None, {}, 404, "Not Found"),
    ("/v1/completions", None, {}, 405, "Method Not Allowed"),
    ("/v1/completions", b"{", {}, 400, "the body is not JSON"),
    ("/v1/completions", b"[" * 30_000, {}, 400, "the body is not JSON"),
    ("/v1/completions", b"[]", {}, 400, "a JSON object"),
    ("/v1/completions", {}, {}, 400, "a prompt has 1 to 255 tokens, not 0"),
    ("/v1/completions", {"prompt": "x" * 10**5}, {}, 413, "65,536 bytes"),
    ("/v1/completions", {"prompt": "a"}, {"Content_Type": "text/plain"}, 415, "application/json"),
    ("/v1/completions", {"prompt": "a"}, {"Host": "evil.example"}, 403, "Host"),
    ("/v1/completions", {"prompt": "a", "temperature": "hot"}, {}, 400, "temperature must be"),
    ("/v1/completions", {"prompt": "a", "temperature": float("nan")}, {}, 400, "temperature"),
    ("/v1/completions", {"prompt": "a", "max_tokens": 1.5}, {}, 400, "max_tokens must be an int"),
    ("/v1/completions", {"prompt": "a", "n": True}, {}, 400, "n must be an integer"),
    ("/v1/completions", {"prompt": "a", "stop": [""]}, {}, 400, "stop must be a string"),
    ("/v1/completions", {"prompt": "a", "logit_bias": {"1": 5}}, {}, 400, "not supported"),
    ("/v1/chat/completions", {"messages": []}, {}, 400, "at least one message"),
    ("/v1/chat/completions", {"messages": [{"role": "robot", "content": "a"}]}, {}, 400, "role"),
    ("/v1/chat/completions", {"messages": [*HI, {"role": "assistant", "content": "a"}]}, {}, 400,
     "user"),
    ("/v1/embeddings", {"input": "a"}, {}, 400, "without --embed"),
    ("/upload", {"text": "a"}, {}, 400, "without --upload")])
def test_a_request_that_cannot_be_answered(server, path, body, headers, status, said):
    found, reply = call(server, path, body, **headers)
    assert (found, set(reply["error"])) == (status, {"message", "type", "param", "code"})
    assert said in reply["error"]["message"]


def test_too_many_at_once_are_refused_and_the_rest_are_answered(server):
    def ask(i: int) -> int:
        return call(server, "/v1/completions", {"prompt": f"{i} is", "max_tokens": 200})[0]
    with ThreadPoolExecutor(40) as pool:
        found = [*pool.map(ask, range(40))]
    assert set(found) == {200, 429}


def test_a_client_that_hangs_up_frees_its_row(server):
    """200 of them, streamed or not, in the middle of a reply or before it begins. Seen to fail when
    `let_go` left the texts in the batch: each was then written to its end."""
    def so_far() -> tuple[float, float]:
        return figure(server, "tokens_written"), figure(server, "requests_answered")
    written, begun = so_far()
    for i in range(200):
        body = json.dumps({"prompt": f"{i}", "max_tokens": 200, "stream": i % 2 == 0}).encode()
        with socket.create_connection(("127.0.0.1", server.port)) as s:
            s.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: "
                      b"application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
            if i % 4 == 0:
                s.recv(100)
    for _ in range(200):
        if figure(server, "texts_writing") == figure(server, "texts_waiting") == 0:
            break
        time.sleep(0.05)
    else:
        raise AssertionError("rows are still taken")
    more, texts = so_far()
    assert more - written < 100 * (texts - begun)  # of 200 tokens each
    assert call(server, "/v1/completions", {"prompt": "a", "max_tokens": 2})[0] == 200


@pytest.mark.parametrize("n", [300, pytest.param(5000, marks=pytest.mark.slow)])
def test_noise_is_never_an_error_of_the_server(server, n):
    """Random requests from 8 clients, half of them nearly right: no error of the server, no answer
    later than in 60 s, no memory that grows. Seen to fail when a number too large for float()
    was let through."""
    values = [None, True, -1, 0, 3, 1e400, "a", "", [], ["a"], {}, {"role": "user"}, [HI[0]],
              "\ud800", "x" * 500, 2**70, 10**400, [[]], "\0"]
    names = ["prompt", "messages", "temperature", "top_p", "top_k", "stop", "seed", "n",
             "max_tokens", "logprobs", "stream_options", "chat_template_kwargs", "tools"]

    def ask(i: int) -> int:
        r = random.Random(i)
        body = {r.choice(names): r.choice(values) for _ in range(r.randrange(6))}
        body |= r.choice([{}, {"messages": HI}, {"prompt": "a"}]) | {"max_tokens": 2}
        return call(server, r.choice(["/v1/chat/completions", "/v1/completions"]), body)[0]

    def memory() -> int:
        status = Path(f"/proc/{server.process.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0])  # kB

    with ThreadPoolExecutor(8) as pool:
        assert {*pool.map(ask, range(100))} <= {200, 400, 429}
        before = memory()
        assert {*pool.map(ask, range(100, n))} <= {200, 400, 429}
    assert memory() < before + 50_000


@pytest.fixture(scope="module")
def librarian(tiny, tmp_path_factory):
    """A server that answers from notes, takes uploads and wants a key."""
    folder = tmp_path_factory.mktemp("library")
    for name, text in NOTES.items():
        (folder / name).write_text(text, "utf-8")
    add = [sys.executable, "rag.py", "add", str(folder), f"--index={folder}/.index"]
    subprocess.run(add, cwd=ROOT, check=True, capture_output=True)
    server = start(f"--checkpoint={tiny.pt}", f"--index={folder}/.index",
                   f"--upload={folder}/uploaded", KHAOSZ_API_KEY="secret")
    server.folder = folder
    yield server
    end(server)


def test_answers_from_documents_name_their_sources(librarian):
    def ask(question: str) -> dict:
        status, reply = call(librarian, "/v1/chat/completions", {"messages": [
            {"role": "user", "content": question}]}, Authorization="Bearer secret")
        assert status == 200, reply
        return reply
    found = ask("Where is the spare key?")["sources"][0]
    assert "spare key hangs" in found["text"] and found["path"].endswith("bike.md")
    nothing = ask("Who won the chess match?")
    assert nothing["sources"] == []
    assert nothing["choices"][0]["message"]["content"] == "Not found in the documents."
    status, _ = call(librarian, "/upload", {"text": "The chess match was won by Vera."},
                     Authorization="Bearer secret")
    assert status == 200
    assert "Vera" in ask("Who won the chess match?")["sources"][0]["text"]
    names = [path.name for path in (librarian.folder / "uploaded").iterdir()]
    assert re.fullmatch(r"note-[0-9a-f]{16}\.md", *names)


def test_what_an_answer_from_documents_does_not_have_is_refused(librarian):
    """n, stop and logprobs were dropped in silence, and max_completion_tokens had no limit."""
    def ask(**more) -> tuple[int, dict]:
        body = {"messages": [{"role": "user", "content": "Where is the spare key?"}]} | more
        return call(librarian, "/v1/chat/completions", body, Authorization="Bearer secret")
    for name, value in {"n": 2, "stop": "x", "logprobs": True}.items():
        status, reply = ask(**{name: value})
        assert (status, reply["error"]["message"]) == (400, f"{name} is not supported")
    for most, limit in ((10**6, 64), (3, 3)):  # never more than a quarter of 256 tokens
        status, reply = ask(n=1, stop=None, logprobs=False, max_completion_tokens=most)
        assert status == 200 and reply["usage"]["completion_tokens"] <= limit


class Note:
    """A request to take in a note."""
    headers = {"content-type": "application/json"}

    def __init__(self, text: str):
        self.text = text

    async def body(self) -> str:
        return json.dumps({"text": self.text})


def shelf(folder: Path, **settings) -> SimpleNamespace:
    """A server without a model, that answers from an index of `docs` and takes notes to `notes`."""
    import serve
    cfg = rag.Config(index=str(folder / "index"), max_file_mb=1)
    rag.change("add", [str(folder / "docs")], replace(cfg, **settings))
    server = serve.Server.__new__(serve.Server)
    vars(server).update(cfg=SimpleNamespace(upload=str(folder / "notes"), waiting=11), rag=cfg,
                        embed=None, index=rag.open_index(cfg), adding=asyncio.Lock(), answered=0)
    return server


def content(index: Index) -> dict[str, list[str]]:
    """The texts of the chunks of each document, by its name."""
    return {Path(name).name: [index.chunk(i).text for i in range(first, first + n)]
            for name, (_, first, n) in index.manifest["documents"].items()}


def test_a_note_costs_no_other_document(tmp_path, capsys):
    """The whole index was brought up to date with the server's settings: cut anew, without what is
    larger than its --max_file_mb, and with what had been removed from the folder of the notes."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/large.md").write_text("The treasure lies under the oak.\n" * 40_000)
    (tmp_path / "docs/small.md").write_text(" ".join(f"Sentence {i} is here." for i in range(60)))
    (tmp_path / "docs/secret.md").write_text("My pin is 4417.")
    server = shelf(tmp_path, max_file_mb=2, chunk_tokens=64)
    server.cfg.upload = str(tmp_path / "docs")
    rag.change("remove", [str(tmp_path / "docs/secret.md")], server.rag)
    before = content(rag.open_index(server.rag))
    assert set(before) == {"large.md", "small.md"} and len(before["small.md"]) > 3
    for text in ("Vera won at chess.", "Vera lost at chess.", "Vera won at chess."):
        assert asyncio.run(server.upload(Note(text))).status_code == 200
    after = content(server.index)
    notes = {name: after.pop(name) for name in list(after) if name.startswith("note-")}
    assert after == before
    assert sorted(notes.values()) == [["Vera lost at chess."], ["Vera won at chess."]]


def test_a_note_is_a_document_like_any_other(tmp_path, capsys):
    """`rag.py add` finds it unchanged, and what `rag.py remove` forgot can be sent again."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/a.md").write_text("The key hangs in the kitchen.")
    server = shelf(tmp_path)
    asyncio.run(server.upload(Note("Vera won at chess.")))
    note, = (tmp_path / "notes").iterdir()
    capsys.readouterr()
    rag.change("add", [str(tmp_path / "notes")], server.rag)
    assert ": 2 unchanged; 2 chunks of 2 documents" in capsys.readouterr().out
    rag.change("remove", [str(note)], server.rag)
    asyncio.run(server.upload(Note("Vera won at chess.")))
    assert server.index.search("Who won at chess?", 1)[0].chunk.doc == str(note)
    os.utime(note, (1, 1))
    capsys.readouterr()
    rag.open_index(server.rag)
    assert "changed: 1; new files in their folders: 0" in capsys.readouterr().err


def test_notes_that_come_at_once_are_all_taken_in_or_leave_nothing(tmp_path, monkeypatch):
    """Two at once, or one while `rag.py add` ran, were an error of the server, and stayed in the
    folder."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/a.md").write_text("The key hangs in the kitchen.")
    server = shelf(tmp_path)

    async def send(n: int) -> list:
        return await asyncio.gather(*(server.upload(Note(f"Note number {i}.")) for i in range(n)))
    assert [reply.status_code for reply in asyncio.run(send(4))] == [200] * 4
    there = sorted((tmp_path / "notes").iterdir())
    assert len(there) == 4 and len(content(server.index)) == 5
    with Index(server.rag.index, writable=True), pytest.raises(api.Refused) as refused:
        asyncio.run(server.upload(Note("One more.")))
    assert (refused.value.status_code, sorted((tmp_path / "notes").iterdir())) == (503, there)
    assert "another process is writing" in str(refused.value)

    def fails(self: Index) -> int:
        raise ValueError("the embedder speaks English")
    monkeypatch.setattr(Index, "commit", fails)
    with pytest.raises(api.Refused, match="speaks English"):
        asyncio.run(server.upload(Note("又一条笔记。")))
    assert sorted((tmp_path / "notes").iterdir()) == there


def test_as_many_answers_from_documents_as_there_are_places(tmp_path, tiny):
    """Each held a thread of asyncio's, of which there are 6 on 2 cores, as long as it was written:
    the seventh client was not searched for, and nobody got status 429."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/a.md").write_text("The key hangs in the kitchen.")
    server = shelf(tmp_path)
    batch = Batch(tiny.model, sample, rows=1, window=256, waiting=11)  # nobody runs it
    vars(server).update(model=tiny.model, tok=tiny.tok, window=256, batch=batch)
    asked = api.read_numbers({}, api.OF_DOCUMENTS)

    async def ask() -> None:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(2))
        try:
            for _ in range(12):
                _, pieces, _ = await asyncio.wait_for(server.look_up(
                    [{"role": "user", "content": "Where is the key?"}], asked), 10)
                begun.append(asyncio.ensure_future(anext(pieces)))
                await asyncio.sleep(0.05)
            with pytest.raises(api.Refused, match="11 texts are waiting already"):
                await server.look_up([{"role": "user", "content": "Where is the key?"}], asked)
        finally:
            batch.stop()
            batch.run()  # ends all
        assert len({piece.text for piece in await asyncio.gather(*begun)}) == 1
    begun: list[asyncio.Future] = []
    asyncio.run(ask())


def test_the_key(librarian):
    body = {"messages": HI}
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer \xff"}):
        assert call(librarian, "/v1/chat/completions", body, **headers)[0] == 401
        assert call(librarian, "/upload", {"text": "a"}, **headers)[0] == 401


def test_sigterm_ends_a_stream_and_then_the_server(tiny):
    """Seen to fail with a line of a script that had not yet begun, when the handler of the imports
    was still there: uvicorn raises the signal once more at the end."""
    server = start(f"--checkpoint={tiny.pt}")
    body = json.dumps({"prompt": "a", "max_tokens": 250, "stream": True}).encode()
    request = urllib.request.Request(server.url + "/v1/completions", body,
                                     {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as reply:
        first = reply.readline()
        start_of_end = time.monotonic()
        end(server)
        assert time.monotonic() - start_of_end < 10
        assert first.startswith(b"data: {") and reply.read().endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("settings, said", [
    (["--host=0.0.0.0"], "give an --api_key"), (["--upload=up"], "--upload needs an --index"),
    (["--port=0"], "at least 1"), (["--port=70000"], "0-65535"),
    (["--checkpoint=nowhere"], "nowhere")])
def test_a_mistake_is_one_line(tiny, settings, said):
    done = subprocess.run([sys.executable, "serve.py", f"--checkpoint={tiny.pt}", *settings],
                          cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and said in done.stderr


def test_the_other_address_of_this_computer(tiny):
    """It was let through, and could never be listened at: the port was tried for IPv4."""
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 here")
    server = start(f"--checkpoint={tiny.pt}", "--host=::1")
    assert call(server, "/health") == (200, {"over": False}) and "[::1]" in server.url
    end(server)


def test_without_the_extra_it_names_it():
    code = ("import sys, runpy; sys.modules['uvicorn'] = None; "
            "runpy.run_path('serve.py', run_name='__main__')")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "serve.py needs the extra `serve`: pip install starlette uvicorn\n"
