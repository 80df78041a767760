"""
The bytes of a file as text. PDF, Word, HTML and EPUB become Markdown, so that they are cut at their
structure like any other text. The parsers are the extra `documents`: pip install pypdf mammoth
markdownify. Text may be UTF-8, UTF-16, UTF-32 with their mark, and GB18030 if surely Chinese.

    parts("paper.pdf", raw)      [(1, "text of the first page"), (2, "…")]
    parts("book.epub", raw)      [(1, "# The first chapter …"), …]
    parts("page.html", raw)      [(1, "# A heading …")]
    decode(raw)                  ("text", "utf-8")
"""
import codecs
import io
import logging
import posixpath
import re
import zipfile
from pathlib import Path
from urllib.parse import unquote
from xml.etree import ElementTree

MOST = 500 << 20  # bytes that a file may unpack to
NOISE = "script style template noscript nav svg iframe input select button textarea".split()
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
    found = soup("main") or soup("article")
    body = found[0] if len(found) == 1 else soup.body or soup  # each of several holds a part
    text = MarkdownConverter(heading_style="ATX", strip=["img", "a"]).convert_soup(body)
    text = re.sub(r"\n{3,}", "\n\n", text).strip()
    title = soup.title.get_text(" ", strip=True) if soup.title else ""
    return text if re.search(r"^# ", text, re.M) or not title else f"# {title}\n\n{text}"


def check_size(archive: zipfile.ZipFile) -> None:
    if sum(file.file_size for file in archive.infolist()) > MOST:
        raise ValueError(f"unpacks to more than {MOST >> 20} MB")


PLACES = {".pdf": ":p{}", ".epub": ":ch{}", ".docx": "", ".html": "", ".htm": ""}  # for path:line
READERS = {".pdf": pdf, ".docx": docx, ".html": html, ".htm": html, ".epub": epub}


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


# ---------------------------------------------------------------------------- plain text

MARKS = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF8: "utf-8",
         codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}  # 32 LE begins as 16 LE does
FREQUENT = frozenset(  # the 200 characters that make up half of any Chinese text
    "的一是不了在人有我他这个们中来上大为和国地到以说时要就出会可也你对生能而子那得于着下自之年过发后作里用道行"
    "所然家种事成方多经么去法学如都同现当没动面起看定天分还进好小部其些主样理心她本前开但因只从想实日军者意无力"
    "它与长把机十民第公此已工使情明性知全三又关点正业外将两高间由问很最重并物手应战向头文体政美相见被利什二等产"
    "或新己制身果加西斯月话合回特代内信表化老给世位次度门任常先海通教儿原东声提立及比员")
OTHER = re.compile("[\0-\x08\x0e-\x1f\x7f-\x9f\u3040-\u30ff\ue000-\uf8ff\ufffd]")  # not in Chinese


def decode(raw: bytes) -> tuple[str, str]:
    """The text of a file, and the codec that reads it. Raises ValueError, with the place of the
    first byte that does not fit, for what is no text or in an encoding that cannot be told."""
    for mark, name in MARKS.items():
        if raw.startswith(mark):
            try:
                return raw.decode(name), name
            except UnicodeDecodeError as error:
                raise ValueError(f"not {name.upper()} at byte {error.start}, as its first bytes "
                                 "say") from None
    if b"\0" in raw[:8192]:
        raise ValueError("binary, or UTF-16 or UTF-32 without the mark that says so")
    try:
        if b"\x1b$" in raw:
            raise ValueError("ISO-2022, it seems: convert it to UTF-8 first")
        return raw.decode(), "utf-8"
    except UnicodeDecodeError as error:
        if sum(byte >= 0xc0 for byte in raw[max(0, error.start - 10_000):error.start]) >= 10:
            raise ValueError(f"damaged UTF-8 at byte {error.start}") from None
        if is_chinese(raw):
            return raw.decode("gb18030"), "gb18030"
        raise ValueError(f"not UTF-8 at byte {error.start}, nor plainly GB18030: convert it first, "
                         "with iconv -f ENCODING -t UTF-8") from None


def is_chinese(raw: bytes) -> bool:
    """Is this GB18030? Nearly any bytes are valid GB18030. But in Big5 or in French that is misread
    so, the most frequent characters of Chinese are rare. Korean looks like it and has a test."""
    text = raw.decode("gb18030", "replace")
    letters = re.sub("[\0-\x7f、。《》（），！？：；“”‘’]+", "", text)
    korean = re.findall("[\uac00-\ud7a3]", raw.decode("euc_kr", "replace"))
    frequent = sum(letter in FREQUENT for letter in letters)
    plain = frequent >= 1 + 0.15 * len(letters) and len(korean) < 0.9 * len(letters)
    return plain and not OTHER.search(text)
