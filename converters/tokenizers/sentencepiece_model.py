"""tokenizer.model, SentencePiece's own file, through the sentencepiece library (extra `sentencepiece`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from converters.tokenizers.special import read_optional_json, read_templates, special_ids
from converters.tokenizers.vocabulary import TokenType, Vocabulary
from edgellm.errors import TokenizerError


def read_sentencepiece_model(folder: Path, config: Mapping[str, Any]) -> Vocabulary:
    """Pieces, scores and types of a folder's tokenizer.model, with the tokens added since."""
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError as exc:
        raise TokenizerError(
            'the checkpoint has only a SentencePiece tokenizer.model; `pip install "edgellm[sentencepiece]"` to read it'
        ) from exc
    processor = SentencePieceProcessor()
    try:
        processor.LoadFromFile(str(folder / "tokenizer.model"))
    except (OSError, RuntimeError) as exc:
        raise TokenizerError(f"{folder / 'tokenizer.model'} is no SentencePiece model; copy it again") from exc
    n = processor.GetPieceSize()
    tokens = [processor.IdToPiece(i) for i in range(n)]
    scores = [float(processor.GetScore(i)) for i in range(n)]
    types = [_type(processor, i) for i in range(n)]
    tokenizer_config = read_optional_json(folder / "tokenizer_config.json")
    _add_tokens(tokens, scores, types, _added_tokens(folder, tokenizer_config))
    ids = {token: i for i, token in enumerate(tokens)}
    special = {"bos": processor.bos_id(), "eos": processor.eos_id(), "unk": processor.unk_id()}
    special = {name: number for name, number in special.items() if number >= 0}
    return Vocabulary(
        model="llama",
        pre="default",
        tokens=tokens,
        types=types,
        scores=scores,
        special=special | special_ids(folder, config, ids),
        add_bos=bool(tokenizer_config.get("add_bos_token", True)),
        add_eos=bool(tokenizer_config.get("add_eos_token", False)),
        add_space_prefix=processor.EncodeAsPieces("a")[:1] != ["a"],
        templates=read_templates(folder),
    )


def _type(processor: Any, i: int) -> int:
    if processor.IsUnknown(i):
        return int(TokenType.UNKNOWN)
    if processor.IsControl(i):
        return int(TokenType.CONTROL)
    if processor.IsUnused(i):
        return int(TokenType.UNUSED)
    return int(TokenType.BYTE if processor.IsByte(i) else TokenType.NORMAL)


def _added_tokens(folder: Path, tokenizer_config: Mapping[str, Any]) -> dict[int, tuple[str, bool]]:
    """Id → (text, special) of tokens a fine-tune added; newer files say more than added_tokens.json."""
    added = {
        int(number): (text, True)
        for text, number in read_optional_json(folder / "added_tokens.json").items()
        if type(number) is int
    }
    for number, entry in (tokenizer_config.get("added_tokens_decoder") or {}).items():
        if str(number).isdecimal() and isinstance(entry, dict) and isinstance(entry.get("content"), str):
            added[int(number)] = (entry["content"], bool(entry.get("special")))
    return added


def _add_tokens(
    tokens: list[str], scores: list[float], types: list[int], added: Mapping[int, tuple[str, bool]]
) -> None:
    for number, (text, special) in sorted(added.items()):
        if number > len(tokens) + 100_000:
            raise TokenizerError(f"an added token has id {number}, the tokenizer {len(tokens)} pieces; it is damaged")
        for i in range(len(tokens), number + 1):
            tokens.append(f"[PAD{i}]")
            scores.append(0.0)
            types.append(int(TokenType.UNUSED))
        if types[number] != TokenType.UNKNOWN:
            types[number] = int(TokenType.CONTROL if special else TokenType.USER_DEFINED)
        tokens[number] = text
