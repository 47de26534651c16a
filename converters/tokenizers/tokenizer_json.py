"""tokenizer.json (the `tokenizers` library's format) to a vocabulary, and back: what all kinds of models share.

The kinds are in byte_level.py, byte_fallback.py, unigram.py and wordpiece.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from converters.sources.huggingface import read_json_object
from converters.tokenizers.byte_fallback import byte_fallback_pipeline, read_byte_fallback
from converters.tokenizers.byte_level import byte_level_pipeline, read_byte_level
from converters.tokenizers.special import read_optional_json, read_templates, special_ids
from converters.tokenizers.unigram import read_unigram, unigram_pipeline
from converters.tokenizers.vocabulary import TokenType, Vocabulary, filled_entry
from converters.tokenizers.wordpiece import read_wordpiece, wordpiece_pipeline
from edgellm.errors import TokenizerError

_Read = Callable[[Mapping[str, Any], Vocabulary, str | None], Vocabulary]
_PIPELINES: Mapping[str, Callable[[Vocabulary], dict[str, Any]]] = {
    "gpt2": byte_level_pipeline,
    "llama": byte_fallback_pipeline,
    "gemma4": byte_fallback_pipeline,
    "t5": unigram_pipeline,
    "bert": wordpiece_pipeline,
}


def read_tokenizer_json(folder: Path, config: Mapping[str, Any], pre: str | None = None) -> Vocabulary:
    """The vocabulary of a folder's tokenizer.json. pre overrides the pre-tokenizer's identification."""
    tokenizer = read_json_object(folder / "tokenizer.json")
    _check_form(folder / "tokenizer.json", tokenizer)
    read = _reader(tokenizer.get("model"))
    tokens, types = _tokens(tokenizer)
    ids = {token: i for i, token in enumerate(tokens)}
    special = special_ids(folder, config, ids)
    settings = read_optional_json(folder / "tokenizer_config.json")
    ends, notes = _ends(tokenizer, settings, special, ids)
    shared = Vocabulary(
        model="",
        pre="default",
        tokens=tokens,
        types=types,
        special=special | ends,
        add_bos="bos" in ends,
        add_eos="eos" in ends,
        templates=read_templates(folder),
        notes=(*notes, *_strip_notes(tokenizer)),
    )
    return read(tokenizer, shared, pre)


def _check_form(path: Path, tokenizer: Mapping[str, Any]) -> None:
    """Each part is a table or absent, each list of steps a list of tables."""
    parts = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "post_processor": "processors"}
    lists = {"added_tokens": tokenizer.get("added_tokens")}
    for part, steps in parts.items():
        found = tokenizer.get(part)
        if not isinstance(found, dict | None):
            raise TokenizerError(f"{path} is damaged: its {part} is no table; copy it again")
        lists[steps] = (found or {}).get(steps)
    for name, entries in lists.items():
        if not isinstance(entries, list | None) or not all(isinstance(entry, dict) for entry in entries or ()):
            raise TokenizerError(f"{path} is damaged: its {name} are no list of tables; copy it again")


def _reader(model: Any) -> _Read:
    """The function for a kind of model; TokenizerError where there is none."""
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(vocab, (dict, list)) or not vocab:
        raise TokenizerError("tokenizer.json has no vocabulary table; it is damaged")
    kind = model.get("type") or ("Unigram" if isinstance(vocab, list) else "BPE")  # older files don't say
    if kind == "BPE" and isinstance(vocab, dict):
        return read_byte_fallback if model.get("byte_fallback") else read_byte_level
    if kind == "WordPiece" and isinstance(vocab, dict):
        return read_wordpiece
    if kind == "Unigram" and isinstance(vocab, list):
        return read_unigram
    raise TokenizerError(f"tokenizer.json is a {kind} tokenizer; supported are BPE, Unigram and WordPiece")


def _tokens(tokenizer: Mapping[str, Any]) -> tuple[list[str], list[int]]:
    """Text and type of every id; an id nobody has becomes an unused entry."""
    byte_pieces = bool(tokenizer["model"].get("byte_fallback"))
    by_id: dict[int, tuple[str, int]] = {}
    for text, number in _entries(tokenizer["model"]["vocab"]):
        is_byte = byte_pieces and len(text) == 6 and text.startswith("<0x") and text.endswith(">")
        by_id[_id(number)] = (text, TokenType.BYTE if is_byte else TokenType.NORMAL)
    for entry in tokenizer.get("added_tokens") or []:
        kind = TokenType.CONTROL if entry.get("special") else TokenType.USER_DEFINED
        by_id[_id(entry.get("id"))] = (str(entry.get("content")), kind)
    n = max(by_id, default=-1) + 1
    if n > 2 * len(by_id) + 1000:
        raise TokenizerError(f"tokenizer.json has ids up to {n - 1} for {len(by_id)} tokens; it is damaged")
    entries = [by_id.get(i, (filled_entry(i), TokenType.UNUSED)) for i in range(n)]
    return [text for text, _ in entries], [int(kind) for _, kind in entries]


def _entries(vocab: Any) -> list[tuple[str, Any]]:
    """(text, id) pairs of a table, or of Unigram's list of [text, score]."""
    if isinstance(vocab, dict):
        return list(vocab.items())
    for entry in vocab:
        if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[0], str):
            raise TokenizerError(f"tokenizer.json has the piece {str(entry)[:60]}; it is damaged")
    return [(entry[0], i) for i, entry in enumerate(vocab)]


def _id(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise TokenizerError(f"tokenizer.json has a token with id {value!r}; it is damaged")
    return value


def _ends(
    tokenizer: Mapping[str, Any], settings: Mapping[str, Any], special: Mapping[str, int], ids: Mapping[str, int]
) -> tuple[dict[str, int], list[str]]:
    """The tokens that encoding puts before ("bos") and after ("eos") a text, and a note on what llama.cpp can't add.

    The post-processor decides where it has a template, else what tokenizer_config.json asks for.
    """
    ends = _added(tokenizer.get("post_processor") or {}, ids)
    if ends is None:
        return {
            name: special[name] for name in ("bos", "eos") if settings.get(f"add_{name}_token") and name in special
        }, []
    found = {name: numbers[0] for name, numbers in zip(("bos", "eos"), ends, strict=True) if numbers}
    many = any(len(numbers) > 1 for numbers in ends)
    return found, ["the tokenizer adds several tokens around a text, llama.cpp one on each side"] if many else []


def _added(processor: Mapping[str, Any], ids: Mapping[str, int]) -> tuple[list[int], list[int]] | None:
    """Ids that a post-processor puts before and after a single text; None where it has no template."""
    steps = processor.get("processors", []) if processor.get("type") == "Sequence" else [processor]
    for step in steps:
        if step.get("type") in ("BertProcessing", "RobertaProcessing"):
            return [_id(step["cls"][1])], [_id(step["sep"][1])]
        if step.get("type") == "TemplateProcessing":
            template = list(step.get("single") or [])
            at = next((i for i, piece in enumerate(template) if "Sequence" in piece), len(template))
            return _named(template[:at], ids), _named(template[at:], ids)
    return None


def _named(pieces: list[Any], ids: Mapping[str, int]) -> list[int]:
    names = [piece["SpecialToken"]["id"] for piece in pieces if "SpecialToken" in piece]
    return [ids[name] for name in names if name in ids]


def _strip_notes(tokenizer: Mapping[str, Any]) -> list[str]:
    """Added tokens that swallow spaces beside them; no GGUF can say so."""
    names = [str(t.get("content")) for t in tokenizer.get("added_tokens") or [] if t.get("lstrip") or t.get("rstrip")]
    if not names:
        return []
    return [f"the tokenizer drops spaces beside {', '.join(names[:3])}, llama.cpp keeps them"]


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
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        **_PIPELINES[vocabulary.model](vocabulary),
        "post_processor": _post_processor(vocabulary),
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
