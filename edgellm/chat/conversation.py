"""A conversation: its messages, and answers that are kept however they end.

The model's memory is reused from turn to turn by itself: only what is new of the transcript is evaluated, also
after `undo` or when several conversations share a model. What no longer fits the context is left out (`overflow.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any, Protocol

from edgellm.chat.overflow import Overflow, choose_forgotten, n_leading, without_forgotten
from edgellm.chat.session import Memory, read_session, write_session
from edgellm.chat.thinking import opened_thinking, split_thinking
from edgellm.config import SamplingParams
from edgellm.errors import GenerationError
from edgellm.generation import GenerationResponse
from edgellm.speculation.drafts import DraftChoice

logger = logging.getLogger(__name__)

_PROMPT_END = 16  # tokens that may hold the tag by which a template opens the thinking


class ResponseStream(Iterator[GenerationResponse], Protocol):
    def close(self) -> None: ...


class ChatModel(Protocol):
    """What a conversation needs of a model (`engine.model.Model`)."""

    n_ctx: int

    def chat_tokens(self, messages: Sequence[Mapping[str, Any]], *, answer_follows: bool = True) -> list[int]: ...

    def detokenize(self, ids: Sequence[int], *, special: bool = False) -> str: ...

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


@dataclass(frozen=True)
class ContextUsage:
    """How the next prompt fills the context, in tokens. instructions: all that precedes the first turn's text, also
    what the template itself puts there. n_forgotten: messages that are left out.
    """

    instructions: int
    turns: int
    n_ctx: int
    n_forgotten: int

    @property
    def free(self) -> int:
        return max(0, self.n_ctx - self.instructions - self.turns)


class Conversation:
    """Turns between a user and a model. `messages` may be read and edited; the next turn uses what it then holds.

    overflow: what happens when the context has no room for an answer any more. "drop": the oldest turns are left out of
    the prompt, until half of it is free; `messages` keeps them, `n_forgotten` says how many of those after the system
    message were left out of the last prompt. "error": ContextFull when the prompt itself doesn't fit.
    """

    def __init__(self, model: ChatModel, system: str | None = None, *, overflow: Overflow = "drop") -> None:
        if overflow not in ("drop", "error"):
            raise GenerationError(f'overflow is {overflow!r}; it takes "drop" or "error"')
        self._model = model
        self._overflow = overflow
        self.n_forgotten = 0
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
        at all (cancelled or failed while the prompt was read) the message is taken back too. Where the template itself
        opens the thinking (`<think>`), the answer begins with that tag. Errors: as Model.chat; ContextFull at once
        where the message doesn't even fit alone.
        """
        return self._ask([*self.messages, {"role": "user", "content": text}], params, draft, on_progress)

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
        return self._ask(asked, params, draft, on_progress)

    def _ask(
        self,
        asked: list[dict[str, Any]],
        params: SamplingParams | None,
        draft: DraftChoice,
        on_progress: Callable[[float], object] | None,
    ) -> Generator[GenerationResponse, None, None]:
        n_forgotten = self._choose_forgotten(asked, params)
        sent = without_forgotten(asked, n_forgotten)
        opening = opened_thinking(self._model.detokenize(self._model.chat_tokens(sent)[-_PROMPT_END:], special=False))
        stream = self._model.chat(sent, params, draft=draft, on_progress=on_progress)
        if n_forgotten > self.n_forgotten:
            logger.info("%d messages no longer fit the context and are left out", n_forgotten)
        self.n_forgotten = n_forgotten
        return self._answer(asked, opening, stream)

    def _choose_forgotten(self, asked: Sequence[Mapping[str, Any]], params: SamplingParams | None) -> int:
        if self._overflow == "error":
            return 0
        max_tokens = params.max_tokens if params else None

        def count_tokens(messages: Sequence[Mapping[str, Any]]) -> int:
            return len(self._model.chat_tokens(messages))

        return choose_forgotten(asked, self.n_forgotten, self._model.n_ctx, max_tokens, count_tokens)

    def _answer(
        self, asked: list[dict[str, Any]], opening: str, stream: ResponseStream
    ) -> Generator[GenerationResponse, None, None]:
        parts: list[str] = []
        finished = False
        try:
            for response in stream:
                if opening and not parts:
                    response = replace(response, text=opening + response.text)
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
        self.messages = self.messages[: n_leading(self.messages)]
        self.n_forgotten = 0

    def set_system(self, text: str | None) -> None:
        """Replace the system message; None or "" removes it."""
        turns = self.messages[1:] if self.messages[:1] and self.messages[0]["role"] == "system" else self.messages
        self.messages = ([{"role": "system", "content": text}] if text else []) + turns

    def use_model(self, model: ChatModel) -> None:
        """Go on with another model, which reads the conversation at the next turn."""
        self._model = model
        self.n_forgotten = 0

    @property
    def last_answer(self) -> str | None:
        """Without the thinking; None where the last message isn't an answer."""
        last = self.messages[-1] if self.messages else {"role": ""}
        return split_thinking(str(last["content"]))[1] if last["role"] == "assistant" else None

    def prompt(self, text: str | None = None) -> str:
        """What the model would read, control tokens written out, if the user said `text` next; None = what it has read
        by now. GenerationError where there is nothing, or the template refuses it; ContextFull as in `say`.
        """
        messages = self.messages if text is None else [*self.messages, {"role": "user", "content": text}]
        if not messages:
            raise GenerationError("there is no prompt yet; say something first")
        if text is None:
            ids = self._model.chat_tokens(self._sent(), answer_follows=False)
        else:
            n_forgotten = self._choose_forgotten(messages, None)
            ids = self._model.chat_tokens(without_forgotten(messages, n_forgotten))
        return self._model.detokenize(ids, special=True)

    def usage(self) -> ContextUsage:
        """How full the context is by now. GenerationError where the template refuses the messages."""
        lead = self.messages[: n_leading(self.messages)]
        one, other = (self._model.chat_tokens([*lead, {"role": "user", "content": text}]) for text in "ab")
        instructions = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
        sent = self._sent()
        used = len(self._model.chat_tokens(sent, answer_follows=False)) if len(sent) > len(lead) else 0
        n_forgotten = len(self.messages) - len(sent)
        return ContextUsage(instructions, max(0, used - instructions), self._model.n_ctx, n_forgotten)

    def _sent(self) -> list[Mapping[str, Any]]:
        """What the last prompt held of the messages there are now; all of them where nothing else is left."""
        n_turns = len(self.messages) - n_leading(self.messages)
        return without_forgotten(self.messages, self.n_forgotten if self.n_forgotten < n_turns else 0)

    def save(self, path: str | Path, *, memory: bool = True) -> None:
        """Write the conversation; the file appears whole or not at all. OutputError if it can't be written.

        memory: also what the model holds of it, so that going on needs no second reading: some kilobytes a token.
        """
        held = self._model.save_memory() if memory and self.messages else None
        write_session(Path(path), self.messages, held, self.n_forgotten)

    @classmethod
    def load(cls, model: ChatModel, path: str | Path, *, overflow: Overflow = "drop") -> Conversation:
        """A saved conversation, to go on with. SessionError if the file is missing, damaged or something else.

        Where the model can't use the saved memory, `notice` says why, and the conversation is read again by the next
        turn.
        """
        saved = read_session(Path(path), model.memory_maker)
        conversation = cls(model, overflow=overflow)
        conversation.messages = saved.messages
        conversation.n_forgotten = saved.n_forgotten
        conversation.notice = saved.notice
        if saved.memory is not None and not model.restore_memory(saved.memory):
            conversation.notice = "the saved memory doesn't fit this context"
        if conversation.notice:
            logger.warning("%s: %s; the conversation is read again", path, conversation.notice)
        return conversation
