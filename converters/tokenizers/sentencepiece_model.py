"""tokenizer.model, SentencePiece's own file.

The sentencepiece library (extra `sentencepiece`) is what the result is checked against, so it must be there.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from converters.tokenizers.byte_fallback import check_byte_pieces
from converters.tokenizers.sentencepiece_proto import BPE, UNIGRAM, SentencePieceModel, parse_sentencepiece
from converters.tokenizers.special import read_optional_json, read_templates, special_ids
from converters.tokenizers.unigram import refuse_byte_fallback
from converters.tokenizers.vocabulary import TokenType, Vocabulary, filled_entry
from edgellm.errors import TokenizerError


def read_sentencepiece_model(path: Path, config: Mapping[str, Any]) -> Vocabulary:
    """Pieces, scores and types of a tokenizer.model, with the tokens added since, from the files beside it."""
    if importlib.util.find_spec("sentencepiece") is None:
        raise TokenizerError(
            'the checkpoint has only a SentencePiece tokenizer.model; `pip install "edgellm[sentencepiece]"` to read it'
        )
    try:
        model = parse_sentencepiece(path.read_bytes())
    except OSError as exc:
        raise TokenizerError(f"cannot read {path}: {exc.strerror or exc}") from exc
    if model.kind not in (BPE, UNIGRAM):
        raise TokenizerError(f"{path} is a SentencePiece model of words or characters; llama.cpp knows BPE and Unigram")
    tokens, scores, types = (list(column) for column in zip(*model.pieces, strict=True))
    if model.kind == BPE:
        check_byte_pieces(tokens)
    else:
        refuse_byte_fallback(model.byte_fallback)
    folder = path.parent
    settings = read_optional_json(folder / "tokenizer_config.json")
    _add_tokens(tokens, scores, types, _added_tokens(folder, settings))
    for i, kind in enumerate(types):
        if kind == TokenType.USER_DEFINED:
            tokens[i] = tokens[i].replace("▁", " ")  # llama.cpp looks for them in the text as it comes
    ids = {token: i for i, token in enumerate(tokens)}
    special = {name: i for name, i in model.special.items() if 0 <= i < len(tokens)}
    special |= special_ids(folder, config, ids)
    return Vocabulary(
        model="llama" if model.kind == BPE else "t5",
        pre="default",
        tokens=tokens,
        types=[int(kind) for kind in types],
        scores=scores,
        special=special,
        add_bos=bool(settings.get("add_bos_token", True)) and "bos" in special,
        add_eos=bool(settings.get("add_eos_token", False)) and "eos" in special,
        add_space_prefix=model.add_dummy_prefix,
        charsmap=model.charsmap if model.kind == UNIGRAM else b"",
        remove_extra_whitespaces=model.remove_extra_whitespaces if model.kind == UNIGRAM else None,
        templates=read_templates(folder),
        notes=_notes(model),
    )


def _notes(model: SentencePieceModel) -> tuple[str, ...]:
    """What the tokenizer does and llama.cpp doesn't."""
    notes = []
    if model.kind == BPE and model.charsmap:
        notes.append("the tokenizer normalizes text, llama.cpp doesn't: normalize it yourself where it matters")
    if model.kind == BPE and model.remove_extra_whitespaces:
        notes.append("the tokenizer makes runs of spaces one, llama.cpp doesn't")
    return tuple(notes)


def _added_tokens(folder: Path, settings: Mapping[str, Any]) -> dict[int, tuple[str, bool]]:
    """Id → (text, special) of tokens a fine-tune added; newer files say more than added_tokens.json."""
    added = {
        int(number): (text, True)
        for text, number in read_optional_json(folder / "added_tokens.json").items()
        if type(number) is int
    }
    for number, entry in (settings.get("added_tokens_decoder") or {}).items():
        if str(number).isdecimal() and isinstance(entry, dict) and isinstance(entry.get("content"), str):
            added[int(number)] = (entry["content"], bool(entry.get("special")))
    return added


def _add_tokens(
    tokens: list[str], scores: list[float], types: list[int], added: Mapping[int, tuple[str, bool]]
) -> None:
    for number, (text, special) in sorted(added.items()):
        if not 0 <= number <= len(tokens) + 100_000:
            raise TokenizerError(f"an added token has id {number}, the tokenizer {len(tokens)} pieces; it is damaged")
        for i in range(len(tokens), number + 1):
            tokens.append(filled_entry(i))
            scores.append(0.0)
            types.append(int(TokenType.UNUSED))
        if types[number] != TokenType.UNKNOWN:
            types[number] = int(TokenType.CONTROL if special else TokenType.USER_DEFINED)
        tokens[number] = text
