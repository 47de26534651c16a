"""What a host and its engine process say to each other: frames over two pipes, and how values are written in them.

A frame is a header (bytes of JSON, bytes of data; little-endian), a JSON object, and raw data for what is large:
arrays, saved memories. Nothing that is read can name code to run, for native code may have been taken over by the
file it read.

From the host: {"id", "do", …} starts a call; about one that runs: {"cancel": id}, {"more": id} (room for further
items), {"request": …, "id"} (what it wanted; null: no more). From the engine, about the call "id": "progress",
"item", "want", and at the end "done" or "error"; {"log": [logger, level, text]}.
"""

from __future__ import annotations

import builtins
import io
import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import fields
from operator import attrgetter
from pathlib import Path
from typing import Any

from edgellm import errors
from edgellm.config import SamplingParams
from edgellm.constraint import schema_text
from edgellm.errors import EdgeLLMError, GenerationError
from edgellm.generation import GenerationResponse, GenerationStats

Message = dict[str, Any]

WINDOW = 32  # items the engine may be ahead of their consumer
REFILL = WINDOW // 2  # after so many that were consumed, the engine hears of it

_HEADER = struct.Struct("<IQ")
_MOST_JSON = 1 << 28  # bytes: more is no message of ours
_FIGURES = tuple(field.name for field in fields(GenerationStats))
_SETTINGS = tuple(field.name for field in fields(SamplingParams) if field.name != "schema")
_figures_of = attrgetter(*_FIGURES)
_PLAIN_ERRORS = ("ValueError", "TypeError", "MemoryError", "OSError", "RuntimeError")


class ProtocolError(Exception):
    """What was read is no frame."""


def pack(message: Mapping[str, Any], n_data: int = 0) -> bytes:
    """A frame without its data. GenerationError: a value that isn't data."""
    try:
        text = json.dumps(message, separators=(",", ":"), default=_as_data).encode()
    except (TypeError, ValueError, RecursionError) as exc:
        raise GenerationError(f"this can't be handed to a model in another process: {exc}") from exc
    return _HEADER.pack(len(text), n_data) + text


def read_frame(file: io.BufferedReader) -> tuple[Message, bytearray] | None:
    """(message, data), None at the end. Errors: ProtocolError, OSError, MemoryError, OverflowError."""
    header = file.read(_HEADER.size)
    if len(header) < _HEADER.size:
        return None
    n_text, n_data = _HEADER.unpack(header)
    if n_text > _MOST_JSON:
        raise ProtocolError(f"a message of {n_text} bytes")
    text, data = file.read(n_text), bytearray(n_data)
    if len(text) < n_text or (n_data and file.readinto(data) < n_data):
        return None
    try:
        message = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise ProtocolError(f"a message that isn't JSON ({exc})") from exc
    if not isinstance(message, dict):
        raise ProtocolError("a message that is no object")
    return message, data


def _as_data(value: Any) -> Any:
    """What json asks about everything it doesn't know."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):  # numpy's arrays and numbers
        return value.tolist()
    if isinstance(value, Sequence):
        return list(value)
    raise TypeError(f"{type(value).__name__} is neither text, a number, a list nor a mapping")


def sampling_as_data(params: SamplingParams) -> Message:
    """GenerationError: the schema is none."""
    data = {name: getattr(params, name) for name in _SETTINGS}
    return data if params.schema is None else data | {"schema": schema_text(params.schema)}


def sampling_of(data: Mapping[str, Any]) -> SamplingParams:
    return SamplingParams(**data)


def response_as_data(response: GenerationResponse) -> list[Any]:
    stats = _figures_of(response.stats)
    return [response.text, response.token_ids, response.from_draft, response.finish_reason, stats]


def response_of(data: Sequence[Any]) -> GenerationResponse:
    text, token_ids, from_draft, finish_reason, stats = data
    return GenerationResponse(text, tuple(token_ids), tuple(from_draft), finish_reason, GenerationStats(*stats))


def error_as_data(exc: Exception) -> list[str]:
    return [type(exc).__name__, str(exc)]


def error_of(data: Sequence[str]) -> Exception:
    """The error as it was raised in the engine; EdgeLLMError for one that callers aren't told of by its class."""
    name, text = data
    kind = getattr(errors, name, None)
    if isinstance(kind, type) and issubclass(kind, EdgeLLMError):
        return kind(text)
    if name in _PLAIN_ERRORS:
        plain: type[Exception] = getattr(builtins, name)
        return plain(text)
    return EdgeLLMError(f"the engine failed: {name}: {text}"[:300])
