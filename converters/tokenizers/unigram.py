"""Unigram (GGUF's "t5", as XLM-RoBERTa and T5 have it): out of a tokenizer.json, and back."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from converters.tokenizers.byte_fallback import metaspace_scheme
from converters.tokenizers.vocabulary import TokenType, Vocabulary, own_tokens
from edgellm.errors import TokenizerError

_ADDED_SCORE = 0.0


def read_unigram(tokenizer: Mapping[str, Any], shared: Vocabulary, pre: str | None) -> Vocabulary:
    """`shared` with the pieces' scores and the normalization."""
    model = tokenizer["model"]
    types = list(shared.types)
    scores = [_ADDED_SCORE] * len(types)
    for i, entry in enumerate(model["vocab"]):
        scores[i] = _score(entry[1])
    unk = model.get("unk_id")
    special = dict(shared.special)
    if type(unk) is not int or not 0 <= unk < len(types):
        raise TokenizerError("tokenizer.json has a Unigram model without an unknown token, which llama.cpp needs")
    types[unk] = int(TokenType.UNKNOWN)
    special["unk"] = unk
    charsmap, collapses = _normalizer(tokenizer.get("normalizer"))
    prefix, splits = _metaspace(tokenizer.get("pre_tokenizer"))
    refuse_byte_fallback(bool(model.get("byte_fallback")))
    return replace(
        shared,
        model="t5",
        pre="default",
        types=types,
        scores=scores,
        special=special,
        charsmap=charsmap,
        add_space_prefix=prefix,
        remove_extra_whitespaces=collapses or splits,
    )


def refuse_byte_fallback(byte_fallback: bool) -> None:
    """llama.cpp's Unigram would give the unknown token for every line break and rare character."""
    if byte_fallback:
        raise TokenizerError("llama.cpp has no Unigram tokenizer that spells unknown characters in bytes, as this one")


def _score(value: Any) -> float:
    if not isinstance(value, (int, float)):
        raise TokenizerError(f"tokenizer.json has the score {value!r}; it is damaged")
    return float(value)


def _normalizer(normalizer: Any) -> tuple[bytes, bool]:
    """The compiled character map, and whether runs of spaces become one; TokenizerError for anything else."""
    charsmap, collapses = b"", False
    steps = (normalizer or {}).get("normalizers", [normalizer] if normalizer else [])
    for step in steps:
        kind, pattern = step.get("type"), step.get("pattern") or {}
        if kind == "Precompiled":
            charsmap = _decode(step.get("precompiled_charsmap"))
        elif kind == "Replace" and pattern.get("Regex") == " {2,}" and step.get("content") in (" ", "▁"):
            collapses = True
        elif kind != "Strip":
            raise TokenizerError(f"tokenizer.json normalizes with {str(step)[:200]}, which llama.cpp can't do")
    return charsmap, collapses


def _decode(text: Any) -> bytes:
    try:
        return base64.b64decode(text or "", validate=True)
    except (binascii.Error, TypeError, ValueError) as exc:
        raise TokenizerError("tokenizer.json has a precompiled_charsmap that is no base64; it is damaged") from exc


def _metaspace(pre_tokenizer: Any) -> tuple[bool, bool]:
    """Whether a space is put before the text, and whether text is split at white space first."""
    pre_tokenizer = pre_tokenizer or {}
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer] if pre_tokenizer else [])
    prefix = splits = False
    for step in steps:
        if step.get("type") == "WhitespaceSplit":
            splits = True
        elif step.get("type") == "Metaspace":
            prefix = metaspace_scheme(step) != "never"
        else:
            raise TokenizerError(f"tokenizer.json splits with {str(step)[:200]}, which llama.cpp can't do for Unigram")
    return prefix, splits


def unigram_pipeline(vocabulary: Vocabulary) -> dict[str, Any]:
    """Normalizer, pre-tokenizer, decoder and model of a tokenizer.json."""
    scheme = "always" if vocabulary.add_space_prefix else "never"
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": True}
    n = max(i for i, _, _ in own_tokens(vocabulary)) + 1
    charsmap = base64.b64encode(vocabulary.charsmap).decode()
    normalizers = [{"type": "Precompiled", "precompiled_charsmap": charsmap}] if charsmap else []
    pre_tokenizers = [metaspace]
    if vocabulary.remove_extra_whitespaces:
        pre_tokenizers.insert(0, {"type": "WhitespaceSplit"})
    return {
        "normalizer": {"type": "Sequence", "normalizers": normalizers} if normalizers else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": pre_tokenizers},
        "decoder": metaspace,
        "model": {
            "type": "Unigram",
            "unk_id": vocabulary.special.get("unk", 0),
            "vocab": [list(entry) for entry in zip(vocabulary.tokens[:n], (vocabulary.scores or [])[:n], strict=True)],
            "byte_fallback": False,
        },
    }
