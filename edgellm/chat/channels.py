"""Answers of models that mark their thinking by control tokens of their own, brought into the form of all others:
`<think>…</think>` and the answer.

Harmony (gpt-oss) writes every part of an answer into a named channel, Gemma 4 its thoughts into one; Magistral has two
tokens around them.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

from edgellm.chat.thinking import split_thinking
from edgellm.generation import GenerationResponse
from edgellm.text import overlap

_OPEN, _CLOSE = "<think>", "</think>"


@dataclass(frozen=True)
class Channels:
    """sign: what its templates contain. marks: what stands in an answer → what becomes of it; a mark that closes the
    thinking is left out where none is open. tokens: the control tokens among them.
    """

    sign: str
    marks: Mapping[str, str]
    tokens: tuple[str, ...]


KNOWN = (
    Channels(
        "<|channel|>",
        {
            "<|channel|>analysis<|message|>": _OPEN,
            "<|channel|>final<|message|>": "",
            "<|channel|>commentary<|message|>": "",  # said to the user before a call
            "<|channel|>commentary": "",
            "<|start|>assistant": "",
            "<|end|>": _CLOSE,
        },
        ("<|channel|>", "<|message|>", "<|start|>", "<|end|>"),
    ),
    Channels("<|channel>", {"<|channel>thought\n": _OPEN, "<channel|>": _CLOSE}, ("<|channel>", "<channel|>")),
    Channels("[THINK]", {"[THINK]": _OPEN, "[/THINK]": _CLOSE}, ("[THINK]", "[/THINK]")),
)


def find_channels(template: str) -> Channels | None:
    """None for a template whose answers need no change."""
    return next((known for known in KNOWN if known.sign in template), None)


class Translation:
    """An answer in pieces of any size; a mark that may have begun is held back."""

    def __init__(self, channels: Channels) -> None:
        self._marks = channels.marks
        self._any = re.compile("|".join(re.escape(mark) for mark in sorted(channels.marks, key=len, reverse=True)))
        self._held = ""
        self._thinks = False

    def add(self, text: str) -> str:
        text = self._held + text
        n_held = max(overlap(text, mark) for mark in self._marks)
        n_held = max([n_held, *(len(mark) for mark in self._marks if self._may_go_on(mark) and text.endswith(mark))])
        self._held = text[len(text) - n_held :]
        return self._any.sub(self._replaced, text[: len(text) - n_held])

    def _may_go_on(self, mark: str) -> bool:
        """Whether a longer mark begins with this one."""
        return any(other != mark and other.startswith(mark) for other in self._marks)

    def _replaced(self, found: re.Match[str]) -> str:
        becomes = self._marks[found[0]]
        if becomes == _CLOSE and not self._thinks:
            return ""
        self._thinks = {_OPEN: True, _CLOSE: False}.get(becomes, self._thinks)
        return becomes

    def flush(self) -> str:
        held, self._held = self._held, ""
        return self._any.sub(self._replaced, held)


def translated(
    responses: Generator[GenerationResponse, None, None], channels: Channels
) -> Generator[GenerationResponse, None, None]:
    """The responses with their text in the common form; tokens and figures stay."""
    translation = Translation(channels)
    with closing(responses):
        for response in responses:
            text = translation.add(response.text)
            if response.finish_reason is not None:
                text += translation.flush()
            yield replace(response, text=text)


def without_thinking(messages: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Earlier answers as such templates want them: what was thought apart, by the name Harmony's template knows."""
    return [_apart(message) if message.get("role") == "assistant" else dict(message) for message in messages]


def _apart(message: Mapping[str, Any]) -> dict[str, Any]:
    thought, answer = split_thinking(str(message.get("content") or ""))
    return {**message, "content": answer, **({"thinking": thought} if thought else {})}
