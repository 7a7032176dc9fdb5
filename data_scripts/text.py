"""Text files in any encoding that annotation tools write: UTF-8, UTF-16, or that of an older or localized system.

A wrong guess would silently train on garbage, so an encoding is used only if the text clearly indicates it; otherwise,
loading asks for the option `encoding`.
"""

import functools
import json
import logging
import os
import pathlib
import re
import unicodedata

from charset_normalizer import CharsetMatch, from_bytes


logger = logging.getLogger(__name__)

# Encodings of localized systems: Chinese, Japanese, Korean, Cyrillic, Greek, Hebrew, Arabic, Thai and Latin alphabets.
ENCODINGS = (
    *("gb18030", "big5", "cp932", "euc_jp", "cp949"),
    *("cp1251", "koi8_r", "cp1253", "cp1255", "cp1256", "cp874"),
    *("cp1252", "cp1250", "cp1254", "cp1257"),
)
# Where the common characters of a writing system are: by encoding, the first bytes in a narrower one.
COMMON = {
    "gb18030": ("gb2312", range(0xB0, 0xD8)),
    "big5": ("big5", range(0xA4, 0xC7)),
    "cp932": ("shift_jis", range(0x82, 0x98)),
    "euc_jp": ("euc_jp", range(0xA4, 0xD0)),
    "cp949": ("euc_kr", range(0xB0, 0xC9)),
}
THAI_MARK_WITHOUT_LETTER = re.compile("(?<![\u0e01-\u0e2e\u0e34-\u0e39])[\u0e31\u0e34-\u0e3a\u0e47-\u0e4c]")
MIN_CHARACTERS = 5  # distinct non-ASCII characters: fewer may be words in several encodings
MIN_COHERENCE = 0.2  # share of letters with frequencies typical of a language, as measured by charset-normalizer
MARGIN = 0.05


def read_text(path: str, encoding: str | None = None) -> str:
    """Read a text file.

    Args:
        path: Path of the file.
        encoding: Encoding of a file that is not in UTF-8, UTF-16 or UTF-32. By default, it is detected.

    Raises:
        ValueError: If the file is damaged, or its encoding is ambiguous.
    """
    if os.path.isdir(path):
        raise ValueError(f"expected a file, got the directory {path!r}. Name the file in it.")
    content = pathlib.Path(path).read_bytes()
    unicode = json.detect_encoding(content)  # by a byte order mark or zero bytes, else UTF-8
    try:
        return content.decode(unicode)
    except UnicodeDecodeError as error:
        replaced = content.decode(unicode, errors="replace")
        num_damaged = replaced.count("\ufffd")
        if unicode not in ("utf-8", "utf-8-sig") or num_damaged < sum(map(str.isalpha, _not_ascii(replaced))):
            raise ValueError(
                f"expected text in UTF-8, got {path!r}, which is damaged: {error}. Restore it."
            ) from error
    expected = "UTF-8" if encoding is None else f"UTF-8 or {encoding}"
    try:
        if encoding is None:
            encoding = _detect_encoding(_not_ascii_fragments(content))
            _log_encoding(os.path.dirname(path), encoding)
        return content.decode(encoding)
    except (LookupError, ValueError) as error:
        raise ValueError(
            f"expected text in {expected}, got {path!r} ({error}). Save it in UTF-8, or set the option `encoding`."
        ) from error


@functools.cache
def _log_encoding(directory: str, encoding: str):
    """Log once what was detected."""
    logger.warning("Files in %r are read as %s. If that is wrong, set `encoding`.", directory, encoding)


def _not_ascii(text: str) -> list[str]:
    return [character for character in text if not character.isascii()]


def _not_ascii_fragments(content: bytes) -> bytes:
    """Return the non-ASCII strings, one per line: the rest of a file would be mistaken for a language."""
    fragments = dict.fromkeys(re.findall(rb'[^"\r\n]*[\x80-\xff][^"\r\n]*', content))
    return b"\n".join(list(fragments)[:1000])


@functools.lru_cache(maxsize=1000)
def _detect_encoding(sample: bytes) -> str:
    matches = [match for match in from_bytes(sample, cp_isolation=list(ENCODINGS)) if _is_plausible(match)]
    if not matches:
        raise ValueError("its encoding cannot be detected")
    # Some encodings decode a text to the same letters.
    best = matches[0]
    others = [match for match in matches if str(match) != str(best)]
    is_long = len(set(_not_ascii(str(best)))) >= MIN_CHARACTERS
    speaks = best.coherence >= MIN_COHERENCE and all(best.coherence - m.coherence > 2 * MARGIN for m in others)
    stands_out = is_long and all(match.chaos - best.chaos > MARGIN for match in others)
    if others and not (speaks or stands_out):
        lines = [str(match).splitlines() for match in [best, *others]]
        differing = next((index for index, texts in enumerate(zip(*lines)) if len(set(texts)) > 1), 0)
        readings = " or ".join(
            f"{match.encoding} ({text[differing][:40]!r})" for match, text in list(zip([best, *others], lines))[:4]
        )
        raise ValueError(f"its encoding is ambiguous: it may be {readings}")
    return best.encoding


def _is_plausible(match: CharsetMatch) -> bool:
    """Return whether most letters are common and most words use one alphabet, which is rare with a wrong decoding."""
    text = str(match)
    letters = [letter for letter in _not_ascii(text) if letter.isalpha()]
    if match.encoding in COMMON:
        narrow, first_bytes = COMMON[match.encoding]
        codes = [letter.encode(narrow, errors="ignore") for letter in letters]
        return 5 * sum(len(code) == 2 and code[0] in first_bytes for code in codes) >= 4 * len(letters)
    if THAI_MARK_WITHOUT_LETTER.search(text):
        return False
    words = [word for word in re.findall(r"[^\W\d_]+", text) if not word.isascii()]
    scripts = [{unicodedata.name(letter, "?").split(" ")[0] for letter in word} for word in words]
    return 2 * sum(len(found) > 1 for found in scripts) <= len(words)
