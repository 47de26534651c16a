"""The parts of SentencePiece's model file that decide tokenization, read from its protobuf wire format.

Field numbers: https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from edgellm.errors import TokenizerError

UNIGRAM, BPE = 1, 2  # TrainerSpec.ModelType
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
Value = int | bytes


@dataclass(frozen=True)
class SentencePieceModel:
    """Pieces as (text, score, type), the type as GGUF numbers it too; special: name → id, -1 where there is none."""

    pieces: list[tuple[str, float, int]]
    kind: int
    byte_fallback: bool
    special: dict[str, int]
    charsmap: bytes
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool


def parse_sentencepiece(content: bytes) -> SentencePieceModel:
    """A tokenizer.model's content; TokenizerError for anything else."""
    try:
        fields = list(_fields(content))
        pieces = [_piece(dict(_fields(value))) for number, value in fields if number == 1 and isinstance(value, bytes)]
        trainer, normalizer = (_message(fields, number) for number in (2, 3))
    except (IndexError, ValueError, struct.error) as exc:
        raise TokenizerError("tokenizer.model is no SentencePiece model; copy it again") from exc
    if not pieces:
        raise TokenizerError("tokenizer.model has no pieces; copy it again")
    charsmap = normalizer.get(2, b"")
    ids = {name: _signed(trainer.get(40 + i, i)) for i, name in enumerate(("unk", "bos", "eos"))}
    return SentencePieceModel(
        pieces=pieces,
        kind=_number(trainer.get(3, UNIGRAM)),
        byte_fallback=bool(trainer.get(35, 0)),
        special=ids | {"pad": _signed(trainer.get(43, -1))},
        charsmap=charsmap if isinstance(charsmap, bytes) else b"",
        add_dummy_prefix=bool(normalizer.get(3, 1)),
        remove_extra_whitespaces=bool(normalizer.get(4, 1)),
    )


def _message(fields: list[tuple[int, Value]], number: int) -> dict[int, Value]:
    content = next((value for n, value in fields if n == number), b"")
    return dict(_fields(content)) if isinstance(content, bytes) else {}


def _piece(fields: dict[int, Value]) -> tuple[str, float, int]:
    text, score = fields.get(1, b""), fields.get(2, bytes(4))
    if not isinstance(text, bytes) or not isinstance(score, bytes):
        raise ValueError("no piece")
    return text.decode("utf-8"), float(struct.unpack("<f", score)[0]), _number(fields.get(3, 1))


def _number(value: Value) -> int:
    if not isinstance(value, int):
        raise ValueError("no number")
    return value


def _signed(value: Value) -> int:
    number = _number(value)
    return number - (1 << 64) if number >> 63 else number


def _fields(content: bytes) -> Iterator[tuple[int, Value]]:
    """(field number, value) pairs: an int for a varint, the bytes of everything else."""
    at = 0
    while at < len(content):
        tag, at = _varint(content, at)
        wire = tag & 7
        if wire == _VARINT:
            value, at = _varint(content, at)
            yield tag >> 3, value
            continue
        if wire == _BYTES:
            size, at = _varint(content, at)
        elif wire in (_FIXED64, _FIXED32):
            size = 8 if wire == _FIXED64 else 4
        else:
            raise ValueError("unknown wire type")
        if at + size > len(content):
            raise ValueError("cut short")
        yield tag >> 3, content[at : at + size]
        at += size


def _varint(content: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = content[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("number too long")
