"""Text of unknown origin made safe to show, and numbers as text."""

from __future__ import annotations

from trl_trustkl.report.text import count, number, one_line, percent, shortened, visible


def test_control_characters_are_shown_as_text() -> None:
    assert visible("a\x1b[31mb\x00\x9b") == "a\\x1b[31mb\\x00\\x9b"
    assert visible("\u202eabc\u2066\u200f\ufeff") == "\\u202eabc\\u2066\\u200f\\ufeff"
    assert visible("\ud800 \U000e0041") == "\\ud800 \\U000e0041"
    assert visible("line\r\nline\ttab\u00a0nbsp \u2028") == "line\nline tab nbsp \\u2028"
    for plain in ("Grüße 你好 שלום", "👩\u200d🚀", "می\u200cخواهم", ""):
        assert visible(plain) == plain


def test_text_of_unknown_origin_is_one_line_without_control_characters():
    assert one_line("a\x1b[31mred\x1b[0m\r\nb\t c\x07") == r"a\x1b[31mred\x1b[0m b c\x07"


def test_numbers_are_short_and_missing_ones_a_dash() -> None:
    assert [number(x) for x in (0.05, 1.0, 12345.6, 0.0, 1234567, 1e-5, None, float("nan"), float("inf"))] == [
        "0.05", "1", "12,346", "0", "1.23e+06", "1.00e-05", "–", "–", "–",
    ]  # fmt: skip
    assert [percent(x) for x in (0.5, 0.0001, 0.0, None)] == ["50 %", "<1 %", "0 %", "–"]


def test_a_long_text_is_cut_and_nouns_agree_with_their_number() -> None:
    assert shortened("abc", 3) == "abc" and shortened("a" * 2003, 3) == "aaa … (2,000 more characters)"
    assert [count(n, "update") for n in (0, 1, 2, 1234)] == ["0 updates", "1 update", "2 updates", "1,234 updates"]
