"""The slash commands of a chat: the table of them all, and those about the conversation and its settings."""

from __future__ import annotations

import difflib
import shlex
import shutil
from collections.abc import Callable, Generator
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from edgellm.cli import chat_files
from edgellm.cli.chat import describe_settings
from edgellm.cli.chat_answer import answer, describe_stats, oldest
from edgellm.cli.console import printable, say
from edgellm.cli.options import path_and_number
from edgellm.config import SamplingParams
from edgellm.errors import TextError

if TYPE_CHECKING:
    from edgellm.cli.chat import Session
    from edgellm.generation import GenerationResponse

_LONG = 300  # characters of a message that are repeated whole


def run_slash_command(session: Session, line: str) -> bool:
    """Run one command line. Returns False when the chat is over. Errors of commands are raised."""
    name, *rest = line[1:].split(maxsplit=1) or [""]
    if name in ("exit", "quit"):
        return False
    command = _COMMANDS.get(name)
    if command is None:
        near = difflib.get_close_matches(name, COMMAND_NAMES, n=1)
        hint = f"did you mean /{near[0]}?" if near else "/help lists the commands"
        say(f"no command /{printable(name)}; {hint}")
        return True
    try:
        command(session, printable(rest[0]).strip() if rest else "")
    except BrokenPipeError:
        raise
    except OSError as exc:  # a name that is too long, a folder that may not be entered
        raise TextError(f"/{name}: {exc.strerror or exc}; check the path") from exc
    return True


def _help(session: Session, _: str) -> None:
    """this list"""
    for name, command in _COMMANDS.items():
        say(f"  /{name:<8} {command.__doc__}")
    say("  /exit     leave (or Ctrl-D)")
    say('A message over several lines stands between """ and """, or is broken with Ctrl-J.')


def _set(session: Session, argument: str) -> None:
    """NAME VALUE changes how tokens are chosen; alone it shows the settings"""
    sampling = session.sampling
    if not argument:
        for name in _SETTINGS:
            say(f"  {name} = {_shown(getattr(sampling, name))}")
        return
    name, _, text = argument.replace("=", " ", 1).partition(" ")
    name = name.strip().replace("-", "_")
    if name not in _SETTINGS:
        say(f"no setting {printable(name)!r}; there are {', '.join(_SETTINGS)}")
        return
    try:
        value = _parse(name, text.strip())
        replace(sampling, **{name: value})
    except ValueError as exc:
        say(f"not set: {exc}")
        return
    session.given[name] = value
    say(f"  {name} = {_shown(getattr(session.sampling, name))}")


def _system(session: Session, argument: str) -> None:
    """TEXT replaces the system message; alone it shows it, "off" removes it"""
    conversation = session.conversation
    if argument:
        conversation.set_system(None if argument == "off" else argument)
    first = conversation.messages[0] if conversation.messages else {}
    say(f"system: {printable(first['content'])}" if first.get("role") == "system" else "no system message")


def _clear(session: Session, _: str) -> None:
    """forgets the conversation (the system message stays)"""
    session.conversation.clear()
    session.attached.clear()
    say("cleared")


def _undo(session: Session, _: str) -> None:
    """takes back your last message and its answer"""
    text = session.conversation.undo()
    say("nothing to take back" if text is None else f"taken back: {_shortened(printable(text))}")


def _regen(session: Session, _: str) -> None:
    """answers your last message again"""

    def ask(show: Callable[[float], object]) -> Generator[GenerationResponse, None, None]:
        return session.conversation.regenerate(session.sampling, draft=session.draft, on_progress=show)

    answer(session, ask)


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


def _context(session: Session, _: str) -> None:
    """shows what fills the context"""
    usage = session.conversation.usage()
    width = min(40, shutil.get_terminal_size().columns - 3)
    n_instructions = round(width * usage.instructions / usage.n_ctx)
    n_turns = min(width - n_instructions, round(width * usage.turns / usage.n_ctx))
    say(f"[{'#' * n_instructions}{'=' * n_turns}{'.' * (width - n_instructions - n_turns)}]")
    say(f"# instructions {usage.instructions} · = turns {usage.turns} · . free {usage.free} · of {usage.n_ctx} tokens")
    if usage.n_forgotten:
        say(f"{oldest(usage.n_forgotten)} left out")


def _prompt(session: Session, argument: str) -> None:
    """shows what the model has been given; TEXT: what it would be given with that as your next message"""
    say(printable(session.conversation.prompt(session.with_attached(argument) if argument else None)))


_COMMANDS: dict[str, Callable[[Session, str], None]] = {
    "help": _help,
    "set": _set,
    "system": _system,
    "clear": _clear,
    "undo": _undo,
    "regen": _regen,
    "save": chat_files.save,
    "load": chat_files.load,
    "sessions": chat_files.sessions,
    "read": chat_files.read,
    "copy": chat_files.copy,
    "model": chat_files.model,
    "lora": _lora,
    "stats": _stats,
    "context": _context,
    "prompt": _prompt,
}
COMMAND_NAMES = (*_COMMANDS, "exit")

_SETTINGS = [field.name for field in fields(SamplingParams)]
_WHOLE_NUMBERS = {"max_tokens", "top_k", "penalty_last_n", "seed"}
_TEXTS = {"schema", "regex", "lark"}


def _parse(name: str, text: str) -> Any:
    """The value of a setting. ValueError says what it takes."""
    if name == "stop":
        return (text,) if text else ()
    if name in (*_TEXTS, "max_tokens", "seed") and text in ("off", "none", ""):
        return None
    if name in _TEXTS:
        return text
    try:
        return int(text) if name in _WHOLE_NUMBERS else float(text)
    except ValueError:
        kind = "a whole number" if name in _WHOLE_NUMBERS else "a number"
        raise ValueError(f"{name} takes {kind}, not {text!r}") from None


def _shown(value: object) -> str:
    return "off" if value is None or value == () else ", ".join(value) if isinstance(value, tuple) else str(value)


def _shortened(text: str) -> str:
    return text if len(text) <= _LONG else f"{text[: _LONG - 100]} … {text[-100:]}"
