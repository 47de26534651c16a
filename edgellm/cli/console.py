"""What the commands share with the terminal: errors, progress, Ctrl-C. Answers go to stdout, all of this to stderr."""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import IO, TypeVar

from edgellm.errors import EdgeLLMError

Item = TypeVar("Item")

INTERRUPTED = 130


# What a terminal would act on instead of showing it: models and files may hold anything
_CONTROLS = {code: None for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}


def printable(text: str) -> str:
    """The text without control characters, which could move the cursor or change the clipboard."""
    return text.translate(_CONTROLS)


def draws(stream: IO[str]) -> bool:
    """Whether the stream is a terminal that understands escape sequences."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def dimmed(text: str) -> str:
    return f"\x1b[2m{text}\x1b[0m"


def say(text: str = "", *, dim: bool = False) -> None:
    """A line on stderr."""
    clear_status()
    print(dimmed(text) if dim and draws(sys.stderr) else text, file=sys.stderr, flush=True)


def report(error: BaseException, debug: bool) -> int:
    """Print an error as one line, with its traceback only if `debug`. Returns the exit code it stands for."""
    clear_status()
    if debug:
        traceback.print_exception(error)
    if isinstance(error, EdgeLLMError):
        say(f"edgellm: {_one_line(error)}")
        return error.exit_code
    advice = "" if debug else "; run again with --debug for details, and please report it"
    say(f"edgellm: unexpected {type(error).__name__}: {_one_line(error)}{advice}")
    return 1


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def status(text: str) -> None:
    """Show `text` on the current line of a terminal, in place of the status before; nothing when piped."""
    if draws(sys.stderr):
        sys.stderr.write(f"\r\x1b[2K{dimmed(text)}")
        sys.stderr.flush()


def clear_status() -> None:
    if draws(sys.stderr):
        sys.stderr.write("\r\x1b[2K")
        sys.stderr.flush()


def measuring(label: str, fraction: float) -> None:
    """A progress callback of what measures one thing after the other."""
    status(f"measuring: {label}, {100 * fraction:.0f} %")


def percentage(label: str) -> Callable[[float], None]:
    """A progress callback that shows whole per cents; nothing for what is done at once."""
    shown = 0

    def show(fraction: float) -> None:
        nonlocal shown
        percent = int(100 * fraction)
        if percent >= 100:
            if shown:
                clear_status()
        elif percent > shown:
            shown = percent
            status(f"{label} {percent} %")

    return show


def on_thread(items: Iterator[Item], cancel: Callable[[], None]) -> Generator[Item, None, None]:
    """The items of an iterator that runs on a thread of its own, so that Ctrl-C acts in the middle of native code.

    Ctrl-C calls `cancel` instead of raising KeyboardInterrupt; the items up to the end still come.
    """
    box: queue.SimpleQueue[tuple[bool, Item | BaseException | None]] = queue.SimpleQueue()

    def produce() -> None:
        try:
            for item in items:
                box.put((True, item))
            box.put((False, None))
        except BaseException as exc:
            box.put((False, exc))

    worker = threading.Thread(target=produce, name="edgellm-answer", daemon=True)
    with _interrupts_call(cancel):
        worker.start()
        try:
            while True:
                is_item, content = box.get()
                if not is_item:
                    break
                yield content  # type: ignore[misc]
            if isinstance(content, BaseException):
                raise content
        finally:
            if worker.is_alive():
                cancel()
                worker.join()


@contextmanager
def _interrupts_call(cancel: Callable[[], None]) -> Iterator[None]:
    previous = signal.getsignal(signal.SIGINT)
    if previous is signal.SIG_IGN:  # a background job: its Ctrl-C is meant for somebody else
        yield
        return
    signal.signal(signal.SIGINT, lambda *_: cancel())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


@contextmanager
def unechoed() -> Iterator[None]:
    """Keys typed in the block aren't shown, so that they don't tear what is drawn; the next input line gets them."""
    if sys.platform == "win32" or not sys.stdin.isatty():  # Windows echoes only while a line is read
        yield
        return
    import termios

    before = termios.tcgetattr(sys.stdin)
    quiet = [*before]
    quiet[3] &= ~termios.ECHO
    termios.tcsetattr(sys.stdin, termios.TCSANOW, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSANOW, before)


def write(text: str) -> None:
    """Text of an answer, at once. BrokenPipeError when nobody reads it any more."""
    sys.stdout.write(text)
    sys.stdout.flush()


def silence_stdout() -> None:
    """After a broken pipe: keep the interpreter from complaining about it again when it exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
