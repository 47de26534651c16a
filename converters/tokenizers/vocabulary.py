"""A vocabulary in GGUF's terms, whatever files it came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any

from edgellm.errors import TokenizerError


class TokenType(IntEnum):
    """`tokenizer.ggml.token_type` (llama.cpp's LLAMA_TOKEN_TYPE)."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


# our name of a special token → GGUF's
SPECIAL_KEYS: Mapping[str, str] = {
    "bos": "tokenizer.ggml.bos_token_id",
    "eos": "tokenizer.ggml.eos_token_id",
    "eot": "tokenizer.ggml.eot_token_id",
    "eom": "tokenizer.ggml.eom_token_id",
    "unk": "tokenizer.ggml.unknown_token_id",
    "sep": "tokenizer.ggml.seperator_token_id",  # sic: GGUF's own spelling
    "pad": "tokenizer.ggml.padding_token_id",
    "mask": "tokenizer.ggml.mask_token_id",
    "cls": "tokenizer.ggml.cls_token_id",
}


# optional fields of a vocabulary → GGUF's keys
_OPTIONAL_KEYS: Mapping[str, str] = {
    "scores": "tokenizer.ggml.scores",
    "merges": "tokenizer.ggml.merges",
    "remove_extra_whitespaces": "tokenizer.ggml.remove_extra_whitespaces",
    "lowercase": "tokenizer.ggml.normalizer.lowercase",
    "strip_accents": "tokenizer.ggml.normalizer.strip_accents",
    "metaspace": "edgellm.tokenizer.metaspace",  # GGUF itself has no word for it
}
_CHARSMAP_KEY = "tokenizer.ggml.precompiled_charsmap"
MODELS = ("gpt2", "llama", "gemma4", "t5", "bert")


@dataclass(frozen=True)
class Vocabulary:
    """`model` is GGUF's tokenizer.ggml.model.

    "gpt2" is byte-level BPE, "llama" SentencePiece-like BPE by scores, "gemma4" BPE over text with ▁ for spaces,
    "t5" Unigram, "bert" WordPiece. tokens and types have one entry per id; scores only for "llama" and "t5", merges
    ("left right") only for "gpt2" and "gemma4". special: name (see SPECIAL_KEYS) → id. templates: name → Jinja text,
    "default" being the chat template. Of "llama": metaspace, "first" or "always" where the pre-tokenizer is
    Metaspace, which puts no space before a text that begins with one, as llama.cpp does. Of "t5": charsmap
    (SentencePiece's compiled normalization) and remove_extra_whitespaces; of "bert": lowercase and strip_accents.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] | None = None
    merges: list[str] | None = None
    special: Mapping[str, int] = field(default_factory=dict)
    add_bos: bool = False
    add_eos: bool = False
    add_space_prefix: bool = False
    charsmap: bytes = b""
    remove_extra_whitespaces: bool | None = None
    lowercase: bool | None = None
    strip_accents: bool | None = None
    metaspace: str | None = None
    templates: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def filled_entry(i: int) -> str:
    """The text of an embedding row that has no token."""
    return f"[PAD{i}]"


def own_tokens(vocabulary: Vocabulary) -> list[tuple[int, str, int]]:
    """(id, text, type) of every entry but those filled in for rows without a token: reading fills them again."""
    entries = enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True))
    return [(i, text, kind) for i, (text, kind) in entries if kind != TokenType.UNUSED or text != filled_entry(i)]


def fit(vocabulary: Vocabulary, n_vocab: int) -> Vocabulary:
    """The same vocabulary with exactly `n_vocab` unique entries, as the embedding has rows.

    Missing entries become UNUSED; a text that stands twice keeps its first place (llama.cpp aborts on it).
    """
    if len(vocabulary.tokens) > n_vocab:
        first = vocabulary.tokens[n_vocab]
        raise TokenizerError(
            f"the tokenizer has {len(vocabulary.tokens)} tokens, the embedding only {n_vocab} rows: "
            f"{first!r} and those after it have no weights; resize the embedding or use the model's own tokenizer"
        )
    tokens, types = list(vocabulary.tokens), list(vocabulary.types)
    n_padding = n_vocab - len(tokens)
    tokens += [filled_entry(i) for i in range(len(tokens), n_vocab)]
    types += [TokenType.UNUSED] * n_padding
    scores = None if vocabulary.scores is None else vocabulary.scores + [-1e9] * n_padding
    notes = list(vocabulary.notes)
    if n_padding:
        notes.append(f"{n_padding} embedding rows have no token; they are marked unused")
    n_twice = _rename_repeats(tokens, types)
    if n_twice:
        notes.append(f"{n_twice} tokens repeat another's text; they are marked unused")
    return replace(vocabulary, tokens=tokens, types=types, scores=scores, notes=tuple(notes))


def _rename_repeats(tokens: list[str], types: list[int]) -> int:
    seen: set[str] = set()
    n_twice = 0
    for i, token in enumerate(tokens):
        if token in seen or not token:
            tokens[i], types[i] = f"[REPEAT{i}]", TokenType.UNUSED
            n_twice += bool(token)
        seen.add(tokens[i])
    return n_twice


def vocabulary_metadata(vocabulary: Vocabulary) -> dict[str, Any]:
    """All `tokenizer.*` entries of a GGUF for this vocabulary."""
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": vocabulary.model,
        "tokenizer.ggml.pre": vocabulary.pre,
        "tokenizer.ggml.tokens": vocabulary.tokens,
        "tokenizer.ggml.token_type": [int(kind) for kind in vocabulary.types],
    }
    for name, key in _OPTIONAL_KEYS.items():
        if getattr(vocabulary, name) is not None:
            metadata[key] = getattr(vocabulary, name)
    if vocabulary.charsmap:
        metadata[_CHARSMAP_KEY] = vocabulary.charsmap
    metadata |= {SPECIAL_KEYS[name]: number for name, number in vocabulary.special.items()}
    metadata["tokenizer.ggml.add_bos_token"] = vocabulary.add_bos
    metadata["tokenizer.ggml.add_eos_token"] = vocabulary.add_eos
    metadata["tokenizer.ggml.add_space_prefix"] = vocabulary.add_space_prefix
    for name, template in vocabulary.templates.items():
        metadata["tokenizer.chat_template" + ("" if name == "default" else f".{name}")] = template
    named = [name for name in vocabulary.templates if name != "default"]
    if named:
        metadata["tokenizer.chat_templates"] = named
    return metadata


def vocabulary_from_metadata(metadata: Mapping[str, Any]) -> Vocabulary:
    """The vocabulary of a GGUF; TokenizerError where it has none."""
    tokens = metadata.get("tokenizer.ggml.tokens")
    model = metadata.get("tokenizer.ggml.model")
    if not isinstance(tokens, list) or model not in MODELS:
        raise TokenizerError(f"the GGUF's tokenizer ({model!r}) can't be written as a tokenizer.json")
    prefix = "tokenizer.chat_template"
    templates = {
        key.removeprefix(prefix).removeprefix(".") or "default": value
        for key, value in metadata.items()
        if (key == prefix or key.startswith(prefix + ".")) and isinstance(value, str)
    }
    optional: dict[str, Any] = {name: metadata.get(key) for name, key in _OPTIONAL_KEYS.items()}
    return Vocabulary(
        model=model,
        pre=str(metadata.get("tokenizer.ggml.pre", "default")),
        tokens=tokens,
        types=list(metadata.get("tokenizer.ggml.token_type") or [int(TokenType.NORMAL)] * len(tokens)),
        charsmap=bytes(value & 0xFF for value in metadata.get(_CHARSMAP_KEY) or ()),
        special={name: int(metadata[key]) for name, key in SPECIAL_KEYS.items() if key in metadata},
        add_bos=bool(metadata.get("tokenizer.ggml.add_bos_token", model in ("llama", "bert"))),
        add_eos=bool(metadata.get("tokenizer.ggml.add_eos_token", model in ("t5", "bert"))),
        add_space_prefix=bool(metadata.get("tokenizer.ggml.add_space_prefix", model in ("llama", "t5"))),
        templates=templates,
        **optional,
    )
