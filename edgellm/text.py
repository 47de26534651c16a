"""Text in and out of a model: prompts whose control tokens only the template can place, and streamed UTF-8.

A chat message that contains `<|im_end|>` must stay text: parsed as the control token it would let whoever wrote
the message write the rest of the conversation too. `encode_rendered` keeps the two apart by marks that
`mark_controls` puts inside such text before the template is rendered.
"""

from __future__ import annotations

import codecs
import functools
import operator
import re
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from edgellm.errors import GenerationError

# Unicode's own "never a character" range; the first that occurs in no message becomes the mark
_MARKS = [chr(code) for code in range(0xFDD0, 0xFDF0)]


class Vocabulary(Protocol):
    """What encoding needs of a vocabulary (`native.model.Vocab`, or a scripted one in tests)."""

    bos: int
    adds_bos: bool

    @property
    def control_tokens(self) -> dict[str, tuple[bool, bool]]: ...

    def tokenize(self, text: str, *, special: bool) -> list[int]: ...

    def text(self, token: int) -> str: ...


class ShownTokens:
    """A vocabulary some of whose control tokens stand for their own text: those that mean something to the caller."""

    def __init__(self, vocab: Any, texts: Sequence[str]) -> None:
        """texts: of which only control tokens of the vocabulary matter. vocab: `native.model.Vocab`."""
        self.is_eog = vocab.is_eog
        self._piece = vocab.piece
        ids = ((text, vocab.tokenize(text, special=True)) for text in texts)
        self._shown = {one[0]: text.encode() for text, one in ids if len(one) == 1}

    def piece(self, token: int) -> bytes:
        shown: bytes = self._shown.get(token) or self._piece(token)
        return shown


class StreamingDetokenizer:
    """Bytes of tokens → text, holding back a character until all its bytes are there."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, piece: bytes) -> str:
        return self._decoder.decode(piece)

    def flush(self) -> str:
        """What was held back at the end: an unfinished character comes as U+FFFD."""
        return self._decoder.decode(b"", final=True)


class StopStrings:
    """Cuts a stream of text before the first stop string, also where it is spread over several pieces."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def add(self, text: str) -> str:
        """The text that can be shown now. What may become a stop string is held back; see `found`."""
        if not self._stops:
            return text
        if self.found:
            return ""
        text = self._held + text
        cut = min((at for stop in self._stops if (at := text.find(stop)) >= 0), default=-1)
        if cut >= 0:
            self.found, self._held = True, ""
            return text[:cut]
        keep = max(overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """The text held back, when the stream ended without a stop string."""
        held, self._held = self._held, ""
        return held


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    longest = min(len(stop) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


class ControlMarker:
    """Finds the texts of control tokens; marks them in messages; encodes what a template made of the messages."""

    def __init__(self, vocab: Vocabulary) -> None:
        self._vocab = vocab

    @functools.cached_property
    def _pattern(self) -> re.Pattern[str]:
        controls = sorted(self._vocab.control_tokens, key=len, reverse=True)  # as llama.cpp: the longest first
        return re.compile("|".join(map(re.escape, controls)) or "(?!)")

    @functools.cached_property
    def _longest(self) -> int:
        return max(map(len, self._vocab.control_tokens), default=0)

    @functools.cached_property
    def _beginnings(self) -> set[str]:
        return {text[:n] for text in self._vocab.control_tokens for n in range(1, len(text))}

    @functools.cached_property
    def _endings(self) -> set[str]:
        return {text[n:] for text in self._vocab.control_tokens for n in range(1, len(text))}

    def mark(self, messages: Any, template: str) -> tuple[Any, str]:
        """A copy of `messages` with a mark inside every control text, and the mark; "" when nothing needed one."""
        strings = list(_strings(messages))
        if not any(self._mark_string(s, "\0") != s for s in strings):
            return messages, ""
        taken = template + "".join(strings)
        mark = next((m for m in _MARKS if m not in taken), None)
        if mark is None:  # only a message made to exhaust them gets here; its noncharacters are worth nothing
            mark = _MARKS[0]
            messages = _map_strings(messages, lambda s: s.replace(_MARKS[0], "\N{REPLACEMENT CHARACTER}"))
        return _map_strings(messages, lambda s: self._mark_string(s, mark)), mark

    def _mark_string(self, text: str, mark: str) -> str:
        """A mark after the first character of each control text, and where text around could complete one.

        Marks never become the outermost character next to a space: templates trim messages.
        """
        marked = self._pattern.sub(lambda m: m.group()[0] + mark + m.group()[1:], text)
        core = marked.strip()
        lengths = range(1, min(self._longest, len(core)) + 1)
        if any(core[:n] in self._endings for n in lengths):
            at = len(marked) - len(marked.lstrip())
            marked = marked[:at] + mark + marked[at:]
        if any(core[-n:] in self._beginnings for n in lengths):
            at = len(marked.rstrip())
            marked = marked[:at] + mark + marked[at:]
        return marked

    def encode(self, rendered: str, mark: str = "") -> list[int]:
        """Ids of a rendered template. Text that holds a mark is plain text; elsewhere control tokens count."""
        vocab = self._vocab
        ids: list[int] = []
        if vocab.adds_bos and not rendered.startswith(vocab.text(vocab.bos)):
            ids.append(vocab.bos)
        if not mark or mark not in rendered:
            return ids + vocab.tokenize(rendered, special=True)
        trusted = ""  # template text and control tokens not encoded yet
        for text, is_control in self._split(rendered):
            if mark in text and not is_control:
                ids += vocab.tokenize(trusted, special=True) if trusted else []
                ids += vocab.tokenize(text.replace(mark, ""), special=False)
                trusted = ""
            else:
                trusted += text
        return ids + (vocab.tokenize(trusted, special=True) if trusted else [])

    def _split(self, rendered: str) -> Iterator[tuple[str, bool]]:
        """(text, whether it is a control token), with the spaces gone that control tokens swallow."""
        strips = self._vocab.control_tokens
        at, strip_next = 0, False
        for match in self._pattern.finditer(rendered):
            strip_before, strip_after = strips[match.group()]
            text = rendered[at : match.start()]
            text = text.lstrip() if strip_next else text
            yield text.rstrip() if strip_before else text, False
            yield match.group(), True
            at, strip_next = match.end(), strip_after
        yield rendered[at:].lstrip() if strip_next else rendered[at:], False


def _strings(value: Any) -> Iterator[str]:
    """Every string in nested messages, keys too (they reach the prompt through tool calls)."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


def _map_strings(value: Any, change: Any) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {_map_strings(key, change): _map_strings(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_map_strings(item, change) for item in value]
    return value


def plain_ids(tokens: Sequence[int]) -> list[int]:
    """numpy's integers too, as ints. GenerationError for anything else."""
    try:
        return [operator.index(token) for token in tokens]
    except TypeError as exc:
        raise GenerationError(f"token ids must be integers: {exc}") from exc
