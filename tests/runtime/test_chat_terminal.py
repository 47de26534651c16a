"""The chat as its users meet it, through a pseudo-terminal: keys, pastes, history, what is on the screen."""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pexpect
import pytest

from tests.runtime.screen import Terminal
from tests.runtime.test_cli import EDGELLM, READY

pytestmark = pytest.mark.skipif(os.name == "nt", reason="needs a pty")

COLOUR = re.compile(r"\x1b\[[\d;]*\b(?:3\d|4\d|9\d|10\d)[\d;]*m")


class Chat:
    """A chat in a terminal of 30 lines; `log` is all that it wrote."""

    def __init__(self, home: Path, model: Path, options: tuple[str, ...], columns: int, **environment: str) -> None:
        base = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "WAYLAND_DISPLAY", "NO_COLOR")}
        base |= {"XDG_STATE_HOME": str(home), "XDG_DATA_HOME": str(home), "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
        arguments = [*EDGELLM[1:], "chat", str(model), "--temperature", "0", "-n", "6", "--n-ctx", "256", *options]
        self.child = pexpect.spawn(
            EDGELLM[0], arguments, env=base | environment, encoding="utf-8", timeout=90, dimensions=(30, columns)
        )
        self.log = ""
        self._columns = columns
        self.until("/help lists the commands")
        self.until("> " if environment.get("TERM") == "dumb" else READY)

    def until(self, pattern: str) -> None:
        self.child.expect(pattern)
        self.log += self.child.before + self.child.after

    def type(self, text: str) -> None:
        """Type it and wait for the next input line."""
        self.child.send(text)
        self.until(READY)

    def leave(self) -> int:
        self.child.sendcontrol("d")
        self.child.expect(pexpect.EOF)
        self.log += self.child.before
        self.child.wait()
        return int(self.child.exitstatus or 0)

    @property
    def rows(self) -> list[str]:
        terminal = Terminal(self._columns, 30)
        terminal.feed(self.log)
        return terminal.rows


Open = Callable[..., Chat]


@pytest.fixture
def open_chat(tiny_chat_path: Path, tmp_path: Path) -> Iterator[Open]:
    opened: list[Chat] = []

    def start(*options: str, columns: int = 100, **environment: str) -> Chat:
        opened.append(Chat(tmp_path, tiny_chat_path, options, columns, **environment))
        return opened[-1]

    yield start
    for chat in opened:
        chat.child.close(force=True)


def test_messages_of_several_lines(open_chat: Open) -> None:
    chat = open_chat()
    chat.type("\x1b[200~pasted one\r\npasted /two\r\n\x1b[201~and typed\r")
    chat.type("/undo\r")
    chat.type("first\nsecond\r")  # Ctrl-J
    chat.type("/undo\r")
    chat.type('"""\r/exit is text here\r\rlast"""\r')
    chat.type("/undo\r")
    assert chat.leave() == 0
    text = "\n".join(chat.rows)
    assert "taken back: pasted one\npasted /two\nand typed\n" in text
    assert "taken back: first\nsecond\n" in text
    assert "taken back: /exit is text here\n\nlast\n" in text


def test_history_is_kept_also_of_a_message_that_did_not_fit(open_chat: Open, tmp_path: Path) -> None:
    chat = open_chat()
    too_long = "word " * 300 + "end"
    chat.type(f"\x1b[200~{too_long}\x1b[201~\r")
    chat.leave()
    assert "even without all earlier turns, but the context holds 256" in "".join(chat.rows)  # over two rows
    assert too_long in (tmp_path / "edgellm" / "chat-history").read_text()
    assert (tmp_path / "edgellm" / "chat-history").stat().st_mode & 0o77 == 0
    again = open_chat("--no-history", "--n-ctx", "1024")
    again.type("not to be remembered\r")
    again.type("/undo\r")
    again.type("\x1b[A\x1b[A\r")  # the message before the command, of this chat only
    again.type("/undo\r")
    again.leave()
    assert "\n".join(again.rows).count("taken back: not to be remembered") == 2
    assert "not to be remembered" not in (tmp_path / "edgellm" / "chat-history").read_text()
    third = open_chat("--n-ctx", "1024")
    third.type("\x1b[A\r")
    third.type("/undo\r")
    third.leave()
    assert "taken back: word word word" in " ".join(third.rows)


def test_keys_pressed_during_an_answer_are_kept_for_the_next_line(open_chat: Open) -> None:
    chat = open_chat("-n", "150", "--n-ctx", "1024")
    chat.child.send("Tell me about the sea.\r")
    chat.until(r"\?2004l")
    chat.child.send("/unknown")
    chat.until("tok/s")
    chat.until(READY)
    before = chat.log
    chat.type("\r")
    chat.leave()
    after_question = before[before.rindex("?2004l") :]
    assert "/unknown" not in after_question[: after_question.index("tok/s")]
    assert "no command /unknown" in "\n".join(chat.rows)


def test_the_answer_is_on_the_screen_as_it_was_given(open_chat: Open) -> None:
    chat = open_chat(columns=40)
    chat.type("Tell me about the sea.\r")
    chat.type("/prompt\r")
    chat.leave()
    text = "\n".join(chat.rows)
    assert "<|im_start|>user" in text
    assert "context" in text
    assert max(map(len, chat.rows)) <= 40


@pytest.mark.parametrize("columns", [100, 20])
def test_no_color_leaves_no_colours(open_chat: Open, columns: int) -> None:
    chat = open_chat(columns=columns, NO_COLOR="1")
    for line in ("Tell me about the sea.\r", "/context\r", "/help\r", "/nonsense\r"):
        chat.type(line)
    assert chat.leave() == 0
    assert not COLOUR.search(chat.log), COLOUR.search(chat.log)
    assert any("free" in row for row in chat.rows)


def test_copy_goes_through_the_terminal(open_chat: Open) -> None:
    chat = open_chat(PATH=os.defpath)
    chat.type("Tell me about the sea.\r")
    chat.type("/copy\r")
    chat.type("/prompt\r")
    chat.leave()
    sent = re.search(r"\x1b\]52;c;([A-Za-z0-9+/=]*)\x07", chat.log)
    assert sent is not None
    copied = base64.b64decode(sent[1]).decode()
    assert f"{len(copied)} characters sent to the terminal's clipboard" in "\n".join(chat.rows)
    assert copied in chat.log.replace("\r\n", "\n")  # as /prompt shows it


def test_tab_completes_commands(open_chat: Open) -> None:
    chat = open_chat()
    chat.child.send("/cont\t")
    chat.until("context")
    chat.type("\r")
    chat.leave()
    assert any("# instructions" in row for row in chat.rows)


def test_ctrl_c_takes_back_a_line_then_leaves_and_the_session_is_kept(open_chat: Open) -> None:
    chat = open_chat("--session", "trip")
    chat.type("Tell me about the sea.\r")
    chat.child.send("half a line")
    chat.until("half a line")
    chat.child.sendintr()
    chat.type("/stats\r")
    chat.child.sendintr()
    chat.child.expect(pexpect.EOF)
    chat.child.wait()
    assert chat.child.exitstatus == 0
    again = open_chat("--session", "trip")
    again.type("/undo\r")
    again.leave()
    assert any("2 messages loaded" in row for row in again.rows)
    assert any("taken back: Tell me about the sea." in row for row in again.rows)


def test_a_killed_chat_leaves_every_finished_turn(open_chat: Open) -> None:
    chat = open_chat("--session", "trip")
    chat.type("One.\r")
    chat.type("Two.\r")
    chat.child.kill(9)
    again = open_chat("--session", "trip")
    assert any("4 messages loaded" in row for row in again.rows)
    again.type("/undo\r")
    again.leave()
    assert any("taken back: Two." in row for row in again.rows)


def test_a_terminal_that_knows_nothing_gets_plain_text(open_chat: Open) -> None:
    chat = open_chat(TERM="dumb")
    mark = len(chat.log)
    chat.child.send("Tell me about the sea.\r")
    chat.until("tok/s")
    assert "\x1b[2K" not in chat.log[mark:]
    assert "\x1b[2m" not in chat.log[mark:]
