"""The slash commands of a chat."""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Callable, Generator
from dataclasses import fields, replace
from typing import Any

from edgellm.chat.conversation import Conversation
from edgellm.cli.chat import Session, answer, describe_settings, describe_stats
from edgellm.cli.console import say
from edgellm.cli.options import path_and_number
from edgellm.config import SamplingParams
from edgellm.generation import GenerationResponse


def run_slash_command(session: Session, line: str) -> bool:
    """Run one command line. Returns False when the chat is over. Errors of commands are raised."""
    name, _, argument = line[1:].partition(" ")
    if name in ("exit", "quit"):
        return False
    command = _COMMANDS.get(name)
    if command is None:
        near = difflib.get_close_matches(name, [*_COMMANDS, "exit"], n=1)
        hint = f"did you mean /{near[0]}?" if near else "/help lists the commands"
        say(f"no command /{name}; {hint}")
    else:
        command(session, argument.strip())
    return True


def _help(session: Session, _: str) -> None:
    """this list"""
    for name, command in _COMMANDS.items():
        say(f"  /{name:<8} {command.__doc__}")
    say("  /exit     leave (or Ctrl-D)")


def _set(session: Session, argument: str) -> None:
    """NAME VALUE changes how tokens are chosen; alone it shows the settings"""
    if not argument:
        for name in _SETTINGS:
            say(f"  {name} = {_shown(getattr(session.sampling, name))}")
        return
    name, _, text = argument.replace("=", " ", 1).partition(" ")
    name = name.strip().replace("-", "_")
    if name not in _SETTINGS:
        say(f"no setting {name!r}; there are {', '.join(_SETTINGS)}")
        return
    try:
        session.sampling = replace(session.sampling, **{name: _parse(name, text.strip())})
    except ValueError as exc:
        say(f"not set: {exc}")
        return
    say(f"  {name} = {_shown(getattr(session.sampling, name))}")


def _system(session: Session, argument: str) -> None:
    """TEXT replaces the system message; alone it shows it, "off" removes it"""
    conversation = session.conversation
    if argument:
        conversation.set_system(None if argument == "off" else argument)
    first = conversation.messages[0] if conversation.messages else {}
    say(f"system: {first['content']}" if first.get("role") == "system" else "no system message")


def _clear(session: Session, _: str) -> None:
    """forgets the conversation (the system message stays)"""
    session.conversation.clear()
    say("cleared")


def _undo(session: Session, _: str) -> None:
    """takes back your last message and its answer"""
    text = session.conversation.undo()
    say("nothing to take back" if text is None else f"taken back: {text}")


def _regen(session: Session, _: str) -> None:
    """answers your last message again"""

    def ask(show: Callable[[float], object]) -> Generator[GenerationResponse, None, None]:
        return session.conversation.regenerate(session.sampling, draft=session.draft, on_progress=show)

    answer(session, ask)


def _save(session: Session, argument: str) -> None:
    """FILE keeps the conversation, and what the model remembers of it"""
    if not argument:
        say("usage: /save FILE")
        return
    session.conversation.save(argument)
    say(f"saved to {argument}")


def _load(session: Session, argument: str) -> None:
    """FILE goes on with a saved conversation"""
    if not argument:
        say("usage: /load FILE")
        return
    session.conversation = Conversation.load(session.model, argument)
    say(f"{len(session.conversation.messages)} messages loaded")
    if session.conversation.notice:
        say(f"{session.conversation.notice}; they are read again")


def _lora(session: Session, argument: str) -> None:
    """FILE[:SCALE] … adds adapters in place of those before; alone it shows them, "off" removes them"""
    if argument:
        try:
            chosen = () if argument == "off" else tuple(map(path_and_number, shlex.split(argument)))
        except ValueError as exc:  # a quotation mark without its partner
            say(f"not changed: {str(exc).lower()}")
            return
        session.model.set_lora(*chosen)
    in_use = [f"{path.name} × {scale:g}" for path, scale in session.model.lora]
    say("adapters: " + ", ".join(in_use) if in_use else "no adapters")


def _stats(session: Session, _: str) -> None:
    """figures of the last answer, and the settings it came with"""
    stats = session.last_stats
    say("no answer yet" if stats is None else describe_stats(session.model, stats))
    say(describe_settings(session.model.settings))


_COMMANDS: dict[str, Callable[[Session, str], None]] = {
    "help": _help,
    "set": _set,
    "system": _system,
    "clear": _clear,
    "undo": _undo,
    "regen": _regen,
    "save": _save,
    "load": _load,
    "lora": _lora,
    "stats": _stats,
}

_SETTINGS = [field.name for field in fields(SamplingParams)]
_WHOLE_NUMBERS = {"max_tokens", "top_k", "penalty_last_n", "seed"}


def _parse(name: str, text: str) -> Any:
    """The value of a setting. ValueError says what it takes."""
    if name == "stop":
        return (text,) if text else ()
    if name in ("max_tokens", "seed") and text in ("off", "none", ""):
        return None
    try:
        return int(text) if name in _WHOLE_NUMBERS else float(text)
    except ValueError:
        kind = "a whole number" if name in _WHOLE_NUMBERS else "a number"
        raise ValueError(f"{name} takes {kind}, not {text!r}") from None


def _shown(value: object) -> str:
    return "off" if value is None or value == () else ", ".join(value) if isinstance(value, tuple) else str(value)
