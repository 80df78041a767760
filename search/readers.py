"""
PDF, Word, HTML and EPUB files as Markdown, so that they are cut at their structure like any other
text. The parsers are the extra `documents`: pip install pypdf mammoth markdownify

    parts("paper.pdf", raw)      [(1, "text of the first page"), (2, "…")]
    parts("book.epub", raw)      [(1, "# The first chapter …"), …]
    parts("page.html", raw)      [(1, "# A heading …")]
"""
import io
import logging
import posixpath
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote
from xml.etree import ElementTree

MOST = 500 << 20  # bytes that a file may unpack to
NOISE = ("script", "style", "template", "noscript", "nav", "svg", "iframe", "form")  # no content
Parts = list[tuple[int, str]]


def pdf(raw: bytes) -> Parts:
    """The text of each page. Lines that a word was broken at become one again."""
    import pypdf
    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # it mends what it complains of
    reader = pypdf.PdfReader(io.BytesIO(raw))
    if reader.is_encrypted and not reader.decrypt(""):
        raise ValueError("encrypted: save it without a password first")
    pages = [re.sub(r"(?<=[a-z])[-\u00ad]\n(?=[a-z])", "", page.extract_text())
             for page in reader.pages]
    if not any(page.strip() for page in pages):
        raise ValueError(f"{len(pages)} pages without text, scanned perhaps: a program for OCR, "
                         "such as ocrmypdf, can add it")
    return list(enumerate(pages, 1))


def docx(raw: bytes) -> Parts:
    import mammoth
    check_size(zipfile.ZipFile(io.BytesIO(raw)))
    return [(1, markdown(mammoth.convert_to_html(io.BytesIO(raw)).value))]


def html(raw: bytes) -> Parts:
    return [(1, markdown(raw))]


def epub(raw: bytes) -> Parts:
    """The chapters in the order in which they are to be read."""
    book = zipfile.ZipFile(io.BytesIO(raw))
    check_size(book)
    root = next(tag.get("full-path", "") for tag in tree(book, "META-INF/container.xml").iter()
                if tag.tag.endswith("rootfile"))
    package = tree(book, root)
    files = {tag.get("id"): posixpath.join(posixpath.dirname(root), unquote(tag.get("href", "")))
             for tag in package.iter() if tag.tag.endswith("}item")}
    order = [files[tag.get("idref")] for tag in package.iter() if tag.tag.endswith("}itemref")]
    return [(i, markdown(book.read(posixpath.normpath(name)))) for i, name in enumerate(order, 1)]


def tree(book: zipfile.ZipFile, name: str) -> ElementTree.Element:
    raw = book.read(name)
    if b"<!ENTITY" in raw:  # could unfold without end
        raise ValueError(f"{name} declares entities")
    return ElementTree.fromstring(raw)


def markdown(source: str | bytes) -> str:
    """HTML as Markdown, without what a reader of the page does not read."""
    from bs4 import BeautifulSoup
    from markdownify import MarkdownConverter
    soup = BeautifulSoup(source, "html.parser")
    for tag in soup(NOISE):
        tag.decompose()
    body = soup.find("main") or soup.find("article") or soup.body or soup
    text = MarkdownConverter(heading_style="ATX", strip=["img", "a"]).convert_soup(body)
    text = re.sub(r"\n{3,}", "\n\n", text).strip()
    title = soup.title.get_text(" ", strip=True) if soup.title else ""
    return text if re.search(r"^# ", text, re.M) or not title else f"# {title}\n\n{text}"


def check_size(archive: zipfile.ZipFile) -> None:
    if sum(file.file_size for file in archive.infolist()) > MOST:
        raise ValueError(f"unpacks to more than {MOST >> 20} MB")


PLACES = {".pdf": ":p{}", ".epub": ":ch{}", ".docx": "", ".html": "", ".htm": ""}  # for path:line
READERS: dict[str, Callable[[bytes], Parts]] = {
    ".pdf": pdf, ".docx": docx, ".html": html, ".htm": html, ".epub": epub}


def parts(name: str, raw: bytes) -> Parts:
    """(number of the page or chapter, its text) of a file of READERS. Raises ValueError."""
    try:
        return READERS[Path(name).suffix.lower()](raw)
    except ImportError as error:
        raise ValueError(f"needs pip install pypdf mammoth markdownify ({error.name})") from None
    except ValueError:
        raise
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except Exception as error:  # whatever a damaged file makes a parser say
        raise ValueError(f"damaged, or not what its name says: {error!r:.80}") from None
