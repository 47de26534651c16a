"""The slash commands about what lies outside of the chat: sessions, files, models, the clipboard."""

from __future__ import annotations

import base64
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from edgellm.chat.conversation import Conversation
from edgellm.chat.named import NamedSession, is_session_name, list_sessions
from edgellm.chat.session import read_transcript
from edgellm.cli import options
from edgellm.cli.chat import Attachment, check_chats, say_loaded
from edgellm.cli.console import draws, printable, say
from edgellm.errors import OutputError, SessionError, TextError

if TYPE_CHECKING:
    from edgellm.cli.chat import Session

_MOST_BYTES_A_TOKEN = 64  # a file with more per token of the context isn't even read


def save(session: Session, argument: str) -> None:
    """NAME keeps the conversation under a name from now on; FILE writes it there once"""
    if not argument:
        if session.named is None:
            say("usage: /save NAME, or /save FILE with a dot or a slash in it")
            return
        session.keep(memory=True)
        say(f"saved in the session {session.named.name}")
    elif is_session_name(argument):
        _save_named(session, argument)
    else:
        path = _expanded(argument)
        _check_replaceable(path)
        session.conversation.save(path)
        say(f"saved to {argument}")


def _save_named(session: Session, name: str) -> None:
    named = session.named if session.named is not None and session.named.name == name else NamedSession(name)
    if named is not session.named and named.exists:
        raise OutputError(f"there is a session {name} already; /load {name} goes on with it, or choose another name")
    named.keep(session.conversation, memory=True)
    session.named = named
    say(f"the conversation is kept in the session {name} from now on")


def _check_replaceable(path: Path) -> None:
    """OutputError: something else is there. What can't be read can't be judged; writing says what is wrong."""
    if path.is_file():
        try:
            read_transcript(path)
        except SessionError:
            raise OutputError(f"{path} is there already and no saved conversation; choose another name") from None
    elif path.suffix == "" and path.parent == Path():
        raise OutputError(
            f"{path} can't name a session (letters, digits, - and _, 50 at most); a file needs a dot or a slash"
        )


def load(session: Session, argument: str) -> None:
    """NAME or FILE goes on with a saved conversation"""
    if not argument:
        say("usage: /load NAME, or /load FILE; /sessions lists the names")
        return
    if is_session_name(argument) and (named := NamedSession(argument)).exists:
        session.conversation = named.load(session.model)
        session.named = named
    else:
        path = _path(argument)
        if is_session_name(argument) and not path.exists():
            raise SessionError(f"there is no session and no file {argument}; /sessions lists the names")
        session.conversation = Conversation.load(session.model, path)
        if session.named is not None:
            say(f"the session {session.named.name} is left as it was; /save NAME keeps this conversation")
        session.named = None
    say_loaded(session.conversation)


def sessions(session: Session, _: str) -> None:
    """lists the conversations that are kept, the latest first"""
    found = list_sessions()
    for info in found:
        here = "*" if session.named is not None and session.named.name == info.name else " "
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(info.modified))
        about = (
            info.trouble or f"{info.n_messages} messages · {info.n_bytes / 1e6:.1f} MB · {_beginning(info.first_words)}"
        )
        say(f"{here} {info.name:<16} {when} · {printable(about)}")
    if not found:
        say("no conversation is kept yet; /save NAME keeps this one")


def _beginning(text: str) -> str:
    words = " ".join(text.split())
    return words if len(words) <= 40 else words[:39] + "…"


def read(session: Session, argument: str) -> None:
    """FILE puts a text file in front of your next message; alone it lists what waits, "off" lets go of it"""
    if argument == "off":
        session.attached.clear()
    elif argument:
        session.attached.append(_read_text(session, _path(argument)))
    for attachment in session.attached:
        say(f"{attachment.name}: {attachment.n_tokens} tokens go with your next message")
    if not session.attached:
        say("no file waits for your next message; /read FILE reads one")


def _read_text(session: Session, path: Path) -> Attachment:
    """TextError: a folder, not there, no text, or too long for the context."""
    if path.is_dir():
        raise TextError(f"{path} is a folder; /read takes one file")
    if path.exists() and not path.is_file():
        raise TextError(f"{path} is no ordinary file; /read takes a text file")
    n_ctx = session.model.n_ctx
    try:
        n_bytes = path.stat().st_size
        if n_bytes > _MOST_BYTES_A_TOKEN * n_ctx:
            raise TextError(f"{path} has {n_bytes / 1e6:.1f} MB, far more than a context of {n_ctx} tokens holds")
        data = path.read_bytes()
    except OSError as exc:
        raise TextError(f"cannot read {path}: {exc.strerror or exc}; check the path") from exc
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        raise TextError(f"{path} is no UTF-8 text (byte {exc.start}); convert it first") from exc
    if "\0" in text:
        raise TextError(f"{path} is a binary file; /read takes text")
    whole = f"{path.name}:\n\n{text.strip()}"
    n_tokens = len(session.model.tokenize(whole))
    free = n_ctx - n_ctx // 8 - session.conversation.usage().instructions
    free -= sum(attachment.n_tokens for attachment in session.attached)
    if n_tokens > free:
        raise TextError(
            f"{path} has {n_tokens} tokens, but the context has room for {max(0, free)}; use a larger --n-ctx"
        )
    return Attachment(path.name, whole, n_tokens)


def _path(argument: str) -> Path:
    """A path as it was typed, or as terminals paste it, quoted or with backslashes before spaces."""
    path = _expanded(argument)
    if path.exists():
        return path
    try:
        words = shlex.split(argument)
    except ValueError:
        return path
    unquoted = _expanded(words[0]) if len(words) == 1 else path
    return unquoted if unquoted.exists() else path


def _expanded(text: str) -> Path:
    try:
        return Path(text).expanduser()
    except RuntimeError:  # ~name of nobody
        return Path(text)


def model(session: Session, argument: str) -> None:
    """NAME or PATH goes on with another model; alone it shows which one answers"""
    if not argument:
        say(f"{session.model!r} of {session.model.path}")
        return
    name = str(path) if (path := _path(argument)).exists() else argument
    loaded = options.open_model(name, session.params)
    try:
        check_chats(loaded)
    except BaseException:
        loaded.close()
        raise
    had_adapters = bool(session.model.lora)
    session.conversation.use_model(loaded)
    session.model.close()
    session.model = loaded
    say(f"{loaded.path.name} answers from now on; it reads the conversation with your next message")
    if had_adapters:
        say("without the adapters, which are the other model's")
    if session.draft not in ("auto", "off", "ngram"):
        session.draft = options.DEFAULT_DRAFT
        say("and without its draft: --draft is auto again")


# where there is a program for the clipboard, and what has to be set in the environment for it to work
_CLIPBOARDS = (
    (("pbcopy",), ""),
    (("clip.exe",), ""),
    (("wl-copy",), "WAYLAND_DISPLAY"),
    (("xclip", "-selection", "clipboard"), "DISPLAY"),
    (("xsel", "--clipboard", "--input"), "DISPLAY"),
)
_MOST_OSC52_BYTES = 74_000  # what xterm takes


def copy(session: Session, _: str) -> None:
    """puts the last answer into the clipboard"""
    text = session.conversation.last_answer
    if text is None:
        say("there is no answer to copy yet")
        return
    for command, needs in _CLIPBOARDS:
        if (not needs or os.environ.get(needs)) and shutil.which(command[0]) and _run_with(command, text):
            say(f"{len(text)} characters copied by {command[0]}")
            return
    data = text.encode("utf-8", "replace")
    if not draws(sys.stderr):
        say("not copied: there is neither a clipboard program nor a terminal")
    elif len(data) > _MOST_OSC52_BYTES:
        say(f"not copied: the answer has {len(data)} bytes, a terminal takes {_MOST_OSC52_BYTES}")
    else:
        sys.stderr.write(f"\x1b]52;c;{base64.b64encode(data).decode()}\x07")
        say(f"{len(text)} characters sent to the terminal's clipboard (OSC 52, which some terminals leave off)")


def _run_with(command: tuple[str, ...], text: str) -> bool:
    """Whether the program took the text."""
    encoding = "utf-16-le" if command[0] == "clip.exe" else "utf-8"
    quiet = subprocess.DEVNULL  # xclip stays in the background and would hold our pipes open
    try:
        data = text.encode(encoding, "replace")
        return subprocess.run(command, input=data, stdout=quiet, stderr=quiet, timeout=5, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False
