"""tokenizer.json (the `tokenizers` library's format) to a vocabulary, and back.

Byte-level BPE becomes GGUF's "gpt2" model, BPE with byte fallback its "llama" model, where a piece's score is
minus the rank of its merge: llama.cpp merges the best score first, as BPE merges the lowest rank first.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from converters.sources.huggingface import read_json_object
from converters.tokenizers.pretokenizer import find_pre_tokenizer, identify
from converters.tokenizers.special import read_optional_json, read_templates, special_ids
from converters.tokenizers.vocabulary import TokenType, Vocabulary
from edgellm.errors import TokenizerError

_UNREACHABLE = -1e9  # score of a piece that no merge makes


def read_tokenizer_json(folder: Path, config: Mapping[str, Any], pre: str | None = None) -> Vocabulary:
    """The vocabulary of a folder's tokenizer.json. pre overrides the pre-tokenizer's identification."""
    tokenizer = read_json_object(folder / "tokenizer.json")
    model = tokenizer.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict):
        raise TokenizerError(f"{folder / 'tokenizer.json'} has no vocabulary table; only BPE tokenizers are supported")
    if model.get("type", "BPE") != "BPE":
        raise TokenizerError(f"{folder / 'tokenizer.json'} is a {model['type']} tokenizer; BPE is supported")
    _check_form(folder / "tokenizer.json", tokenizer)
    byte_fallback = bool(model.get("byte_fallback"))
    tokens, types = _tokens(tokenizer, byte_fallback)
    merges = _merges(model)
    ids = {token: i for i, token in enumerate(tokens)}
    special = special_ids(folder, config, ids)
    add_bos, add_eos = _added_ends(tokenizer, read_optional_json(folder / "tokenizer_config.json"), special, ids)
    shared: dict[str, Any] = {
        "tokens": tokens,
        "types": types,
        "special": special,
        "add_bos": add_bos,
        "add_eos": add_eos,
        "templates": read_templates(folder),
    }
    if byte_fallback:
        _mark_unknown(model, ids, types)
        scores = _scores(tokens, merges)
        prefix = _space_prefix(tokenizer)
        return Vocabulary(model="llama", pre="default", scores=scores, add_space_prefix=prefix, **shared)
    normalizer = tokenizer.get("normalizer")
    notes = (f"the tokenizer normalizes text ({normalizer['type']}), llama.cpp doesn't",) if normalizer else ()
    joined = [f"{left} {right}" for left, right in merges]
    return Vocabulary(model="gpt2", pre=pre or identify(tokenizer), merges=joined, notes=notes, **shared)


def _check_form(path: Path, tokenizer: Mapping[str, Any]) -> None:
    """Each part is a table or absent, each list of steps a list of tables."""
    lists = {"added_tokens": tokenizer.get("added_tokens")}
    for part, steps in (
        ("normalizer", "normalizers"),
        ("pre_tokenizer", "pretokenizers"),
        ("post_processor", "processors"),
    ):
        found = tokenizer.get(part)
        if not isinstance(found, dict | None):
            raise TokenizerError(f"{path} is damaged: its {part} is no table; copy it again")
        lists[steps] = (found or {}).get(steps)
    for name, entries in lists.items():
        if not isinstance(entries, list | None) or not all(isinstance(entry, dict) for entry in entries or ()):
            raise TokenizerError(f"{path} is damaged: its {name} are no list of tables; copy it again")


def _tokens(tokenizer: Mapping[str, Any], byte_fallback: bool) -> tuple[list[str], list[int]]:
    """Text and type of every id; an id nobody has becomes an unused entry."""
    by_id: dict[int, tuple[str, int]] = {}
    for text, number in tokenizer["model"]["vocab"].items():
        is_byte = byte_fallback and len(text) == 6 and text.startswith("<0x") and text.endswith(">")
        by_id[_id(number)] = (text, TokenType.BYTE if is_byte else TokenType.NORMAL)
    for entry in tokenizer.get("added_tokens") or []:
        kind = TokenType.CONTROL if entry.get("special") else TokenType.USER_DEFINED
        by_id[_id(entry.get("id"))] = (str(entry.get("content")), kind)
    n = max(by_id, default=-1) + 1
    if n > 2 * len(by_id) + 1000:
        raise TokenizerError(f"tokenizer.json has ids up to {n - 1} for {len(by_id)} tokens; it is damaged")
    entries = [by_id.get(i, (f"[PAD{i}]", TokenType.UNUSED)) for i in range(n)]
    return [text for text, _ in entries], [int(kind) for _, kind in entries]


def _id(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise TokenizerError(f"tokenizer.json has a token with id {value!r}; it is damaged")
    return value


def _merges(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Pairs in order of rank; written as "left right" by older versions, as two strings by newer ones."""
    pairs = []
    for entry in model.get("merges") or []:
        parts = entry.split(" ") if isinstance(entry, str) else entry
        if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(part, str) for part in parts):
            raise TokenizerError(f"tokenizer.json has the merge {entry!r}, which is no pair; it is damaged")
        pairs.append((parts[0], parts[1]))
    return pairs


def _scores(tokens: list[str], merges: list[tuple[str, str]]) -> list[float]:
    rank: dict[str, int] = {}
    for i, (left, right) in enumerate(merges):
        rank.setdefault(left + right, i)
    return [-float(rank[token]) if token in rank else _UNREACHABLE for token in tokens]


def _mark_unknown(model: Mapping[str, Any], ids: Mapping[str, int], types: list[int]) -> None:
    unk = model.get("unk_token")
    if isinstance(unk, str) and unk in ids:
        types[ids[unk]] = int(TokenType.UNKNOWN)


def _space_prefix(tokenizer: Mapping[str, Any]) -> bool:
    """Whether a space is put before the text: a Prepend normalizer, or a Metaspace pre-tokenizer that says so."""
    normalizer = tokenizer.get("normalizer") or {}
    steps = normalizer.get("normalizers", []) if normalizer.get("type") == "Sequence" else [normalizer]
    if any(step.get("type") == "Prepend" for step in steps):
        return True
    pre = tokenizer.get("pre_tokenizer") or {}
    if pre.get("type") != "Metaspace":
        return False
    return bool(pre.get("prepend_scheme", "always" if pre.get("add_prefix_space", True) else "never") != "never")


def _added_ends(
    tokenizer: Mapping[str, Any],
    tokenizer_config: Mapping[str, Any],
    special: Mapping[str, int],
    ids: Mapping[str, int],
) -> tuple[bool, bool]:
    """Whether encoding adds BOS and EOS: what the post-processor does, else what tokenizer_config.json asks for."""
    template = _template_processing(tokenizer.get("post_processor") or {})
    if template is None:
        return bool(tokenizer_config.get("add_bos_token")), bool(tokenizer_config.get("add_eos_token"))
    at = next((i for i, piece in enumerate(template) if "Sequence" in piece), len(template))
    before = [ids.get(piece["SpecialToken"]["id"]) for piece in template[:at] if "SpecialToken" in piece]
    after = [ids.get(piece["SpecialToken"]["id"]) for piece in template[at:] if "SpecialToken" in piece]
    return special.get("bos") in before, special.get("eos") in after


def _template_processing(processor: Mapping[str, Any]) -> list[Any] | None:
    steps = processor.get("processors", []) if processor.get("type") == "Sequence" else [processor]
    for step in steps:
        if step.get("type") == "TemplateProcessing":
            return list(step.get("single") or [])
    return None


def build_tokenizer_json(vocabulary: Vocabulary) -> dict[str, Any]:
    """A tokenizer.json that gives the ids llama.cpp gives for this vocabulary."""
    added = [
        {
            "id": i,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind in (TokenType.CONTROL, TokenType.UNKNOWN),
        }
        for i, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True))
        if kind in (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN)
    ]
    pipeline = _byte_level_pipeline(vocabulary) if vocabulary.model == "gpt2" else _spm_pipeline(vocabulary)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        **pipeline,
        "post_processor": _post_processor(vocabulary),
    }


def _byte_level_pipeline(vocabulary: Vocabulary) -> dict[str, Any]:
    pre = find_pre_tokenizer(vocabulary.pre)
    steps = [dict(step) for step in pre.steps]
    byte_level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    return {
        "normalizer": {"type": pre.normalizer} if pre.normalizer else None,
        "pre_tokenizer": steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps},
        "decoder": byte_level,
        "model": _bpe(vocabulary, [m.split(" ", 1) for m in vocabulary.merges or []], bool(pre.ignore_merges), False),
    }


def _spm_pipeline(vocabulary: Vocabulary) -> dict[str, Any]:
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    prepend = [{"type": "Prepend", "prepend": "▁"}] if vocabulary.add_space_prefix else []
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if vocabulary.add_space_prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*prepend, replace]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": _bpe(vocabulary, merges_from_scores(vocabulary), False, True),
    }


def merges_from_scores(vocabulary: Vocabulary) -> list[list[str]]:
    """BPE merges equivalent to SentencePiece scores: every split of a piece into two pieces, best score first."""
    normal = {
        token: score
        for token, kind, score in zip(vocabulary.tokens, vocabulary.types, vocabulary.scores or [], strict=True)
        if kind == TokenType.NORMAL and score > _UNREACHABLE
    }
    pieces = normal.keys() | {
        t for t, k in zip(vocabulary.tokens, vocabulary.types, strict=True) if k == TokenType.NORMAL
    }
    merges = [
        (-score, len(token[:cut]), len(token[cut:]), token[:cut], token[cut:])
        for token, score in normal.items()
        for cut in range(1, len(token))
        if token[:cut] in pieces and token[cut:] in pieces
    ]
    return [[left, right] for _, _, _, left, right in sorted(merges)]


def _bpe(vocabulary: Vocabulary, merges: list[list[str]], ignore_merges: bool, byte_fallback: bool) -> dict[str, Any]:
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
        "vocab": {
            token: i
            for i, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True))
            # filling for embedding rows without a token: reading the file back fills them again
            if not (kind == TokenType.UNUSED and token == f"[PAD{i}]")
        },
        "merges": merges,
    }


def _post_processor(vocabulary: Vocabulary) -> dict[str, Any] | None:
    """Adds BOS and EOS where the vocabulary says so."""

    def piece(name: str) -> list[dict[str, Any]]:
        return [{"SpecialToken": {"id": vocabulary.tokens[vocabulary.special[name]], "type_id": 0}}]

    before = piece("bos") if vocabulary.add_bos and "bos" in vocabulary.special else []
    after = piece("eos") if vocabulary.add_eos and "eos" in vocabulary.special else []
    if not before and not after:
        return None
    names = [p["SpecialToken"]["id"] for p in before + after]
    return {
        "type": "TemplateProcessing",
        "single": [*before, {"Sequence": {"id": "A", "type_id": 0}}, *after],
        "pair": [
            *before,
            {"Sequence": {"id": "A", "type_id": 0}},
            *after,
            {"Sequence": {"id": "B", "type_id": 1}},
        ],
        "special_tokens": {
            name: {"id": name, "ids": [vocabulary.tokens.index(name)], "tokens": [name]} for name in names
        },
    }


def dump_json(path: Path, content: Any) -> None:
    """Write readable UTF-8 JSON."""
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
