"""Which turns are left out when a conversation no longer fits the context.

The policy: the system message stays, and the oldest turns (a user's message and all that answers it) go, until half of
the context is free again. So much at once, because whatever follows a turn that goes has to be read again: dropping no
more than needed would read the whole context before every answer.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, Literal

from edgellm.errors import ContextFull

Overflow = Literal["drop", "error"]
Messages = Sequence[Mapping[str, Any]]

_ROOM = 8  # an eighth of the context is kept for the answer, or what its max_tokens say
_GOAL = 2  # after dropping, half of the context is free


def n_leading(messages: Messages) -> int:
    """How many messages come before the first turn: instructions, which always stay."""
    n = 0
    while n < len(messages) and messages[n]["role"] in ("system", "developer"):
        n += 1
    return n


def without_forgotten(messages: Messages, n_forgotten: int) -> list[Mapping[str, Any]]:
    """The messages that are sent when the first n_forgotten after the instructions aren't."""
    lead = n_leading(messages)
    return [*messages[:lead], *messages[lead + n_forgotten :]]


def choose_forgotten(
    messages: Messages,
    n_forgotten: int,
    n_ctx: int,
    max_tokens: int | None,
    count_tokens: Callable[[Messages], int],
) -> int:
    """How many messages after the instructions to leave out of the next prompt, which ends with a user's message.

    n_forgotten: how many were left out of the last one; no others, as long as that leaves room for an answer. None at
    all where everything fits. count_tokens: of the prompt for these messages.
    ContextFull: the last turn alone doesn't fit.
    """
    starts = _turn_starts(messages)

    @cache
    def n_tokens(start: int) -> int:
        return count_tokens(without_forgotten(messages, start))

    room = max(1, min(n_ctx // _ROOM, n_ctx if max_tokens is None else max_tokens))
    so_far = next((start for start in starts if start >= n_forgotten), starts[-1])
    for start in (0, so_far):
        if n_tokens(start) <= n_ctx - room:
            return start
    later = [start for start in starts if start > so_far] or [starts[-1]]
    first = bisect_left(later, True, key=lambda start: n_tokens(start) <= n_ctx // _GOAL)
    chosen = later[min(first, len(later) - 1)]
    if n_tokens(chosen) > n_ctx:
        raise ContextFull(
            f"your message makes a prompt of {n_tokens(chosen)} tokens even without all earlier turns, but the context "
            f"holds {n_ctx}; shorten it, or load with a larger n_ctx (--n-ctx)"
        )
    return chosen


def _turn_starts(messages: Messages) -> list[int]:
    """Counted from the first message after the instructions: 0, and where later turns begin."""
    turns = messages[n_leading(messages) :]
    return sorted({0, *(i for i, message in enumerate(turns) if message["role"] == "user")})
