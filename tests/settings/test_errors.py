"""Foreign text in our lines."""

from tmpo_trainer.settings.errors import SHOWN, one_line


def test_a_foreign_text_becomes_one_short_line_without_terminal_codes() -> None:
    assert one_line("two\n lines\r\tand \x1b[31mred\x07") == "two lines and [31mred"
    assert one_line(ValueError("short")) == "short"
    assert one_line("x" * SHOWN) == "x" * SHOWN
    assert one_line("x" * 400_000) == "x" * (SHOWN - 3) + "..."
    assert one_line("Grüße 一只猫") == "Grüße 一只猫"
