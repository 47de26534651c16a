"""A deep context in no time, for timing: the keys and values of a short one, repeated.

How long attention takes depends on how many cells there are, not on what is in them. llama.cpp gives out a sequence's
cells as bytes and takes them back (`llama_kv_cache::state_write` in llama-kv-cache.cpp); in between they are repeated.
Of any other layout than the one below (recurrent states, another version) nothing is touched.
"""

from __future__ import annotations

import struct

from edgellm.native.context import Context
from edgellm.native.state import restore_state, save_state

_SEQUENCE = 0


class _OtherLayout(Exception):
    pass


def stretch(context: Context, n_tokens: int) -> bool:
    """Repeat what the context's memory holds up to n_tokens. False: it can't be done, and all is as it was.

    What is written after that makes no sense, and takes as long as after a text of that length.
    """
    if not context.tokens or n_tokens > context.n_ctx:
        return False
    text, original = list(context.tokens), save_state(context)
    try:
        wanted = stretched(original, len(text), n_tokens)
    except (_OtherLayout, struct.error):
        return False
    if restore_state(context, (text * (n_tokens // len(text) + 1))[:n_tokens], wanted):
        return True
    restore_state(context, text, original)
    return False


def stretched(state: bytes, n_cells: int, n_wanted: int) -> bytes:
    """The state of one sequence of n_cells, as one of n_wanted. Raises where it isn't laid out as expected."""
    reader = _Reader(state, n_cells, n_wanted)
    reader.copy(8)  # a magic number, and a version
    while reader.at < len(state):  # a model with a sliding window has two caches
        reader.cache()
    return b"".join(reader.out)


class _Reader:
    """Goes through the bytes, and puts those of the longer state into `out`."""

    def __init__(self, state: bytes, n_cells: int, n_wanted: int) -> None:
        self._state, self._n, self._wanted = state, n_cells, n_wanted
        self.at = 0
        self.out: list[bytes] = []

    def copy(self, n_bytes: int) -> bytes:
        chunk = self._take(n_bytes)
        self.out.append(chunk)
        return chunk

    def cache(self) -> None:
        self._expect(1)  # streams
        if self._number() != self._n:
            raise _OtherLayout
        self.out.append(struct.pack("<I", self._wanted))
        for cell in range(self._n):
            if struct.unpack("<III", self._take(12)) != (cell, 1, _SEQUENCE):
                raise _OtherLayout
        self.out += [struct.pack("<III", cell, 1, _SEQUENCE) for cell in range(self._wanted)]
        transposed, n_layers = struct.unpack("<II", self.copy(8))
        if transposed > 1:
            raise _OtherLayout
        for _ in range(n_layers):
            self._rows()
        for _ in range(n_layers):
            if transposed:
                self._columns()
            else:
                self._rows()

    def _rows(self) -> None:
        """Type, bytes of a row, and a row for each cell."""
        _, n_bytes = struct.unpack("<iQ", self.copy(12))
        self._repeat(n_bytes)

    def _columns(self) -> None:
        """Type, bytes of an element, number of rows, and rows of an element for each cell."""
        _, n_bytes, n_rows = struct.unpack("<iII", self.copy(12))
        for _ in range(n_rows):
            self._repeat(n_bytes)

    def _repeat(self, n_bytes: int) -> None:
        row = self._take(n_bytes * self._n)
        self.out.append((row * (self._wanted // self._n + 1))[: n_bytes * self._wanted])

    def _number(self) -> int:
        return int(struct.unpack("<I", self._take(4))[0])

    def _expect(self, value: int) -> None:
        if struct.unpack("<I", self.copy(4))[0] != value:
            raise _OtherLayout

    def _take(self, n_bytes: int) -> bytes:
        if self.at + n_bytes > len(self._state):
            raise _OtherLayout
        chunk = self._state[self.at : self.at + n_bytes]
        self.at += n_bytes
        return chunk
