"""Where a message ends, and what in it is a command: the same in a terminal and in a pipe."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

QUOTES = '"""'


def is_open(text: str) -> bool:
    '''Whether the message goes on in the next line: it begins with """ and doesn't end with another.'''
    text = text.strip()
    return text.startswith(QUOTES) and (len(text) < 2 * len(QUOTES) or not text.endswith(QUOTES))


def read_message(text: str) -> tuple[str, bool]:
    """(the message without its quotes, whether it is a slash command). What is quoted never is one."""
    text = text.strip()
    if text.startswith(QUOTES):
        return text.removeprefix(QUOTES).removesuffix(QUOTES).strip(), False
    return text, text.startswith("/")


def whole_messages(lines: Iterable[bytes]) -> Iterator[str]:
    """Lines as they come, those between quotes together. An end of input ends a message too."""
    held = ""
    for line in lines:
        held += line.decode("utf-8", "replace")
        if not is_open(held):
            yield held
            held = ""
    if held:
        yield held
