"""PDF, Word, HTML and EPUB files become text with its structure and its place. The files are made
here, by hand, and say what the test expects of them."""
import io
import sys
import zipfile

import pytest

import rag
from bench import documents
from search import readers
from search.documents import READERS, chunks_of, find_documents

needs = {".pdf": "pypdf", ".docx": "mammoth", ".html": "markdownify", ".epub": "markdownify"}


@pytest.fixture(autouse=True)
def extra():
    for name in needs.values():
        pytest.importorskip(name, reason="the extra `documents`")


def pdf(*pages: str) -> bytes:
    """A PDF with a line of text on each page; "" is a page without text."""
    objects = ["<< /Type /Catalog /Pages 2 0 R >>", f"<< /Type /Pages /Count {len(pages)} /Kids "
               f"[{' '.join(f'{4 + 2 * i} 0 R' for i in range(len(pages)))}] >>",
               "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>"]
    for i, text in enumerate(pages):
        stream = "".join(f"BT /F1 12 Tf 72 {700 - 20 * n} Td ({line}) Tj ET\n"
                         for n, line in enumerate(text.split("\n")) if line)
        objects += ["<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] "
                    f"/Contents {5 + 2 * i} 0 R /Resources << /Font << /F1 3 0 R >> >> >>",
                    f"<< /Length {len(stream)} >>\nstream\n{stream}endstream"]
    out, places = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        places.append(len(out))
        out += f"{number} 0 obj\n{body}\nendobj\n".encode()
    table = "".join(f"{place:010d} 00000 n \n" for place in places)
    return out + (f"xref\n0 {len(places) + 1}\n0000000000 65535 f \n{table}trailer << /Size "
                  f"{len(places) + 1} /Root 1 0 R >>\nstartxref\n{len(out)}\n%%EOF").encode()


def archive(files: dict[str, str | bytes]) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as z:
        for name, text in files.items():
            z.writestr(name, text)
    return made.getvalue()


def test_a_page_without_a_heading_is_called_after_its_file(tmp_path):
    """It was called after its whole path, whose words every question found in every chunk."""
    (tmp_path / "paper.pdf").write_bytes(pdf("The pump is blue."))
    cut = rag.cutter(rag.Config(), None)
    assert [chunk.crumb for chunk in chunks_of([str(tmp_path / "paper.pdf")], cut)] == ["paper"]


def test_questions_are_counted_by_the_page_that_answers(tmp_path, rag_py, monkeypatch, capsys):
    (tmp_path / "paper.pdf").write_bytes(pdf("The pump is blue.", "The lamp is red."))
    (tmp_path / "page.html").write_text("<h1>Bins</h1><p>The bins are emptied on Friday.</p>")
    (tmp_path / "q.tsv").write_text("paper.pdf:p2\tWhat is red?\npaper.pdf:p1\tThe lamp?\n"
                                    "page.html\tWhen are the bins emptied?\n")
    rag_py("add", tmp_path, f"--index={tmp_path}/ix")
    monkeypatch.setattr(sys, "argv", ["x", f"--index={tmp_path}/ix",
                                      f"--questions={tmp_path}/q.tsv"])
    documents.main()
    assert capsys.readouterr().out.splitlines()[-2:] == ["| .pdf | 2 | 1 | 2 |",
                                                         "| .html | 1 | 1 | 1 |"]


W = 'xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"'
WORD = {
    "[Content_Types].xml": '<Types xmlns="http://schemas.openxmlformats.org/package/2006/content-'
    'types"><Default Extension="xml" ContentType="application/xml"/></Types>',
    "_rels/.rels": '<Relationships xmlns="http://schemas.openxmlformats.org/package/2006/relation'
    'ships"><Relationship Id="r1" Type="http://schemas.openxmlformats.org/officeDocument/2006/rela'
    'tionships/officeDocument" Target="word/document.xml"/></Relationships>',
    "word/document.xml": f'<w:document {W}><w:body><w:p><w:pPr><w:pStyle w:val="Heading1"/></w:pPr>'
    "<w:r><w:t>Boiler</w:t></w:r></w:p><w:p><w:r><w:t>F28 means 没有燃气.</w:t></w:r></w:p>"
    "</w:body></w:document>",
    "word/styles.xml": f'<w:styles {W}><w:style w:type="paragraph" w:styleId="Heading1"><w:name '
    'w:val="heading 1"/></w:style></w:styles>',
    "word/_rels/document.xml.rels": '<Relationships xmlns="http://schemas.openxmlformats.org/package'
    '/2006/relationships"><Relationship Id="r2" Type="http://schemas.openxmlformats.org/officeDocum'
    'ent/2006/relationships/styles" Target="styles.xml"/></Relationships>'}
BOOK = {
    "META-INF/container.xml": '<container><rootfile full-path="in/book.opf"/></container>',
    "in/book.opf": '<package xmlns="http://www.idpf.org/2007/opf"><manifest><item id="b" href='
    '"two.xhtml"/><item id="a" href="one%20.xhtml"/></manifest><spine><itemref idref="a"/>'
    '<itemref idref="b"/></spine></package>',
    "in/one .xhtml": "<html><body><h1>Start</h1><p>It begins.</p></body></html>",
    "in/two.xhtml": "<html><body><h1>End</h1><p>The fox wins.</p></body></html>"}
PAGE = """<html><head><title>Tea</title><style>p {}</style></head><body><nav>Home</nav>
<h1>Tea</h1><h2>绿茶</h2><p>水温八十度。</p><table><tr><th>kind</th><th>minutes</th></tr>
<tr><td>green</td><td>3</td></tr></table><script>alert(1)</script></body></html>"""


def test_pages_of_a_pdf():
    raw = pdf("The first page.", "", "A word that was bro-\nken in two.")
    assert [(n, text.strip()) for n, text in readers.parts("a.PDF", raw)] == [
        (1, "The first page."), (2, ""), (3, "A word that was broken in two.")]


def test_headings_and_tables():
    (one, text), = readers.parts("a.docx", archive(WORD))
    assert (one, text) == (1, "# Boiler\n\nF28 means 没有燃气.")
    (_, text), = readers.parts("a.html", PAGE.encode())
    assert text.startswith("# Tea\n\n## 绿茶\n\n水温八十度。")
    assert "| green | 3 |" in text and "alert" not in text and "Home" not in text
    (_, text), = readers.parts("a.htm", PAGE.replace("绿茶", "绿茶").encode("gb18030").replace(
        b"<head>", b'<head><meta charset="gb18030">'))
    assert "## 绿茶" in text  # the page says its encoding
    assert readers.parts("a.epub", archive(BOOK)) == [
        (1, "# Start\n\nIt begins."), (2, "# End\n\nThe fox wins.")]


@pytest.mark.parametrize("page, text", [
    ("<article><h2>A</h2>1</article><article><h2>B</h2>2</article>", "## A\n\n1\n\n## B\n\n2"),
    ("<p>around</p><article>one</article>", "one"),
    ("<p>around</p><main><article>one</article><article>two</article></main>", "one\n\ntwo"),
    ("<form action='.'><h1>T</h1><p>All of an ASP.NET page <input value=x>"
     "<select><option>red</option></select><button>Go</button></p><textarea>a</textarea></form>",
     "# T\n\nAll of an ASP.NET page")])
def test_no_text_of_a_page_is_lost(page, text):
    """Of a blog only the first article was indexed, and nothing of a page that is all one form."""
    (_, found), = readers.parts("a.html", f"<html><body>{page}</body></html>".encode())
    assert found == text


def test_answers_name_page_and_chapter(tmp_path, capsys, monkeypatch):
    """From the files to `rag.py ask`; a second `add` finds them unchanged."""
    for name, raw in {"a.pdf": pdf("Nothing here.", "The key is under the mat."),
                      "b.epub": archive(BOOK), "c.docx": archive(WORD),
                      "d.html": PAGE.encode()}.items():
        (tmp_path / name).write_bytes(raw)
    monkeypatch.chdir(tmp_path)
    cfg = rag.Config(index=str(tmp_path / ".index"))
    rag.change("add", [str(tmp_path)], cfg)
    assert "4 new" in capsys.readouterr().out
    rag.change("add", [str(tmp_path)], cfg)
    assert "4 unchanged" in capsys.readouterr().out
    for question, place in [("Where is the key, under the mat?", "a.pdf:p2  "),
                            ("Which fox wins?", "b.epub:ch2  End"),
                            ("什么是没有燃气？", "c.docx  Boiler"),
                            ("绿茶的水温是多少度？", "d.html  Tea > 绿茶")]:
        assert rag.location(rag.answer(question, cfg).sources[0]).startswith(place)


@pytest.mark.parametrize("name, raw, said", [
    ("a.pdf", b"no pdf", "damaged"), ("a.docx", b"no zip", "damaged"), ("a.epub", b"", "damaged"),
    ("a.pdf", pdf("", ""), "2 pages without text, scanned perhaps"),
    ("a.pdf", pdf("text")[:300], "damaged|without text"),
    ("a.epub", archive({"mimetype": "x"}), "damaged"),
    ("a.epub", archive(BOOK | {"in/book.opf": "<!DOCTYPE a [<!ENTITY b 'c'>]><a>&b;</a>"}),
     "declares entities"),
    ("a.docx", archive({"word/document.xml": bytes(600 << 20)}), "unpacks to more than 500 MB")],
    ids=lambda x: x if isinstance(x, str) else "")
def test_what_cannot_be_read_is_named(tmp_path, capsys, name, raw, said):
    with pytest.raises(ValueError, match=said):
        readers.parts(name, raw)
    (tmp_path / name).write_bytes(raw)
    assert list(chunks_of([str(tmp_path)], lambda text, doc: [])) == []
    assert capsys.readouterr().err.count("\n") == 1


def test_an_encrypted_pdf():
    import pypdf
    writer, made = pypdf.PdfWriter(io.BytesIO(pdf("secret"))), io.BytesIO()
    writer.encrypt("password", algorithm="RC4-128")
    writer.write(made)
    with pytest.raises(ValueError, match="encrypted"):
        readers.parts("a.pdf", made.getvalue())


def test_without_the_extra_each_file_is_passed_over_with_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pypdf", None)
    with pytest.raises(ValueError, match="needs pip install pypdf mammoth markdownify"):
        readers.parts("a.pdf", pdf("a"))
    (tmp_path / "a.pdf").write_bytes(pdf("a"))
    assert len(find_documents([str(tmp_path)])[0]) == 1 and ".pdf" in READERS
