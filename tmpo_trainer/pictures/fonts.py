"""Fonts that have the letters of a text, because Pillow's own has those of English alone."""

from __future__ import annotations

import sys
from functools import lru_cache
from pathlib import Path

from PIL import ImageFont

#: What the names of fonts with many scripts contain; these are tried first.
BROAD = (
    "cjk",
    "wqy",
    "droidsansfallback",
    "unicode",
    "msyh",
    "msgothic",
    "yugoth",
    "malgun",
    "pingfang",
    "hiragino",
    "dejavusans",
)
#: Styles that are tried last.
STYLED = ("bold", "italic", "oblique", "thin", "light", "black", "mono", "serif", "condensed")


def font_for(text: str, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font, or one of this machine's if a text has letters that only that one has.

    If no font has all of them, one with the most is taken. The first time, a line on stderr names some that are missing.
    """
    own = ImageFont.load_default(size)
    letters = frozenset(letter for letter in text if letter > "~")
    if not isinstance(own, ImageFont.FreeTypeFont) or not missing(own, letters):
        return own
    path = _system_font(letters)
    return own if path is None else ImageFont.truetype(path, size)


def missing(font: ImageFont.FreeTypeFont, letters: frozenset[str]) -> set[str]:
    """The letters that a font draws as it draws a code that is no letter."""
    box = _drawn(font, "\uffff")
    return {letter for letter in letters if letter.isprintable() and _drawn(font, letter) == box}


def _drawn(font: ImageFont.FreeTypeFont, letter: str) -> tuple[tuple[int, int], bytes]:
    mask = font.getmask(letter)
    # Pillow's type of a mask does not say that it is a sequence of bytes.
    return mask.size, bytes(mask)  # type: ignore[arg-type]


@lru_cache
def _system_font(letters: frozenset[str]) -> str | None:
    """The path of the font of this machine with the most of the letters; None if none has more than Pillow's own."""
    lacking = missing(ImageFont.load_default(16), letters)  # type: ignore[arg-type]
    found = None
    for path in _system_fonts():
        try:
            own = missing(ImageFont.truetype(path, 16), letters)
        except OSError:
            # A font of fixed sizes, or a damaged one.
            continue
        if len(own) < len(lacking):
            lacking, found = own, path
        if not lacking:
            break
    if lacking and not _reported:
        _reported.update(lacking)
        print(
            f"note: no font on this machine has the letters {' '.join(sorted(lacking)[:10])}, so labels show boxes: install "
            "one that does, e.g. Noto Sans CJK for Chinese, Japanese and Korean",
            file=sys.stderr,
        )
    return found


#: The letters that a line on stderr has named.
_reported: set[str] = set()


@lru_cache(maxsize=1)
def _system_fonts() -> list[str]:
    """The paths of this machine's and matplotlib's fonts, broad and plain ones first; none without matplotlib."""
    try:
        from matplotlib import get_data_path
        from matplotlib.font_manager import findSystemFonts
    except ModuleNotFoundError:
        return []

    def order(path: str) -> tuple[bool, bool, str]:
        name = Path(path).name.lower()
        return not any(part in name for part in BROAD), any(part in name for part in STYLED), name

    paths = [*findSystemFonts(), *findSystemFonts([get_data_path()])]
    # A "last resort" font has a box for every letter.
    return sorted((path for path in paths if "lastresort" not in Path(path).name.lower()), key=order)
