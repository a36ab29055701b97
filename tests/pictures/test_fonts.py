"""Labels in other scripts."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import ImageFont

from tmpo_trainer.pictures import fonts, grids


def test_a_label_gets_a_font_that_has_its_letters() -> None:
    """matplotlib's own fonts have these on any machine."""
    for text in ("красный круг", "café", "β λ"):
        found = fonts.font_for(text, 11)
        assert isinstance(found, ImageFont.FreeTypeFont) and not fonts.missing(found, frozenset(text))
    own = ImageFont.load_default(11)
    assert isinstance(own, ImageFont.FreeTypeFont) and fonts.missing(own, frozenset("aк")) == {"к"}
    assert fonts.font_for("a red circle", 11).getname() == own.getname()  # type: ignore[union-attr]
    picture = np.zeros((1, 40, 128, 3), np.uint8)
    assert not any("LastResort" in path for path in fonts._system_fonts())
    # Boxes would be alike.
    one, other = (np.asarray(grids.grid([picture], [text])) for text in ("ж", "д"))
    assert (one != other).any()


def test_letters_that_no_font_has_are_named_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fonts, "_system_fonts", lambda: [])
    monkeypatch.setattr(fonts, "_reported", set())
    fonts._system_font.cache_clear()
    for text in ("猫", "猫 a", "犬"):
        assert fonts.font_for(text, 11) is not None
    err = capsys.readouterr().err
    assert (
        err.startswith("note: no font on this machine has the letters 猫, so labels show boxes")
        and err.count("\n") == 1
    )
    fonts._system_font.cache_clear()
