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
from typing import TypeVar

from edgellm.errors import EdgeLLMError

Item = TypeVar("Item")

INTERRUPTED = 130


def say(text: str = "", *, dim: bool = False) -> None:
    """A line on stderr."""
    clear_status()
    print(f"\x1b[2m{text}\x1b[0m" if dim and sys.stderr.isatty() else text, file=sys.stderr, flush=True)


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
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[2K\x1b[2m{text}\x1b[0m")
        sys.stderr.flush()


def clear_status() -> None:
    if sys.stderr.isatty():
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


def write(text: str) -> None:
    """Text of an answer, at once. BrokenPipeError when nobody reads it any more."""
    sys.stdout.write(text)
    sys.stdout.flush()


def silence_stdout() -> None:
    """After a broken pipe: keep the interpreter from complaining about it again when it exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
