"""An embedding server that answers in its own way, and the index made with it."""
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

import rag
from search.embed import openai_style, vectors_in

ROWS = [{"index": 1, "embedding": [0.0, 1.0]}, {"index": 0, "embedding": [1.0, 0.0]}]


@pytest.fixture
def server():
    """(its address, what it answers): status and body, for all requests from now on."""
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["content-length"]))
            status, body = answers[0]
            self.send_response(status)
            self.send_header("content-length", str(len(body) + 9 * (status == 206)))  # cut off
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    answers = [(200, b"")]
    made = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{made.server_port}/v1#m", answers
    made.shutdown()
    made.server_close()


def test_remove_needs_no_embed(server, monkeypatch, capsys, tmp_path):
    """`rag.py remove` of an index with vectors asked for --embed, though it embeds nothing: without
    the server a note could not be forgotten."""
    url, answers = server
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"The key of {name} is here.")
    answers[0] = 200, json.dumps({"data": [{"embedding": [0.0, 1.0]}]}).encode()
    monkeypatch.setattr(rag.embed, "load", lambda name, device: (
        openai_style(name) if name else None))
    monkeypatch.setattr("search.index.check_language", lambda *args: None)

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["rag.py", *words, f"--index={tmp_path}/ix"])
        rag.main()
        return capsys.readouterr().out
    call("add", f"{tmp_path}/a.txt", f"--embed={url}")
    call("add", f"{tmp_path}/b.txt", f"--embed={url}")
    answers[0] = 500, b"the server must not be asked"
    assert "1 forgotten; 1 chunks of 1 documents" in call("remove", f"{tmp_path}/a.txt")


def test_rows_are_taken_in_the_order_of_their_index_or_as_they_come():
    assert vectors_in({"data": ROWS}, 2).tolist() == [[1, 0], [0, 1]]
    bare = [{"embedding": row["embedding"]} for row in ROWS]
    assert vectors_in({"data": bare}, 2).tolist() == [[0, 1], [1, 0]]


@pytest.mark.parametrize("reply", [
    ROWS, {"data": None}, {"data": ROWS[:1]}, {"data": {}}, {"data": "x"}, None, 3, {},
    {"error": {"message": "model not loaded"}}, {"data": [None, None]},
    {"data": [{"embedding": None}] * 2}, {"data": [{"embedding": "AAAA"}] * 2},
    {"data": [{"embedding": [[0.0, 1.0]]}] * 2},
    {"data": [{"embedding": [1.0]}, {"embedding": []}]},
    {"data": [{"index": None, "embedding": [1.0]}, {"index": 0, "embedding": [1.0]}]}], ids=repr)
def test_any_other_reply_is_one_line(reply, server):
    """llama.cpp without /v1 sends a list, others no index, null, or an error with status 200: each
    ended in a traceback, or in the word 'data'."""
    url, answers = server
    answers[0] = 200, json.dumps(reply).encode()
    with pytest.raises(ValueError) as error:
        openai_style(url)(["a", "b"], "query")
    said = str(error.value)
    assert said.startswith(url[:-2] + ": wanted") and "with 2 vectors, got " in said
    assert "\n" not in said and len(said) < 400


@pytest.mark.parametrize("status, body, why", [
    (200, b"<html>", "Expecting value"), (200, b"[" * 100_000, "recursion"),
    (200, b"\xff", "utf-8"), (206, b"{}", "IncompleteRead"),
    (400, b'{"error": "too\nlong"}', 'HTTP Error 400.*too'),
    (429, b"slow down", "429.*slow down")])
def test_what_is_no_reply_is_one_line_too(status, body, why, server, monkeypatch, capsys, tmp_path):
    url, answers = server
    answers[0] = status, body
    (tmp_path / "a.txt").write_text("The key is here.")
    monkeypatch.setattr(sys, "argv", ["rag.py", "add", f"{tmp_path}/a.txt", f"--embed={url}",
                                      f"--index={tmp_path}/ix"])
    with pytest.raises(SystemExit) as exit_:
        rag.main()
    said = capsys.readouterr().err
    assert exit_.value.code == 2 and len(said.splitlines()) == 1 and url[:-2] in said
    assert all(part.lower() in said.lower() for part in why.split(".*"))
