"""Whose turn it is: one generation at a time uses a model, from whichever thread, and the others wait in a line.

A plain lock, because a stream may be started on one thread, used up on another and thrown away by the garbage
collector on a third, in the middle of anything. Who holds it is remembered only to refuse a second generation
by the same thread or task, which would wait for itself for ever.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator

from edgellm.engine.stream import Ticket
from edgellm.errors import Cancelled, GenerationError

_POLL_S = 0.05  # how late a waiting call notices that it was cancelled


class Turn:
    """First come, first served: also a thread that comes again at once waits behind those that were there before."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner: object = None
        self._line: deque[threading.Event] = deque()  # set: this one is the first in the line

    @property
    def n_waiting(self) -> int:
        return len(self._line)

    def take(self, owner: object, check: Callable[[], None]) -> None:
        """Wait until nobody holds the turn. `check` is called now and then, and raises to give up."""
        check()
        if self._owner == owner:
            raise GenerationError(
                "this thread already has a stream open on this model; use it up or close() it before the next call"
            )
        place = threading.Event()
        try:
            self._line.append(place)
            while self._line[0] is not place:
                place.wait(_POLL_S)
                check()
            while not self._lock.acquire(timeout=_POLL_S):
                check()
        finally:
            with contextlib.suppress(ValueError):  # Ctrl-C came before it was there
                self._line.remove(place)
            with contextlib.suppress(IndexError):  # nobody waits
                self._line[0].set()
        self._owner = owner

    def release(self) -> None:
        self._owner = None
        self._lock.release()


class Turns:
    """What is used by one ticket at a time, and can be cancelled and closed. A subclass holds what is used."""

    def __init__(self) -> None:
        self.closed = False
        self.turn = Turn()
        self._active: Ticket | None = None
        self._active_lock = threading.RLock()  # re-entrant: the garbage collector may end a stream anywhere

    def check_open(self) -> None:
        if self.closed:
            raise GenerationError("the model is closed; load it again")

    @contextlib.contextmanager
    def turn_of(self, ticket: Ticket) -> Iterator[None]:
        """The turn, waited for. GenerationError where it waits for itself or the model closes, Cancelled."""

        def check() -> None:
            self.check_open()
            check_not_cancelled(ticket)

        self.turn.take(ticket.owner or threading.get_ident(), check)
        try:
            with self._active_lock:
                self._active = ticket
                self._begin()
            check()
            yield
        finally:
            with self._active_lock:
                self._active = None
            self.turn.release()

    def cancel(self, ticket: Ticket) -> None:
        """Interrupt it if it has the turn; let it give up if it waits."""
        ticket.cancelled = True
        with self._active_lock:
            if self._active is ticket:
                self._interrupt()

    def cancel_active(self) -> None:
        """Interrupt whatever has the turn."""
        with self._active_lock:
            if self._active is not None:
                self.cancel(self._active)

    def _begin(self) -> None:
        """A new turn begins: what interrupted the last one is forgotten."""
        raise NotImplementedError

    def _interrupt(self) -> None:
        """Stop what is running. Called while the active turn can't change."""
        raise NotImplementedError


def check_not_cancelled(ticket: Ticket) -> None:
    if ticket.cancelled:
        raise Cancelled("cancelled before the first token")
