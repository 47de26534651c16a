"""A terminal in memory: what a user would see of what was written, scrolled away lines included."""

from __future__ import annotations

import pyte


class Terminal:
    def __init__(self, columns: int, lines: int) -> None:
        self._screen = pyte.HistoryScreen(columns, lines, history=100_000, ratio=0.5)
        self._screen.set_mode(pyte.modes.LNM)  # as a tty that turns \n into \r\n
        self._stream = pyte.Stream(self._screen)

    def feed(self, text: str) -> None:
        self._stream.feed(text)

    @property
    def rows(self) -> list[str]:
        """From the first line ever, spaces at the ends and empty lines at the end left out."""
        rows = ["".join(char.data for char in cells).rstrip() for cells in self._cells()]
        while rows and not rows[-1]:
            rows.pop()
        return rows

    @property
    def styled(self) -> list[list[tuple[str, bool, bool, str, str]]]:
        """The same with boldness, italics and colours."""
        rows = [[(c.data, c.bold, c.italics, c.fg, c.bg) for c in cells] for cells in self._cells()]
        for row in rows:
            while row and row[-1] == (" ", False, False, "default", "default"):
                row.pop()
        while rows and not rows[-1]:
            rows.pop()
        return rows

    @property
    def cursor(self) -> tuple[int, int]:
        """Column, and row of all rows."""
        return self._screen.cursor.x, len(self._screen.history.top) + self._screen.cursor.y

    def _cells(self) -> list[list[pyte.screens.Char]]:
        screen = self._screen
        rows = [*screen.history.top, *(screen.buffer[y] for y in range(screen.lines))]
        return [[row[x] for x in range(screen.columns)] for row in rows]
