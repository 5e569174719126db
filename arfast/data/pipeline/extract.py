"""Text of web pages by resiliparse: Bevendorff et al., "Elastic ChatNoir" (ECIR 2018), github.com/chatnoir-eu.

Chosen over trafilatura, which finds about the same text: over ten times as fast on the pages of the Debian handbook, no
lxml, a fixed order of its output, and it identifies languages too.
"""

import re

from arfast.data.pipeline.packages import require
from arfast.data.pipeline.record import HTML_SUFFIXES, Dropped, Record, suffix_of

_HEAD_CHARACTERS = 1024
# The search for the main text takes time that grows with the square of the depth: 0.1 s at 2,000, minutes at 100,000.
_MAX_DEPTH = 1000
_TAG = re.compile(
    "<(/?)(?!(?:area|base|br|col|dd|dt|embed|hr|img|input|li|link|meta|option|p|param|source|td|th|tr|track|wbr)[\\s/>])"
    "[a-zA-Z]"
)


def is_html(record: Record) -> bool:
    """Whether a document is a web page: by the ending of its file, or by how its text starts."""
    if suffix_of(record.source) in HTML_SUFFIXES:
        return True
    head = record.text[:_HEAD_CHARACTERS].lstrip("\ufeff \t\r\n").lower()
    if head.startswith("<?xml"):
        head = head.partition("?>")[2].lstrip()
    return head.startswith(("<!doctype html", "<html"))


def nesting_depth(html: str) -> int:
    """About how many elements of a page are open at once, at most; those that need no end tag do not count.

    >>> nesting_depth("<div><p><b>one</b><br><p><i>two</i></div>")
    2
    """
    depth = deepest = 0
    for slash in _TAG.findall(html):
        depth = max(depth - 1, 0) if slash else depth + 1
        deepest = max(depth, deepest)
    return deepest


def extract_text(html: str) -> str:
    """The main text of a page, a line per block; navigation, scripts, forms and hidden elements are left out.

    >>> extract_text("<html><body><nav>Home</nav><main><h1>Title</h1><p>A <b>short</b> text.</p></main></body></html>")
    'Title\\n\\nA short text.'
    """
    html2text = require("resiliparse.extract.html2text", "extraction of text from HTML")
    return html2text.extract_plain_text(html, main_content=True, alt_texts=False)


def extract(record: Record) -> None:
    """Replaces a page by its text; raises Dropped when it has none."""
    if not is_html(record):
        return
    if record.text.count("<") > _MAX_DEPTH and (depth := nesting_depth(record.text)) > _MAX_DEPTH:
        raise Dropped("nesting", f"{depth} elements deep")
    text = extract_text(record.text)
    if not text.strip():
        raise Dropped("no text", "a page without main text")
    record.text = text
