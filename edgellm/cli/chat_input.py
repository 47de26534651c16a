"""The input line of a chat in a terminal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from platformdirs import user_state_path
from prompt_toolkit import PromptSession
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent


def make_prompt(history: bool) -> Callable[[], str]:
    """A function that reads one message. EOFError on Ctrl-D, KeyboardInterrupt on Ctrl-C at an empty line."""
    session: PromptSession[str] = PromptSession(
        "> ", history=_history() if history else InMemoryHistory(), key_bindings=_key_bindings()
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


def _key_bindings() -> KeyBindings:
    bindings = KeyBindings()

    @bindings.add("c-c")
    def _(event: KeyPressEvent) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt)

    @bindings.add("c-j")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return bindings
