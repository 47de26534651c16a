"""Conversations that are kept under a name, in the user's data folder."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from edgellm.chat.conversation import ChatModel, Conversation
from edgellm.chat.session import Message, read_transcript
from edgellm.errors import OutputError, SessionError

_NAME = re.compile(r"[\w-]{1,50}")
_SUFFIX = ".session"
# Windows opens devices under these names, with any suffix
_DEVICES = {"con", "prn", "aux", "nul", *(f"{kind}{i}" for kind in ("com", "lpt") for i in range(10))}


def is_session_name(text: str) -> bool:
    """Letters, digits, `-` and `_`, 50 at most: a name, where a path has a dot or a slash."""
    return _NAME.fullmatch(text) is not None and text.lower() not in _DEVICES


def sessions_folder() -> Path:
    from platformdirs import user_data_path

    return user_data_path("edgellm") / "sessions"


@dataclass(frozen=True)
class SessionInfo:
    """One kept conversation. modified: seconds since the epoch. trouble: why it can't be read; "" = it can."""

    name: str
    n_messages: int
    first_words: str
    modified: float
    n_bytes: int
    trouble: str = ""


def list_sessions() -> list[SessionInfo]:
    """All of them, the latest first. Only the transcripts are read."""
    return sorted(_infos(), key=lambda info: info.modified, reverse=True)


def _infos() -> Iterator[SessionInfo]:
    for path in sessions_folder().glob(f"*{_SUFFIX}"):
        name = path.name.removesuffix(_SUFFIX)
        if not is_session_name(name):
            continue
        try:
            about = path.stat()
            messages, trouble = read_transcript(path), ""
        except SessionError as exc:
            messages, trouble = [], str(exc)
        except OSError:  # deleted since
            continue
        said = next((str(m["content"]) for m in messages if m["role"] == "user"), "")
        yield SessionInfo(name, len(messages), said, about.st_mtime, about.st_size, trouble)


class NamedSession:
    """The file of one name. SessionError: not a name."""

    def __init__(self, name: str) -> None:
        if not is_session_name(name):
            raise SessionError(f"{name!r} can't name a session; use letters, digits, - and _, 50 at most")
        self.name = name
        self.path = sessions_folder() / f"{name}{_SUFFIX}"
        self._kept: tuple[list[Message], int] = ([], 0)
        self._kept_memory = True
        self._stamp = self._read_stamp()

    @property
    def exists(self) -> bool:
        return self.path.exists()

    def load(self, model: ChatModel) -> Conversation:
        """Errors as Conversation.load: what is damaged beyond reading is never written over."""
        conversation = Conversation.load(model, self.path)
        self._kept = _state(conversation)
        self._stamp = self._read_stamp()
        return conversation

    def keep(self, conversation: Conversation, *, memory: bool) -> None:
        """Write what changed since it was loaded or kept last; memory: with what the model holds.

        OutputError: it can't be written, or another chat has written it meanwhile.
        """
        state = _state(conversation)
        if state == self._kept and (self._kept_memory or not memory):
            return
        if not self.exists and not any(message["role"] == "user" for message in state[0]):
            return  # nothing was said yet
        if self._read_stamp() != self._stamp:
            raise OutputError(
                f"another chat has written the session {self.name} since; /save OTHER-NAME keeps this conversation"
            )
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as exc:
            raise OutputError(f"cannot make {self.path.parent}: {exc.strerror or exc}; /save FILE elsewhere") from exc
        conversation.save(self.path, memory=memory)
        self._kept, self._kept_memory = state, memory
        self._stamp = self._read_stamp()

    def _read_stamp(self) -> tuple[int, int] | None:
        try:
            about = os.stat(self.path)
        except OSError:
            return None
        return about.st_mtime_ns, about.st_size


def _state(conversation: Conversation) -> tuple[list[Message], int]:
    return list(conversation.messages), conversation.n_forgotten
