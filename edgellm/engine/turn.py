"""Whose turn it is: one generation at a time uses a model, from whichever thread, and the others wait.

A plain lock, because a stream may be started on one thread, used up on another and thrown away by the garbage
collector on a third, in the middle of anything. Who holds it is remembered only to refuse a second generation
by the same thread or task, which would wait for itself for ever.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from edgellm.errors import GenerationError

_POLL_S = 0.05  # how late a waiting call notices that it was cancelled


class Turn:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner: object = None

    def take(self, owner: object, check: Callable[[], None]) -> None:
        """Wait until nobody holds the turn. `check` is called now and then, and raises to give up."""
        check()
        if self._owner == owner:
            raise GenerationError(
                "this thread already has a stream open on this model; use it up or close() it before the next call"
            )
        while not self._lock.acquire(timeout=_POLL_S):
            check()
        self._owner = owner

    def release(self) -> None:
        self._owner = None
        self._lock.release()
