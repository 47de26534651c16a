"""What reasoning models think before they answer, `<think>…</think>`, told apart from the answer as it streams.

Only tags at the very beginning count: an answer may speak of tags.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from edgellm.text import overlap

_TAGS = {"<think>": "</think>", "<thinking>": "</thinking>"}
_OPEN_AT_END = re.compile("(?:" + "|".join(_TAGS) + r")\s*\Z")


class Part(NamedTuple):
    text: str
    is_thinking: bool


def opened_thinking(prompt: str) -> str:
    """The tag, with the spaces after it, by which a prompt has already begun the thinking; "" if it hasn't."""
    found = _OPEN_AT_END.search(prompt)
    return found.group() if found else ""


def split_thinking(content: str) -> tuple[str, str]:
    """(what was thought, the answer) of a whole message."""
    splitter = ThinkingSplitter()
    parts = [*splitter.add(content), *splitter.flush()]
    thought = "".join(part.text for part in parts if part.is_thinking)
    return thought, "".join(part.text for part in parts if not part.is_thinking)


class ThinkingSplitter:
    """Takes a message in pieces of any size and says of each part what it is, without the tags and spaces around."""

    def __init__(self) -> None:
        self._held = ""  # what may be part of a tag
        self._closing: str | None = None  # the tag that ends the thinking; "" when no tag counts any more
        self._begins = True  # spaces at the beginning of thinking, and of an answer after it, are left out

    def add(self, text: str) -> list[Part]:
        text = self._held + text
        self._held = ""
        if self._closing is None:
            begun = text.lstrip()
            opening = next((tag for tag in _TAGS if begun.startswith(tag)), None)
            if opening is not None:
                self._closing = _TAGS[opening]
                text = begun.removeprefix(opening)
            elif any(tag.startswith(begun) for tag in _TAGS):
                self._held = text
                return []
            else:
                self._closing, self._begins = "", False
        if not self._closing:
            return self._parts(text, False)
        return self._think(text, self._closing)

    def _think(self, text: str, closing: str) -> list[Part]:
        thought, found, answer = text.partition(closing)
        if found:
            parts = self._parts(thought.rstrip(), True)
            self._closing, self._begins = "", True
            return parts + self._parts(answer, False)
        sure = text[: len(text) - overlap(text, closing)].rstrip()  # spaces before the closing tag aren't shown
        self._held = text[len(sure) :]
        return self._parts(sure, True)

    def _parts(self, text: str, is_thinking: bool) -> list[Part]:
        if self._begins:
            text = text.lstrip()
            self._begins = not text
        return [Part(text, is_thinking)] if text else []

    def flush(self) -> list[Part]:
        """What was held back when the message ended."""
        held, self._held = self._held, ""
        return self._parts(held.rstrip() if self._closing else held, bool(self._closing))
