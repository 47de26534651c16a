"""Byte-level BPE (GGUF's "gpt2"): out of a tokenizer.json, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from converters.tokenizers.pretokenizer import PRE_TOKENIZERS, find_pre_tokenizer, identify, unicode_forms
from converters.tokenizers.vocabulary import Vocabulary, own_tokens
from edgellm.errors import TokenizerError


def read_byte_level(tokenizer: Mapping[str, Any], shared: Vocabulary, pre: str | None) -> Vocabulary:
    """`shared` with the merges and the pre-tokenizer's name, which `pre` overrides."""
    merges = [f"{left} {right}" for left, right in read_merges(tokenizer["model"])]
    normalizer = tokenizer.get("normalizer")
    forms = unicode_forms(normalizer)
    notes = list(shared.notes)
    if forms is None or forms:
        kind = "+".join(forms) if forms else str(normalizer)[:100]
        notes.append(
            f"the tokenizer normalizes text ({kind}), llama.cpp doesn't: normalize it yourself where it matters"
        )
    name = pre or identify(tokenizer, "bos" in shared.special)
    notes += [entry.note for entry in PRE_TOKENIZERS if entry.name == name and entry.note]
    return replace(shared, model="gpt2", pre=name, merges=merges, notes=tuple(notes))


def read_merges(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Pairs in order of rank; written as "left right" by older versions, as two strings by newer ones."""
    pairs = []
    for entry in model.get("merges") or []:
        parts = entry.split(" ") if isinstance(entry, str) else entry
        if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(part, str) for part in parts):
            raise TokenizerError(f"tokenizer.json has the merge {entry!r}, which is no pair; it is damaged")
        pairs.append((parts[0], parts[1]))
    return pairs


def byte_level_pipeline(vocabulary: Vocabulary) -> dict[str, Any]:
    """Normalizer, pre-tokenizer, decoder and model of a tokenizer.json."""
    pre = find_pre_tokenizer(vocabulary.pre)
    steps = [dict(step) for step in pre.steps]
    merges = [merge.split(" ", 1) for merge in vocabulary.merges or []]
    return {
        "normalizer": {"type": pre.normalizer} if pre.normalizer else None,
        "pre_tokenizer": steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": bpe_model(vocabulary, merges, ignore_merges=bool(pre.ignore_merges)),
    }


def bpe_model(
    vocabulary: Vocabulary, merges: list[list[str]], *, ignore_merges: bool = False, byte_fallback: bool = False
) -> dict[str, Any]:
    """The BPE model of a tokenizer.json."""
    unk = vocabulary.special.get("unk") if byte_fallback else None
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None if unk is None else vocabulary.tokens[unk],
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": byte_fallback,
        "byte_fallback": byte_fallback,
        "ignore_merges": ignore_merges,
        "vocab": {token: i for i, token, _ in own_tokens(vocabulary)},
        "merges": merges,
    }
