"""Texts that llama.cpp is known to tokenize otherwise than the checkpoint's own tokenizer, and why.

Measured with the texts of tests/oracles/tokenizer_corpus.py; anything else that differs is a mistake of ours.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

Test = Callable[[str], bool]


def _has_category(*categories: str) -> Test:
    return lambda text: any(unicodedata.category(char) in categories for char in text)


def _has_capital_after_small(text: str) -> bool:
    return any(a.islower() and b.isupper() and not (a + b).isascii() for a, b in pairwise(text))


def _has_hangul(text: str) -> bool:
    return any("가" <= char <= "힣" for char in text)


def _is_decomposed(text: str) -> bool:
    return not unicodedata.is_normalized("NFC", text)


def _has_any(chars: str) -> Test:
    return lambda text: any(char in text for char in chars)


def _has_young_sign(text: str) -> bool:
    """Marks and punctuation of which one of the two libraries' Unicode tables doesn't know yet what they are."""
    young = (char for char in text if unicodedata.ucd_3_2_0.category(char) == "Cn")
    return any(unicodedata.category(char) in ("Mn", "Po", "Cn") for char in young)


def _begins_with_space(text: str) -> bool:
    return text.startswith((" ", "▁"))


def _is_blank(text: str) -> bool:
    return not text.strip(" ")


def _has_run(text: str) -> bool:
    return any(char * 4 in text for char in set(text))


_MARKS = (_has_category("Mn", "Mc", "Me"), "combining marks")
_CAPITALS = (_has_capital_after_small, "a capital after a small letter beyond ASCII")
_CONTROL_SPACES = (_has_any("\x0b\x0c\x1c\x1d\x1e\x1f\x85"), "control characters for spaces")
# tokenizer.ggml.pre, or the model where there is no pre-tokenizer → tests and what they find
_KNOWN: Mapping[str, tuple[tuple[Test, str], ...]] = {
    "tekken": (_MARKS, _CAPITALS),
    "gpt-4o": (_MARKS, _CAPITALS),
    "granite-embed-multi-97m": (_CAPITALS,),
    "tiny_aya": ((_has_category("Nd"), "digits, which llama.cpp groups otherwise beside letters and spaces"),),
    "t5": (
        (_is_decomposed, "decomposed characters"),
        _CONTROL_SPACES,
        (_is_blank, "nothing but spaces"),
        (_has_run, "a run of one character, where several ways are equally good"),
    ),
    "bert": (_CONTROL_SPACES, (_has_any("▁"), "the character ▁"), (_has_young_sign, "young signs of Unicode")),
}
_ACCENTS = ((_has_hangul, "Hangul"), (_has_category("Mc", "Me"), "spacing marks"))


def known_difference(metadata: Mapping[str, Any], text: str) -> str | None:
    """What in `text` llama.cpp tokenizes in its own way, for a GGUF's tokenizer; None where the ids must be equal."""
    model, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    tests = _KNOWN.get(str(pre if model == "gpt2" else model), ())
    if model == "bert" and metadata.get("tokenizer.ggml.normalizer.strip_accents"):
        tests += _ACCENTS
    if metadata.get("edgellm.tokenizer.metaspace"):
        tests += ((_begins_with_space, "a space at the beginning, before which the tokenizer puts no other"),)
    return next((what for test, what in tests if test(text)), None)
