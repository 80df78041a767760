"""Answers written by a server of the user's, and documents as tools of an assistant."""
import asyncio
import http.server
import json
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
from notes import NOTES

import rag
from search.writer import written

ROOT = Path(rag.__file__).parent


@contextmanager
def server(answer):
    """A server on a free port that does `answer(handler, body)`; its URL."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append((self.path, self.headers.get("Authorization"), body))
            answer(self)

        def log_message(self, *args):
            pass

    asked = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as s:
        threading.Thread(target=s.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{s.server_port}/v1", asked
        s.shutdown()


def says(*pieces: str, status: int = 200, raw: bytes | None = None):
    """An answer of a server: a stream of these pieces, or raw bytes."""
    def answer(handler):
        handler.send_response(status)
        handler.end_headers()
        for piece in pieces:
            event = {"choices": [{"delta": {"content": piece}}]}
            handler.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
        handler.wfile.write(b"data: [DONE]\n\n" if raw is None else raw)
    return answer


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("library")
    for name, text in NOTES.items():
        (folder / name).write_text(text, "utf-8")
    rag.change("add", [str(folder)], rag.Config(index=f"{folder}/.index"))
    return f"{folder}/.index"


def test_a_server_answers_with_our_prompt_our_check_and_our_refusal(index, monkeypatch):
    """The citation [9] names no source and is dropped, also where it comes in pieces; nothing is
    sent for a question that no note bears on."""
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with server(says("It hangs behind the ca", "lendar [", "1] [9", "].")) as (url, asked):
        cfg, grown = rag.Config(index=index, writer=f"{url}#small", max_tokens=50), []
        said = rag.answer("Where is the spare key?", cfg, on_text=grown.append)
        assert said.text == "".join(grown) == "It hangs behind the calendar [1] ."
        assert said.cited == [1] and said.invalid_citations == [9] and said.grounded
        (path, key, body), = asked
        assert (path, key) == ("/v1/chat/completions", "Bearer secret")
        assert body["model"] == "small" and body["temperature"] == 0 and body["max_tokens"] == 50
        system, question = body["messages"]
        assert "Answer only from the numbered sources" in system["content"]
        assert "[1] " in question["content"] and "spare key hangs" in question["content"]
        refused = rag.answer("Who won the chess match?", cfg)
        assert refused.text == "Not found in the documents." and len(asked) == 1


@pytest.mark.parametrize("answer, said", [
    (says(status=404, raw=b'{"error": "no model"}'), "404"),
    (says(raw=b"data: {}\n\n"), "not a stream of OpenAI's"),
    (says(raw=b'data: {"choices": [{"delta": 3}]}\n\n'), "not a stream of OpenAI's"),
    (says(raw=b"data: nonsense\n\n"), "Expecting value"),
    (says("The key does not", raw=b""), "broke off: data: .*The key does not"),
    (says("The key", raw=b'data: {"error": "out of memory"}\n\n'), "out of memory"),
    (says(raw=b'{"choices": [{"message": {"content": "All of it"}}]}\n'), "no stream|All of it"),
    (says(raw=b"<html>\nLog in\n"), "not a stream of OpenAI's .*Log in"), (says(raw=b""), "not a")])
def test_a_server_that_fails_is_one_line(answer, said):
    with server(answer) as (url, _), pytest.raises(ValueError, match=said) as error:
        list(written(url, [], 5))
    assert url in str(error.value) and "\n" not in str(error.value)


def test_a_reply_is_whole_with_done_or_with_a_reason_to_end():
    """Some servers send one of them only. An answer that broke off, which sends none, was shown as
    a whole one, and what is no stream as an empty one: see the failures above."""
    end = b'data: {"choices": [{"delta": {}, "finish_reason": "length"}]}\n\n'
    usage = b'data: {"choices": [], "usage": {"total_tokens": 9}}\n\n'
    for raw in (b"data: [DONE]\n\n", end, end + usage, end + b"data: [DONE]\n\n", b"data:[DONE]"):
        with server(says("The key ", "hangs.", raw=raw)) as (url, _):
            assert "".join(written(url, [], 5)) == "The key hangs."


def test_no_server_is_one_line_and_the_first_line_says_where_the_sources_go(index):
    done = subprocess.run([sys.executable, "rag.py", "ask", "Where is the spare key?",
                           f"--index={index}", "--writer=http://127.0.0.1:9/v1"],
                          cwd=ROOT, capture_output=True, text=True)
    first, last = done.stderr.splitlines()
    assert first == "questions, with the sources found, are sent to http://127.0.0.1:9/v1"
    assert done.returncode == 2 and last.startswith("http://127.0.0.1:9/v1: ") and not done.stdout


def test_the_tools_with_the_client_of_the_sdk(index):
    """Search and answer over stdio, as an assistant would call them."""
    pytest.importorskip("mcp", reason="the extra `mcp`")
    from mcp import ClientSession, StdioServerParameters
    from mcp.client.stdio import stdio_client

    async def talk() -> tuple:
        server = StdioServerParameters(command=sys.executable, cwd=str(ROOT), args=[
            "rag.py", "mcp", f"--index={index}"])
        async with stdio_client(server) as streams, ClientSession(*streams) as session:
            await session.initialize()
            tools = {tool.name for tool in (await session.list_tools()).tools}
            found = await session.call_tool("search", {"question": "spare key", "most": 1})
            said = await session.call_tool("answer", {"question": "备用电池放在哪里？"})
            none = await session.call_tool("answer", {"question": "Who won the chess match?"})
            return tools, *("".join(part.text for part in reply.content)
                            for reply in (found, said, none))

    tools, found, said, none = asyncio.run(asyncio.wait_for(talk(), 120))
    assert tools == {"search", "answer"}
    assert "spare key hangs" in found and "bike.md:" in found
    assert "灰色的小包" in said and "相机.md:" in said
    assert "Not found in the documents." in none


def test_without_the_sdk_it_names_it(index):
    code = ("import sys; sys.modules['mcp'] = None; import rag; "
            f"sys.argv[1:] = ['mcp', '--index={index}']; rag.main()")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "pip install mcp" in done.stderr
