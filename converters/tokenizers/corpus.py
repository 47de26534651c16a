"""Texts on which a converted tokenizer is compared with the checkpoint's own.

Chosen to tell pre-tokenizers apart: digit runs, contractions in both cases, runs of white space, scripts with and
without spaces, marks, emoji sequences, code, punctuation runs.
"""

from __future__ import annotations

_WORDS = (
    "Hello world", "HELLO WORLD", "camelCaseWord and snake_case_word", "I'm you're he'd we'll they've it's don't",
    "I'M YOU'RE HE'D WE'LL THEY'VE IT'S DON'T", "'tis 'twas rock'n'roll o'clock", "naïve café Ångström Übermut",
    "Страна и мир", "Ελληνικά κείμενα", "שלום עולם", "مرحبا بالعالم", "नमस्ते दुनिया", "ภาษาไทยไม่มีเว้นวรรค",
    "中文分词没有空格", "日本語のテキストです", "한국어 문장입니다", "Tiếng Việt có dấu", "አማርኛ", "ქართული", "தமிழ் உரை",
    "Հայերեն լեզու ԲԱՐԵՎ", "ᏣᎳᎩ ꮳꮃꭹ", "HTTPServer2XML iOS17", "x₁+y² 25㎏ №7",
)  # fmt: skip

_NUMBERS = (
    "0", "7", "42", "123", "1234", "12345", "1234567890", "3.14159", "1,000,000", "2026-11-22", "0x1F4A9", "1e-5",
    "٣٤٥", "Ⅷ½²", "a1b22c333d4444", "v1.2.3-rc4", "10:30", "+49 30 1234567", "100%", "$19.99",
)  # fmt: skip

_SPACES = (
    "a b", "a  b", "a   b", "a    b", " leading", "  two leading", "trailing ", "trailing  ", "tab\tbetween",
    "\ttab first", "line\nbreak", "line\n\nbreak", "line\r\nbreak", "\n", "\n\n\n", " \n ", "\t\t", " ", "   ",
    "    indented\n        more\n", "a\u00a0b", "a\u3000b", "end\n",
)  # fmt: skip

_SYMBOLS = (
    "...", "!!!", "?!", "-- — –", "(a) [b] {c} <d>", '"quoted" ‘quoted’ „quoted“', "a/b\\c", "#hashtag @name",
    "user@example.com https://example.com/path?q=1&r=2#frag", "😀", "👩‍👩‍👧‍👦", "🇩🇪🇫🇷", "👍🏽",
    "e\u0301 n\u0303 o\u0308",
    "\u200b zero width \u200d", "∑∫√∞≠≤", "→⇒⟶", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢", "½ ¾ ™ ©", "a\u0000b", "\ufeffbom", "￼",
)  # fmt: skip

_CODE = (
    "def f(x):\n    return x ** 2\n", "for (int i = 0; i < n; ++i) { a[i] += b[i]; }",
    '{"key": [1, 2.5, null, true]}',
    "<div class=\"a\">text</div>", "SELECT * FROM t WHERE a >= 10;", "$ ls -la | grep '^d' && echo ok",
    "#include <stdio.h>", "x = y != z", "//comment\n/* block */", "\\frac{a}{b} + \\sqrt{2}",
    "a->b::c", "===", "```py\n```",
)  # fmt: skip


def sample_texts() -> list[str]:
    """More than 500 different texts, always the same ones: the seeds alone and joined in several ways."""
    seeds = [*_WORDS, *_NUMBERS, *_SPACES, *_SYMBOLS, *_CODE]
    joined = [separator.join((a, b)) for separator in (" ", "", "\n", ", ") for a, b in _pairs(seeds)]
    whole = [" ".join(_WORDS), "\n".join(_CODE), "".join(_SPACES), "".join(_SYMBOLS), " ".join(_NUMBERS)]
    return list(dict.fromkeys([*seeds, *joined, *whole]))


def _pairs(seeds: list[str]) -> list[tuple[str, str]]:
    """Each seed with one from another place in the list."""
    step = 37  # coprime to the number of seeds' neighbours: groups mix
    return [(seed, seeds[(i * step + 11) % len(seeds)]) for i, seed in enumerate(seeds)]
