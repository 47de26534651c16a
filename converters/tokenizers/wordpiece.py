"""WordPiece (GGUF's "bert"): out of a tokenizer.json, and back.

GGUF marks the start of a word with ▁ where tokenizer.json marks its continuation with ##.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from converters.tokenizers.vocabulary import TokenType, Vocabulary, own_tokens
from edgellm.errors import TokenizerError

_CONTINUATION, _WORD = "##", "▁"
_AS_THEY_STAND = (TokenType.CONTROL, TokenType.UNKNOWN, TokenType.USER_DEFINED, TokenType.UNUSED)


def read_wordpiece(tokenizer: Mapping[str, Any], shared: Vocabulary, pre: str | None) -> Vocabulary:
    """`shared` with the pieces in GGUF's spelling and the normalization."""
    model, normalizer = tokenizer["model"], tokenizer.get("normalizer") or {}
    if model.get("continuing_subword_prefix", _CONTINUATION) != _CONTINUATION:
        raise TokenizerError("tokenizer.json is a WordPiece tokenizer that doesn't continue words with ##")
    splits = (tokenizer.get("pre_tokenizer") or {}).get("type")
    if normalizer.get("type") != "BertNormalizer" or splits != "BertPreTokenizer":
        kinds = f"{normalizer.get('type')} and {splits}"
        raise TokenizerError(f"tokenizer.json is WordPiece with {kinds}; llama.cpp knows it as BERT has it only")
    lowercase = bool(normalizer.get("lowercase", True))
    strip = normalizer.get("strip_accents")
    types = list(shared.types)
    special = dict(shared.special)
    unk = str(model.get("unk_token", "[UNK]"))
    if unk not in shared.tokens or not {"cls", "sep"} <= special.keys():
        raise TokenizerError("llama.cpp needs a WordPiece vocabulary to have [CLS], [SEP] and [UNK]")
    special |= {"unk": shared.tokens.index(unk), "bos": special["cls"], "eos": special["sep"]}
    types[special["unk"]] = int(TokenType.UNKNOWN)
    notes = () if normalizer.get("handle_chinese_chars", True) else ("llama.cpp splits Chinese text into characters",)
    return replace(
        shared,
        model="bert",
        pre="default",
        tokens=[_spell(token, kind) for token, kind in zip(shared.tokens, types, strict=True)],
        types=types,
        special=special,
        add_bos=True,
        add_eos=True,
        add_space_prefix=True,  # of consequence for decoding only: no space before the first word
        lowercase=lowercase,
        strip_accents=lowercase if strip is None else bool(strip),
        notes=(*shared.notes, *notes),
    )


def _spell(token: str, kind: int) -> str:
    if kind in _AS_THEY_STAND:
        return token
    return token.removeprefix(_CONTINUATION) if token.startswith(_CONTINUATION) else _WORD + token


def wordpiece_pipeline(vocabulary: Vocabulary) -> dict[str, Any]:
    """Normalizer, pre-tokenizer, decoder and model of a tokenizer.json."""
    lowercase = vocabulary.lowercase is not False
    return {
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": lowercase if vocabulary.strip_accents is None else vocabulary.strip_accents,
            "lowercase": lowercase,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "decoder": {"type": "WordPiece", "prefix": _CONTINUATION, "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": vocabulary.tokens[vocabulary.special["unk"]] if "unk" in vocabulary.special else "[UNK]",
            "continuing_subword_prefix": _CONTINUATION,
            "max_input_chars_per_word": 100,
            "vocab": {_unspell(token, kind): i for i, token, kind in own_tokens(vocabulary)},
        },
    }


def _unspell(token: str, kind: int) -> str:
    if kind in _AS_THEY_STAND:
        return token
    return token.removeprefix(_WORD) if token.startswith(_WORD) else _CONTINUATION + token
