"""The input line of a chat in a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from platformdirs import user_state_path
from prompt_toolkit import PromptSession
from prompt_toolkit.application import get_app
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.filters import Condition
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

from edgellm.cli.chat_lines import is_open

_TAKE_PATHS = ("read", "save", "load", "model", "lora")


def make_prompt(history: bool, commands: Iterable[str]) -> Callable[[], str]:
    """A function that reads one message. EOFError on Ctrl-D, KeyboardInterrupt on Ctrl-C at an empty line.

    commands: names that the tab key completes behind a slash.
    """
    session: PromptSession[str] = PromptSession(
        "> ",
        history=_history() if history else InMemoryHistory(),
        key_bindings=_key_bindings(),
        completer=_CommandCompleter(tuple(commands)),
        complete_while_typing=False,
    )
    return session.prompt


def history_path() -> Path:
    return Path(user_state_path("edgellm")) / "chat-history"


def _history() -> History:
    path = history_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
    except OSError:  # a read-only home is no reason not to chat
        return InMemoryHistory()
    return FileHistory(str(path))


class _CommandCompleter(Completer):
    """Names behind a slash, and paths behind the commands that take one."""

    def __init__(self, commands: tuple[str, ...]) -> None:
        self._commands = commands
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterator[Completion]:
        text = document.text_before_cursor
        name, space, path = text.removeprefix("/").partition(" ")
        if not text.startswith("/"):
            return
        if not space:
            yield from (Completion(c, start_position=-len(name)) for c in self._commands if c.startswith(name))
        elif name in _TAKE_PATHS:
            yield from self._paths.get_completions(Document(path, len(path)), complete_event)


def _key_bindings() -> KeyBindings:
    bindings = KeyBindings()

    @bindings.add("c-c")
    def _(event: KeyPressEvent) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt)

    @bindings.add("c-j")
    @bindings.add("enter", filter=Condition(lambda: is_open(get_app().current_buffer.text)))
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return bindings
