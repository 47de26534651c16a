"""A conversation: its messages, and answers that are kept however they end.

The model's memory is reused from turn to turn by itself: only what is new of the transcript is evaluated, also
after `undo` or when several conversations share a model.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from edgellm.chat.session import Memory, read_session, write_session
from edgellm.config import SamplingParams
from edgellm.errors import GenerationError
from edgellm.generation import GenerationResponse
from edgellm.speculation.drafts import DraftChoice

logger = logging.getLogger(__name__)


class ResponseStream(Iterator[GenerationResponse], Protocol):
    def close(self) -> None: ...


class ChatModel(Protocol):
    """What a conversation needs of a model (`engine.model.Model`)."""

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        params: SamplingParams | None = None,
        *,
        draft: DraftChoice = "auto",
        on_progress: Callable[[float], object] | None = None,
    ) -> ResponseStream: ...

    @property
    def memory_maker(self) -> Mapping[str, Any]: ...

    def save_memory(self) -> Memory: ...

    def restore_memory(self, memory: Memory) -> bool: ...


class Conversation:
    """Turns between a user and a model. `messages` may be read and edited; the next turn uses what it then holds."""

    def __init__(self, model: ChatModel, system: str | None = None) -> None:
        self._model = model
        self.notice = ""  # why a saved memory isn't used
        self.messages: list[dict[str, Any]] = []
        if system:
            self.messages.append({"role": "system", "content": system})

    def say(
        self,
        text: str,
        params: SamplingParams | None = None,
        *,
        draft: DraftChoice = "auto",
        on_progress: Callable[[float], object] | None = None,
    ) -> Generator[GenerationResponse, None, None]:
        """Send a message; iterate the result for the answer. draft: as in Model.generate.

        An answer that is cancelled, or no longer iterated, stays in `messages` as far as it came. If nothing came
        at all (cancelled or failed while the prompt was read) the message is taken back too. Errors: as Model.chat.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        return self._answer(asked, self._model.chat(asked, params, draft=draft, on_progress=on_progress))

    def regenerate(
        self,
        params: SamplingParams | None = None,
        *,
        draft: DraftChoice = "auto",
        on_progress: Callable[[float], object] | None = None,
    ) -> Generator[GenerationResponse, None, None]:
        """Answer the last user message again, in place of the last answer. GenerationError if there is none."""
        asked = list(self.messages)
        while asked and asked[-1]["role"] == "assistant":
            asked.pop()
        if not asked or asked[-1]["role"] == "system":
            raise GenerationError("there is nothing to answer again yet; say something first")
        return self._answer(asked, self._model.chat(asked, params, draft=draft, on_progress=on_progress))

    def _answer(self, asked: list[dict[str, Any]], stream: ResponseStream) -> Generator[GenerationResponse, None, None]:
        parts: list[str] = []
        finished = False
        try:
            for response in stream:
                parts.append(response.text)
                finished = response.finish_reason is not None
                yield response
        finally:
            stream.close()
            answer = "".join(parts)
            if answer or finished:
                self.messages = [*asked, {"role": "assistant", "content": answer}]

    def undo(self) -> str | None:
        """Take back the last user message and everything after it. Returns its text, None if there was none."""
        for i in range(len(self.messages) - 1, -1, -1):
            if self.messages[i]["role"] == "user":
                text = str(self.messages[i]["content"])
                del self.messages[i:]
                return text
        return None

    def clear(self) -> None:
        """Forget every turn; the system message stays."""
        self.messages = [m for m in self.messages[:1] if m["role"] == "system"]

    def set_system(self, text: str | None) -> None:
        """Replace the system message; None or "" removes it."""
        turns = self.messages[1:] if self.messages[:1] and self.messages[0]["role"] == "system" else self.messages
        self.messages = ([{"role": "system", "content": text}] if text else []) + turns

    def save(self, path: str | Path, *, memory: bool = True) -> None:
        """Write the conversation; the file appears whole or not at all. OutputError if it can't be written.

        memory: also what the model holds of it, so that going on needs no second reading: some kilobytes a token.
        """
        held = self._model.save_memory() if memory and self.messages else None
        write_session(Path(path), self.messages, held)

    @classmethod
    def load(cls, model: ChatModel, path: str | Path) -> Conversation:
        """A saved conversation, to go on with. SessionError if the file is missing, damaged or something else.

        Where the model can't use the saved memory, `notice` says why, and the conversation is read again by the next
        turn.
        """
        saved = read_session(Path(path), model.memory_maker)
        conversation = cls(model)
        conversation.messages = saved.messages
        conversation.notice = saved.notice
        if saved.memory is not None and not model.restore_memory(saved.memory):
            conversation.notice = "the saved memory doesn't fit this context"
        if conversation.notice:
            logger.warning("%s: %s; the conversation is read again", path, conversation.notice)
        return conversation
