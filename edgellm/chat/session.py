"""A conversation as one file: what was said, and the model's memory of it, so that going on costs no second reading.

The file: a line of JSON with the transcript, a line with its SHA-256, a line of JSON about the memory, its bytes.
The transcript comes first and stands alone: whatever happens to the rest, the conversation can be read again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from edgellm.errors import OutputError, SessionError

_FORMAT = "edgellm-conversation"
_VERSION = 2
_WITHOUT_MEMORY = 1  # version of files that hold only the first line, over several lines

Message = dict[str, Any]


@dataclass(frozen=True)
class Memory:
    """What a model remembers of `tokens`. made_by: all that must be the same for it to be used again."""

    tokens: Sequence[int]
    made_by: Mapping[str, Any]
    data: bytes = field(repr=False)


@dataclass(frozen=True)
class Saved:
    """A session that was read. memory: None where there is none, or it can't be used: then `notice` says why.

    n_forgotten: how many messages after the system message the model had been told no more (`overflow.py`).
    """

    messages: list[Message]
    memory: Memory | None = None
    notice: str = ""
    n_forgotten: int = 0


def write_session(path: Path, messages: Sequence[Message], memory: Memory | None, n_forgotten: int = 0) -> None:
    """The file appears whole or not at all; one that was there stays until then. OutputError if it can't be written."""
    forgotten = {"n_forgotten": n_forgotten} if n_forgotten else {}
    transcript = _line({"format": _FORMAT, "version": _VERSION, "messages": list(messages)} | forgotten)

    def write(file: IO[bytes]) -> None:
        file.write(transcript + hashlib.sha256(transcript).hexdigest().encode() + b"\n")
        if memory is not None:
            about = {"tokens": list(memory.tokens), "made_by": dict(memory.made_by), "n_bytes": len(memory.data)}
            sealed = hashlib.sha256(_line(about) + memory.data).hexdigest()
            file.write(_line(about | {"sha256": sealed}) + memory.data)

    try:
        _write_atomically(path, write)
    except OSError as exc:
        raise OutputError(f"cannot write {path}: {exc.strerror or exc}; choose another place") from exc


def read_session(path: Path, made_by: Mapping[str, Any] | None) -> Saved:
    """made_by: of the model that shall go on; None = only the transcript is wanted.

    SessionError where there is no transcript: no such file, damaged, or something else.
    """
    try:
        content = path.read_bytes()
    except OSError as exc:
        raise SessionError(f"cannot read {path}: {exc.strerror or exc}; check the path") from exc
    transcript, _, rest = content.partition(b"\n")
    document = _document(path, transcript, content)
    saved = Saved(_messages(path, document), n_forgotten=_n_forgotten(document))
    if document["version"] == _WITHOUT_MEMORY or not rest:
        return saved
    seal, _, rest = rest.partition(b"\n")
    if seal.decode("latin-1") != hashlib.sha256(transcript + b"\n").hexdigest():
        return replace(saved, notice="the file is damaged: its text may have changed, its memory isn't used")
    if not rest:
        return saved
    memory, notice = _memory(rest, made_by)
    return replace(saved, memory=memory, notice=notice)


def read_transcript(path: Path) -> list[Message]:
    """Only what was said, without reading the memory behind it. SessionError as in `read_session`."""
    try:
        with path.open("rb") as file:
            line = file.readline()
    except OSError as exc:
        raise SessionError(f"cannot read {path}: {exc.strerror or exc}; check the path") from exc
    return _messages(path, _document(path, line.rstrip(b"\n"), line))


def _document(path: Path, transcript: bytes, content: bytes) -> dict[str, Any]:
    try:
        document = json.loads(transcript if transcript.endswith(b"}") else content)
    except (ValueError, RecursionError) as exc:
        raise SessionError(f"{path} is damaged or no saved conversation: {str(exc)[:100]}") from exc
    if not isinstance(document, dict) or document.get("format") != _FORMAT:
        raise SessionError(f"{path} is not a conversation saved by edgellm")
    if document.get("version") not in (_WITHOUT_MEMORY, _VERSION):
        raise SessionError(f"{path} has version {document.get('version')!r}, this edgellm reads {_VERSION}; update it")
    return document


def _messages(path: Path, document: Mapping[str, Any]) -> list[Message]:
    messages = document.get("messages")
    if not isinstance(messages, list) or not all(_is_message(m) for m in messages):
        raise SessionError(f"{path} is damaged: its messages aren't a list of role and content")
    return messages


def _n_forgotten(document: Mapping[str, Any]) -> int:
    n = document.get("n_forgotten", 0)
    return n if isinstance(n, int) and n > 0 else 0


def _is_message(value: object) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str) and isinstance(value.get("content"), str)


def _memory(rest: bytes, made_by: Mapping[str, Any] | None) -> tuple[Memory | None, str]:
    """The memory, or why it isn't used."""
    line, _, data = rest.partition(b"\n")
    try:
        about = json.loads(line)
        sealed = about.pop("sha256")
        n_bytes, tokens, theirs = about["n_bytes"], about["tokens"], about["made_by"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None, "the saved memory is damaged"
    if len(data) != n_bytes:
        return None, f"the saved memory is truncated: {len(data)} of {n_bytes} bytes"
    if hashlib.sha256(_line(about) + data).hexdigest() != sealed:
        return None, "the saved memory is damaged"
    if made_by is not None and (other := _difference(made_by, theirs)):
        return None, f"the saved memory was made with another {other}"
    return Memory(tokens, theirs, data), ""


def _difference(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """The name of what differs first; "" if nothing does."""
    same = json.loads(json.dumps(dict(ours)))
    return next((name for name in {**same, **theirs} if same.get(name) != theirs.get(name)), "")


def _line(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


def _write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    handle, partial = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(partial)
        raise
