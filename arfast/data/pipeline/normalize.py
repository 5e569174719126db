"""Unicode normalisation: Unicode Standard Annex 15, with its stream-safe text (section 13), and one form of line end.

The default is NFC: texts that look the same become the same, and nothing is lost. NFKC also rewrites what looks
different (superscripts, ligatures, full-width letters): "2⁵" would become "25".
"""

import functools
import re
import unicodedata

# C0 and C1 controls but tab and line feed, the byte order mark, and the noncharacters of the basic plane.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff\ufdd0-\ufdef\ufffe\uffff]")
_LINE_ENDS = re.compile("\r\n?|[\x85\u2028\u2029]")


_MAX_MARKS = 30  # of UAX 15, section 13: more than any language writes on one letter
_JOINER = "\u034f"
_BEHIND_MARKS = 0x20000  # the ideographic planes follow


@functools.cache
def _long_marks() -> re.Pattern:
    """A run of as many marks as may stand together, when another follows: characters that do not begin a sequence."""
    decomposed = ((c, unicodedata.normalize("NFKD", c)) for c in map(chr, range(0x300, _BEHIND_MARKS)))
    marks = "".join(c for c, text in decomposed if unicodedata.combining(text[0]))
    return re.compile(f"[{marks}]{{{_MAX_MARKS}}}(?=[{marks}])")


def normalize(text: str, form: str = "NFC") -> str:
    """A text of prose in a normal form ("NFC", "NFKC", or "none"), lines ended by U+000A without spaces before it.

    Control characters go, form feeds become line ends, and white space around the text is cut off.

    >>> normalize("Gru\\u0308\\xdfe \\r\\nan alle\\x00 ") == "Gr\\xfc\\xdfe\\nan alle"
    True
    """
    text = _LINE_ENDS.sub("\n", text).replace("\f", "\n")
    text = _CONTROLS.sub("", text)
    if form != "none" and not unicodedata.is_normalized(form, text):
        # Putting marks into order takes time that grows with the square of their run.
        text = unicodedata.normalize(form, _long_marks().sub(lambda run: run[0] + _JOINER, text))
    return "\n".join(line.rstrip() for line in text.split("\n")).strip()


def normalize_code(text: str) -> str:
    """Source code with line ends U+000A and without a byte order mark; its characters mean something, and stay."""
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
