"""The page of serve.py in a real browser: what is typed, shown, stopped, kept and opened."""
import subprocess
import sys

import pytest

pytest.importorskip("uvicorn", reason="the extra `serve`")
pytest.importorskip("selenium", reason="drives the browser")
from browser import ask, browser, until  # noqa: E402
from test_serve import ROOT, end, start  # noqa: E402


@pytest.fixture(scope="module")
def page():
    try:
        page = browser(500, 900)  # as wide as a telephone
    except RuntimeError as error:
        pytest.skip(str(error))
    yield page
    page.quit()


@pytest.fixture(scope="module")
def url(tiny, tmp_path_factory):
    notes = tmp_path_factory.mktemp("notes")
    (notes / "people.md").write_text("Kimu's fruit is plum.\n\n```\n<b>ls</b> -l\n```\n", "utf-8")
    (notes / "人物.md").write_text("帆岱的号码是93。", "utf-8")
    subprocess.run([sys.executable, "rag.py", "add", str(notes), f"--index={notes}/.index"],
                   cwd=ROOT, check=True, capture_output=True)
    server = start(f"--checkpoint={tiny.pt}", f"--index={notes}/.index", f"--upload={notes}/up")
    yield server.url
    end(server)


@pytest.fixture(scope="module")
def plain(tiny):
    server = start(f"--checkpoint={tiny.pt}")
    yield server.url
    end(server)


def texts(page, selector: str) -> list[str]:
    return [node.text for node in page.find_elements("css selector", selector)]


def test_ask_in_both_languages_and_follow_a_source(page, url):
    page.get(url)
    ask(page, "What is Kimu's fruit?")
    ask(page, "帆岱的号码是多少？")
    assert texts(page, "article.user") == ["What is Kimu's fruit?", "帆岱的号码是多少？"]
    assert len(texts(page, "article.assistant")) == 2
    sources = page.find_elements("css selector", "details.source")
    assert "people.md:1" in sources[0].text and "人物.md:1" in sources[-1].text
    sources[-1].find_element("tag name", "summary").click()
    assert "帆岱的号码是93。" in sources[-1].text
    ask(page, "Who won the chess match?")
    assert "Not found in the documents." in texts(page, "article.assistant")[-1]


def test_what_was_said_is_there_after_a_reload_until_a_new_chat(page, url):
    page.get(url)
    before = texts(page, "article.user")
    assert before
    page.refresh()
    assert texts(page, "article.user") == before
    page.find_element("id", "new").click()
    page.refresh()
    assert texts(page, "article") == []


def test_stream_stop_regenerate(page, plain):
    """The model writes nonsense up to its window, or until Stop."""
    page.get(plain)
    page.find_element("id", "input").send_keys("hi\n")
    until(lambda: page.find_element("id", "stop").is_displayed()
          or page.find_elements("css selector", ".tools"), 10)
    page.execute_script("document.getElementById('stop').click()")
    until(lambda: page.find_element("id", "send").is_displayed(), 20)
    page.find_elements("css selector", ".tools button")[-1].click()
    until(lambda: page.find_element("id", "send").is_displayed()
          and page.find_elements("css selector", ".tools"), 60)
    assert len(texts(page, "article.user")) == len(texts(page, "article.assistant")) == 1


def test_code_is_shown_as_code_and_never_as_html(page, plain):
    page.get(plain)
    page.execute_script("""localStorage.setItem("khaosz", JSON.stringify({ messages: [
        { role: "user", content: "<img src=x onerror='window.hit=1'>" },
        { role: "assistant", content: "see\\n```sh\\nls <b>-l</b>\\n```\\nend <i>x</i>" }] }))""")
    page.refresh()
    assert texts(page, "pre code") == ["ls <b>-l</b>"]
    assert page.find_elements("css selector", "article b, article i, article img") == []
    assert page.execute_script("return window.hit") is None


def test_a_note_goes_into_the_index(page, url, tmp_path):
    note = tmp_path / "chess.md"
    note.write_text("Vera won the chess match.", "utf-8")
    page.get(url)
    page.find_element("id", "more").click()
    page.find_element("id", "note").send_keys(str(note))
    until(lambda: any("in the index" in text for text in texts(page, "article.notice")), 30)
    ask(page, "Who won the chess match?")
    assert "note-" in page.find_elements("css selector", "details.source")[0].text


def test_the_language_of_the_page(page, plain):
    page.get(plain)
    page.find_element("id", "lang").click()
    assert page.find_element("id", "send").get_attribute("textContent") == "发送"
    page.find_element("id", "lang").click()
    assert page.find_element("id", "send").get_attribute("textContent") == "Send"
