"""Decodes the text files that users write: settings and prompts."""

from __future__ import annotations

import codecs

_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def decode(data: bytes) -> str:
    """The text of a UTF-8 file, with every end of line as a newline and without a byte order mark.

    Raises:
        ValueError: it is not UTF-8. The message says what it is instead, where, and the fix.
    """
    if data.startswith(_UTF16):
        raise ValueError("it is UTF-16: save it as UTF-8")
    if b"\0" in data:
        # UTF-16 without its mark is full of them. No text has one.
        raise ValueError("it has NUL characters, so it is UTF-16 or no text at all: save it as UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"byte 0x{data[error.start]:02x} in line {line} is not UTF-8: save it as UTF-8") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")
