"""BPE with ▁ for spaces and byte pieces (GGUF's "llama" and "gemma4"): out of a tokenizer.json, and back.

In "llama" a piece's score is minus the rank of its merge: llama.cpp merges the best score first, as BPE merges the
lowest rank first. "gemma4" has the merges themselves; llama.cpp expects it of Gemma 4, told by its token for turns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from converters.tokenizers.byte_level import bpe_model, read_merges
from converters.tokenizers.vocabulary import TokenType, Vocabulary
from edgellm.errors import TokenizerError

UNREACHABLE = -1e9  # score of a piece that no merge makes
_GEMMA4, _GEMMA4_TURN = "gemma4", "<turn|>"


def read_byte_fallback(tokenizer: Mapping[str, Any], shared: Vocabulary, pre: str | None) -> Vocabulary:
    """`shared` with the pieces' scores, or the merges; `pre` "gemma4" asks for the merges."""
    model = tokenizer["model"]
    merges = read_merges(model)
    types = list(shared.types)
    ids = {token: i for i, token in enumerate(shared.tokens)}
    unk = model.get("unk_token")
    if isinstance(unk, str) and unk in ids:
        types[ids[unk]] = int(TokenType.UNKNOWN)
    scores = merge_scores(shared.tokens, merges)
    for i, kind in enumerate(types):
        # a run of spaces that merges make anyway: llama.cpp shows an added token's ▁ as it stands
        if kind == TokenType.USER_DEFINED and "▁" in shared.tokens[i] and scores[i] > UNREACHABLE:
            types[i] = int(TokenType.NORMAL)
    check_byte_pieces(shared.tokens)
    prefix, metaspace = _space_prefix(tokenizer)
    notes = shared.notes
    if metaspace == "first":
        notes += ("llama.cpp puts a space also after every special token, the tokenizer only before the text",)
    if not prefix and (pre == _GEMMA4 or _GEMMA4_TURN in ids):
        joined = [f"{left} {right}" for left, right in merges]
        return replace(shared, model=_GEMMA4, pre=_GEMMA4, types=types, merges=joined, notes=notes)
    return replace(
        shared,
        model="llama",
        types=types,
        scores=scores,
        add_space_prefix=prefix,
        metaspace=metaspace,
        notes=notes,
    )


def merge_scores(tokens: list[str], merges: list[tuple[str, str]]) -> list[float]:
    """Minus the rank of the first merge that makes a token."""
    rank: dict[str, int] = {}
    for i, (left, right) in enumerate(merges):
        rank.setdefault(left + right, i)
    return [-float(rank[token]) if token in rank else UNREACHABLE for token in tokens]


def check_byte_pieces(tokens: list[str]) -> None:
    """llama.cpp aborts on a character that is neither a piece nor can be spelled in byte pieces."""
    known = set(tokens)
    if lacking := [f"<0x{byte:02X}>" for byte in range(256) if f"<0x{byte:02X}>" not in known]:
        raise TokenizerError(
            f"the tokenizer has no byte pieces ({lacking[0]} and {len(lacking) - 1} others are missing), "
            "which llama.cpp needs for a SentencePiece-like BPE; train it with byte_fallback"
        )


def _space_prefix(tokenizer: Mapping[str, Any]) -> tuple[bool, str | None]:
    """Whether a space is put before the text, by a Prepend normalizer or by Metaspace, and the latter's scheme."""
    normalizer = tokenizer.get("normalizer") or {}
    steps = normalizer.get("normalizers", []) if normalizer.get("type") == "Sequence" else [normalizer]
    if any(step.get("type") == "Prepend" for step in steps):
        return True, None
    pre = tokenizer.get("pre_tokenizer") or {}
    if pre.get("type") != "Metaspace":
        return False, None
    scheme = metaspace_scheme(pre)
    return scheme != "never", None if scheme == "never" else scheme


def metaspace_scheme(step: Mapping[str, Any]) -> str:
    """ "first", "always" or "never" of a Metaspace step; older files say it with a flag."""
    return str(step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never"))


def byte_fallback_pipeline(vocabulary: Vocabulary) -> dict[str, Any]:
    """Normalizer, pre-tokenizer, decoder and model of a tokenizer.json."""
    prepend = [{"type": "Prepend", "prepend": "▁"}] if vocabulary.add_space_prefix else []
    replace_spaces = [*prepend, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
    normalizer: dict[str, Any] | None = {"type": "Sequence", "normalizers": replace_spaces}
    pre_tokenizer = None
    if vocabulary.metaspace:
        scheme = vocabulary.metaspace
        pre_tokenizer = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
        normalizer = None
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if vocabulary.add_space_prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    if vocabulary.model == "gemma4":
        merges = [merge.split(" ", 1) for merge in vocabulary.merges or []]
    else:
        merges = merges_from_scores(vocabulary)
    return {
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": bpe_model(vocabulary, merges, byte_fallback=True),
    }


def merges_from_scores(vocabulary: Vocabulary) -> list[list[str]]:
    """BPE merges equivalent to SentencePiece scores: every split of a piece into two pieces, best score first.

    Pieces of equal score, as runs of spaces often are, come in the order of their ids, as in transformers.
    """
    ids = {
        token: i
        for i, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True))
        if kind == TokenType.NORMAL
    }
    scores = vocabulary.scores or [0.0] * len(vocabulary.tokens)
    merges = [
        (-scores[i], i, ids[token[:cut]], ids[token[cut:]], cut)
        for token, i in ids.items()
        for cut in range(1, len(token))
        if token[:cut] in ids and token[cut:] in ids
    ]
    texts = ((vocabulary.tokens[i], cut) for _, i, _, _, cut in sorted(merges))
    return [[text[:cut], text[cut:]] for text, cut in texts]
