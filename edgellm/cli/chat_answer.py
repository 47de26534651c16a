"""How an answer is shown: rendered in a terminal, as it is in a pipe; its thinking apart, its figures under it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator
from contextlib import closing
from typing import TYPE_CHECKING, Protocol

from edgellm.chat.thinking import Part, ThinkingSplitter
from edgellm.cli.console import dimmed, draws, on_thread, percentage, printable, say, write
from edgellm.errors import Cancelled

if TYPE_CHECKING:
    from edgellm.cli.chat import Session
    from edgellm.engine.model import Model
    from edgellm.generation import GenerationResponse, GenerationStats

Ask = Callable[[Callable[[float], object]], Generator["GenerationResponse", None, None]]


class View(Protocol):
    """Shows the parts of one answer."""

    def show(self, part: Part) -> None: ...

    def end(self) -> None: ...


class PlainView:
    """The answer on stdout, the thinking on stderr, both as they come. An empty answer is an empty line."""

    def __init__(self) -> None:
        self._last: Part | None = None
        self._answered = ""

    def show(self, part: Part) -> None:
        if self._last is not None and self._last.is_thinking and not part.is_thinking:
            say()
        self._last = part
        if part.is_thinking:
            sys.stderr.write(part.text)
            sys.stderr.flush()
        else:
            self._answered = part.text
            write(part.text)

    def end(self) -> None:
        if self._last is not None and self._last.is_thinking:
            say()
        if not self._answered.endswith("\n"):
            write("\n")


class TerminalView:
    """The thinking dimmed, then the answer as rendered markdown."""

    def __init__(self) -> None:
        from rich.console import Console

        from edgellm.cli.chat_markdown import MarkdownStream

        self._markdown = MarkdownStream(Console(file=sys.stdout))
        self._thinks = False

    def show(self, part: Part) -> None:
        if part.is_thinking:
            self._thinks = True
            write(dimmed(printable(part.text)))
            return
        self._end_thinking()
        self._markdown.add(part.text)

    def _end_thinking(self) -> None:
        if self._thinks:
            write("\n\n")
            self._thinks = False

    def end(self) -> None:
        self._end_thinking()
        self._markdown.finish()


def make_view() -> View:
    return TerminalView() if draws(sys.stdout) and not _is_old_windows_console() else PlainView()


def _is_old_windows_console() -> bool:
    """One that takes no escape sequences."""
    if sys.platform != "win32":
        return False
    from rich.console import detect_legacy_windows

    return detect_legacy_windows()


def answer(session: Session, ask: Ask) -> bool:
    """Print the answer that `ask(on_progress)` gives, as it comes, and its figures. Ctrl-C ends it early.

    False: it was stopped before it began.
    """
    forgotten_before = session.conversation.n_forgotten
    stream = ask(percentage("reading"))
    _say_what_is_left_out(session.conversation.n_forgotten - forgotten_before, session.conversation.n_forgotten)
    last, view, splitter = None, make_view(), ThinkingSplitter()
    try:
        with closing(on_thread(stream, session.model.cancel)) as responses:
            for last in responses:
                for part in splitter.add(last.text):
                    view.show(part)
    except Cancelled:
        say("[stopped before the answer began; your message was taken back]", dim=True)
        return False
    finally:
        if last is not None:
            for part in splitter.flush():
                view.show(part)
            view.end()
    if last is not None:
        session.last_stats = last.stats
        _print_end(session, last)
    return True


def _say_what_is_left_out(n_more: int, n_all: int) -> None:
    if n_more > 0:
        everything = f", {n_all} in all" if n_all > n_more else ""
        say(f"[the context is full: {oldest(n_more)} left out from now on{everything}]", dim=True)


def oldest(n_messages: int) -> str:
    """Subject and verb of what is said of the messages that no longer fit."""
    return "the oldest message is" if n_messages == 1 else f"the {n_messages} oldest messages are"


def _print_end(session: Session, last: GenerationResponse) -> None:
    notes = {"cancelled": "stopped", "length": "cut at the token limit"}
    if session.model.context_used >= session.model.n_ctx:
        notes["length"] = "cut at the end of the context; the next message makes room"
    note = notes.get(last.finish_reason or "")
    if note:
        say(f"[{note}]", dim=True)
    if sys.stderr.isatty():
        say(describe_stats(session.model, last.stats), dim=True)


def describe_stats(model: Model, stats: GenerationStats) -> str:
    """The figures of an answer on one line."""
    read = f"{stats.evaluated_prompt_tokens} of {stats.prompt_tokens} prompt tokens read"
    guessed = f"{stats.accepted} of {stats.drafted} guesses right · " if stats.drafted else ""
    return (
        f"{read} at {stats.prompt_tokens_per_second:.0f} tok/s · first token {stats.time_to_first_token:.2f} s · "
        f"{stats.completion_tokens} tokens at {stats.decode_tokens_per_second:.0f} tok/s · {guessed}"
        f"context {model.context_used}/{model.n_ctx}"
    )
