"""Markdown that is drawn while it is still being written.

A block (paragraph, list, table …) is printed for good once the next one has begun, and never touched again, so that
what scrolls off the screen is right. Only the last block, which can still change its looks, is drawn anew; of that only
the lines that changed are written. Where it is higher than the terminal its last lines are shown until it is whole.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from time import perf_counter
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.token import Token
from rich.cells import cell_len
from rich.console import Console
from rich.markdown import Markdown
from rich.text import Text

from edgellm.cli.console import printable

# HTML off: it is shown as it was written, where rich would leave it out
_PARSER = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"])
# Under a paragraph a line of dashes makes a heading of it; the next character may make it a list
_UNDECIDED = re.compile(r"\n[ \t]*[-=*_+#`~>|][-=*_+#`~>| \t]*\Z")

_LEAST_PAUSE = 0.03  # seconds between two drawings
_SHARE = 4  # a drawing is followed by a pause of so many times its own duration


class AnswerMarkdown(Markdown):
    """As rich draws it, but line breaks are kept and links show where they lead."""

    def __init__(self, source: str, references: dict[str, Any] | None = None) -> None:
        """references: markdown-it's environment with the link definitions of the text before; it is added to."""
        super().__init__("", hyperlinks=False)
        self.markup = source
        self.parsed = _PARSER.parse(source, {} if references is None else references)
        for token in self.parsed:
            for child in token.children or ():
                if child.type == "softbreak":
                    child.type = "hardbreak"


class MarkdownStream:
    """Draws on the console's terminal. Its cursor is at the beginning of an empty line, and is so again at the end."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._source = ""  # of the last block
        self._references: dict[str, Any] = {}
        self._before = ""  # something in place of the block before it, which decides how far apart they stand
        self._live: list[str] = []  # the lines on the screen that may change
        self._width = 0  # of the terminal when they were drawn
        self._next_time = 0.0

    def add(self, text: str) -> None:
        """A piece of the text, of any size. It is drawn at once, or with a later piece."""
        self._source += printable(text)
        started = perf_counter()
        if started >= self._next_time:
            self._draw()
            ended = perf_counter()
            self._next_time = ended + max(_LEAST_PAUSE, _SHARE * (ended - started))

    def finish(self) -> None:
        """Print what is left for good."""
        self._write([*self._finished_blocks(), *self._lines(self._source)], n_live=0)
        self._source = ""

    def _draw(self) -> None:
        lines = self._finished_blocks()
        live = self._lines(_UNDECIDED.sub("", self._source))[-max(1, self._console.height - 2) :]
        self._write([*lines, *live], n_live=len(live))

    def _finished_blocks(self) -> list[str]:
        """The lines of all blocks but the last, whose source is then gone."""
        end = _start_of_last_block(self._source)
        finished = self._source[:end]
        lines = self._lines(finished)
        if lines:  # blocks that show nothing (definitions, empty quotes) go with the next: they can set it apart
            self._source = self._source[end:]
            tokens = _PARSER.parse(finished, self._references)
            self._before = "***\n\n" if tokens[-1].type == "hr" else "x\n\n"
        return lines

    def _lines(self, source: str) -> list[str]:
        n_before = len(self._render(self._before))
        lines = self._render(self._before + source)[n_before:]
        while lines and not lines[0] and not self._before:  # rich sets a list apart even from nothing
            del lines[0]
        return lines

    def _render(self, source: str) -> list[str]:
        if not source.strip():
            return []
        with self._console.capture() as capture:
            self._console.print(AnswerMarkdown(source, copy.deepcopy(self._references)))
        return [line.rstrip(" ") for line in capture.get().split("\n")[:-1]]

    def _write(self, lines: Sequence[str], n_live: int) -> None:
        """Put these lines in place of the live ones; the last n_live of them may change again."""
        n_same = 0
        if self._width == self._console.width:
            pairs = zip(self._live, lines, strict=False)
            n_same = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(self._live), len(lines)))
        if self._live[n_same:] or lines[n_same:]:
            n_up = sum(self._rows(line) for line in self._live[n_same:])
            up = f"\x1b[{n_up}A" if n_up else ""
            written = "".join(f"\x1b[2K{line}\n" for line in lines[n_same:])
            self._console.file.write(f"{up}\r{written}\x1b[J")
            self._console.file.flush()
        self._live = list(lines[len(lines) - n_live :])
        self._width = self._console.width

    def _rows(self, line: str) -> int:
        """Rows that a line takes by now: a terminal made narrower has wrapped it."""
        return max(1, -(-cell_len(Text.from_ansi(line).plain) // self._console.width))


def _start_of_last_block(source: str) -> int:
    """Where the last block of the whole lines begins; all before it is final. 0 where there is only one."""
    n_whole = source.rfind("\n") + 1
    starts = [token.map[0] for token in _PARSER.parse(source[:n_whole]) if _begins_block(token) and token.map]
    if len(starts) < 2:
        return 0
    position = 0
    for _ in range(starts[-1]):
        position = source.index("\n", position) + 1
    return position


def _begins_block(token: Token) -> bool:
    return token.level == 0 and token.nesting >= 0
