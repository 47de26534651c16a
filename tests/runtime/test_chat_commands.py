"""Slash commands through a pipe: what they say, what they keep, and what nonsense they survive."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from edgellm.chat.session import read_transcript
from edgellm.cli.chat_commands import COMMAND_NAMES
from edgellm.cli.chat_lines import is_open, read_message, whole_messages
from tests.runtime.test_cli import EDGELLM

Chat = Callable[..., tuple[str, str, int]]


@pytest.fixture
def chat(tiny_chat_path: Path, tmp_path: Path) -> Chat:
    """Pipes lines into a chat; gives stdout, stderr, exit code. HOME and the working folder are the test's own."""

    def run(*lines: str | bytes, options: tuple[str, ...] = ()) -> tuple[str, str, int]:
        home = tmp_path / "home"
        home.mkdir(exist_ok=True)
        environment = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "WAYLAND_DISPLAY")}
        environment |= {"XDG_DATA_HOME": str(home), "HOME": str(home)}
        piped = b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines)
        command = [*EDGELLM, "chat", str(tiny_chat_path), "--temperature", "0", "-n", "4", "--n-ctx", "256", *options]
        result = subprocess.run(
            command, input=piped, capture_output=True, timeout=120, check=False, cwd=home, env=environment
        )
        return result.stdout.decode(), result.stderr.decode(), result.returncode

    return run


NONSENSE = [
    "", "x", "-1", "/", "..", "../../..", "/dev/zero", "~nobody-at-all/x", "a" * 5000, '"', "'", "\\", "%s %n {0}",
    "\0", "\x1b]52;c;QQ==\x07", "NUL", "con", "💥 漢字", "off on off", "=", "temperature", "temperature =", "seed -5",
    "top_k 1e9", "temperature nan", "stop", "max_tokens 99999999999999999999", "schema {", "none.gguf:x", ". .", "a b",
]  # fmt: skip


@pytest.mark.parametrize("name", [*COMMAND_NAMES[:-1], "", "nonsense", "SAVE", "/"])
def test_every_command_survives_every_nonsense(chat: Chat, name: str) -> None:
    lines = [f"/{name} {nonsense}" for nonsense in NONSENSE] + [f"/{name} \udcff".encode("utf-8", "surrogateescape")]
    answer, said, code = chat(
        "Hello.", *lines, "/set max_tokens 3", "/set schema off", "/set regex off", "/set lark off"
    )
    assert "Traceback" not in said
    assert "unexpected" not in said
    assert "\x1b" not in answer + said
    assert "max_tokens = 3" in said  # the chat was alive to the end
    assert said.count("\n") >= len(lines)
    assert code in (0, 1)
    assert answer.endswith("\n")


def test_exit_ends_whatever_follows_it(chat: Chat) -> None:
    answer, said, code = chat("/exit now", "Hello.")
    assert (answer, said, code) == ("", "", 0)


def test_help_names_every_command(chat: Chat) -> None:
    _, said, _ = chat("/help")
    for name in COMMAND_NAMES:
        assert f"\n  /{name} " in f"\n{said}"


def test_a_session_goes_on_where_it_ended(chat: Chat, tmp_path: Path) -> None:
    first = chat("Tell me about the sea.", options=("--session", "trip", "--system", "Be brief."))
    path = tmp_path / "home" / "edgellm" / "sessions" / "trip.session"
    assert [m["role"] for m in read_transcript(path)] == ["system", "user", "assistant"]
    assert path.stat().st_size > 10_000  # with the model's memory
    answer, said, code = chat("And then?", "/stats", "/sessions", options=("--session", "trip"))
    assert first[2] == code == 0
    assert said.startswith("3 messages loaded\n")
    assert "again" not in said
    evaluated, _, total = next(line for line in said.splitlines() if "prompt tokens read" in line).split()[:3]
    assert int(evaluated) < int(total) - 20  # all but the last answer's end and the new message
    assert "* trip" in said
    assert "5 messages" in said
    assert "Tell me about the sea." in said
    assert answer


def test_a_session_is_written_after_every_turn(chat: Chat, tmp_path: Path) -> None:
    """Another program looks at the file while the chat goes on: `/load FILE` reads what is on the disk."""
    path = tmp_path / "home" / "edgellm" / "sessions" / "trip.session"
    _, said, _ = chat("One.", "Two.", f"/load {path}", "/undo", options=("--session", "trip"))
    assert "4 messages loaded" in said
    assert "the session trip is left as it was" in said
    assert len(read_transcript(path)) == 4


def test_save_and_load_by_name(chat: Chat, tmp_path: Path) -> None:
    _, said, code = chat("One.", "/save alpha", "Two.", "/load alpha", "/clear", "/save beta", "/load alpha", "/prompt")
    assert "kept in the session alpha from now on" in said
    assert "4 messages loaded" in said
    folder = tmp_path / "home" / "edgellm" / "sessions"
    assert read_transcript(folder / "alpha.session") == []  # /clear was kept too: it is the same session
    assert not (folder / "beta.session").exists()  # nothing was said in it
    assert "edgellm: there is no prompt yet" in said
    assert code == 1


def test_another_session_is_not_written_over(chat: Chat, tmp_path: Path) -> None:
    chat("One.", options=("--session", "alpha"))
    path = tmp_path / "home" / "edgellm" / "sessions" / "alpha.session"
    before = path.read_bytes()
    _, said, code = chat("Other.", "/save alpha")
    assert "there is a session alpha already" in said
    assert (path.read_bytes(), code) == (before, 1)


def test_files_that_are_something_else_are_not_written_over(chat: Chat, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    notes = tmp_path / "home" / "notes.md"
    notes.write_text("precious")
    _, said, code = chat("One.", "/save notes.md", "/save talk.json", "/save talk.json", "/save my talk")
    assert "notes.md is there already and no saved conversation" in said
    assert notes.read_text() == "precious"
    assert said.count("saved to talk.json") == 2
    assert "my talk can't name a session" in said
    assert code == 1


@pytest.mark.parametrize("name", ["../x", "a b", "", "con", "x" * 51, "a.b", "é/"])
def test_bad_session_names_are_one_usage_error(chat: Chat, name: str) -> None:
    answer, said, code = chat("Hello.", options=("--session", name))
    assert code == 2
    assert "can't name a session; use letters, digits" in " ".join(said.split())
    assert answer == ""


def test_a_damaged_session_stops_the_chat_and_stays_as_it_is(chat: Chat, tmp_path: Path) -> None:
    folder = tmp_path / "home" / "edgellm" / "sessions"
    folder.mkdir(parents=True)
    (folder / "trip.session").write_bytes(b"\x00\xff half of something")
    answer, said, code = chat("Hello.", options=("--session", "trip"))
    assert (answer, code, said.count("\n")) == ("", 3, 1)
    assert "trip.session is damaged" in said
    assert (folder / "trip.session").read_bytes() == b"\x00\xff half of something"
    _, said, _ = chat("/sessions")
    assert "damaged" in said


@pytest.mark.parametrize("damage", ["flip", "cut", "foreign"])
def test_memory_that_cannot_be_used_is_read_again_with_one_line(chat: Chat, tmp_path: Path, damage: str) -> None:
    chat("Tell me about the sea.", options=("--session", "trip"))
    path = tmp_path / "home" / "edgellm" / "sessions" / "trip.session"
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[-500] ^= 1
    elif damage == "cut":
        del data[-500:]
    path.write_bytes(data)
    options = ("--session", "trip", *(("--kv", "f32", "--no-flash-attn") if damage == "foreign" else ()))
    _, said, code = chat("/undo", options=options)
    notice = {"flip": "memory is damaged", "cut": "truncated", "foreign": "another type of KV cache"}[damage]
    assert said.splitlines()[0] == "2 messages loaded"
    assert notice in said.splitlines()[1]
    assert said.splitlines()[1].endswith("; they are read again")
    assert said.splitlines()[2:] == ["taken back: Tell me about the sea."]
    assert code == 0


def test_a_file_goes_with_the_next_message_as_plain_text(chat: Chat, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "my notes.txt").write_text("\ufeffThe tide <|im_end|> is high.\n\n")
    lines = ["/read my notes.txt", '/read "my notes.txt"', "/read off", "/read my\\ notes.txt", "/prompt Why?"]
    _, said, code = chat(*lines, "Why?", "/read", "/undo")
    assert code == 0
    assert said.count("my notes.txt:") == 6  # 1, then 2 listed, then 1, then in the prompt, then taken back
    assert (
        "<|im_start|>user\nmy notes.txt:\n\nThe tide <|im_end|> is high.\n\nWhy?<|im_end|>\n<|im_start|>assistant"
        in said
    )
    assert "no file waits for your next message" in said
    assert "taken back: my notes.txt:\n\nThe tide <|im_end|> is high.\n\nWhy?" in said


def test_files_that_cannot_be_read_are_one_line_each(chat: Chat, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "binary").write_bytes(b"\x00\x01\x02")
    (home / "latin").write_bytes("é".encode("latin-1"))
    (home / "long").write_text("the sea and the shore " * 200)
    (home / "huge").write_bytes(b"x" * 100_000)
    os.mkfifo(home / "pipe")
    names = ["binary", "latin", "long", "huge", "pipe", ".", "none"]
    _, said, code = chat(*(f"/read {name}" for name in names))
    expected = [
        "binary is a binary file", "latin is no UTF-8 text (byte 0)", "but the context has room for", "far more than",
        "pipe is no ordinary file", ". is a folder", "cannot read none: No such file or directory",
    ]  # fmt: skip
    for line, message in zip(said.splitlines(), expected, strict=True):
        assert line.startswith("edgellm: ")
        assert message in line
    assert code == 1


def test_another_model_goes_on_with_the_conversation(chat: Chat, tiny_chat_path: Path, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    other = tmp_path / "home" / "other.gguf"
    other.write_bytes(tiny_chat_path.read_bytes())
    (tmp_path / "home" / "broken.gguf").write_bytes(other.read_bytes()[:5000])
    lines = [
        "One.",
        "/set temperature 0.5",
        "/model broken.gguf",
        "/model none",
        "/model",
        "/model other.gguf",
        "/model",
    ]
    answer, said, code = chat(*lines, "Two.", "/set", "/undo", "/undo")
    assert "broken.gguf" in said
    assert "no such file or model: none" in said
    assert f"of {tiny_chat_path}" in said
    assert "other.gguf answers from now on" in said
    assert "of other.gguf" in said
    assert "temperature = 0.5" in said
    assert "taken back: Two.\ntaken back: One." in said
    assert answer.count("\n") >= 2
    assert code == 1


def test_a_full_context_is_said_once_and_then_goes_on(chat: Chat) -> None:
    lines = [
        f"Tell me story number {i} about the sea and the lighthouse on the cape, and the keeper." for i in range(8)
    ]
    _, said, code = chat(*lines, "/context", "word " * 600, "Still there?")
    dropped = [line for line in said.splitlines() if "left out from now on" in line]
    assert 1 <= len(dropped) <= 3
    assert dropped[0].startswith("[the context is full: the ")
    assert "# instructions" in said
    assert "left out\n" in said
    assert "even without all earlier turns, but the context holds 256; shorten it" in said
    assert code == 1


def test_context_without_anything_said(chat: Chat) -> None:
    _, said, code = chat("/context")
    bar, figures = said.splitlines()
    assert len(bar) <= 42
    assert "turns 0" in figures
    assert code == 0


def test_copy_without_terminal_or_program(chat: Chat) -> None:
    _, said, code = chat("/copy", "Hello.", "/copy")
    assert said.splitlines()[0] == "there is no answer to copy yet"
    assert "not copied: there is neither a clipboard program nor a terminal" in said
    assert code == 0


def test_several_lines_between_quotes_are_one_message(chat: Chat) -> None:
    answer, said, code = chat(
        '"""', "/help is no command here", "", "end", '"""', "/undo", '"""on one line"""', "/undo"
    )
    assert "taken back: /help is no command here\n\nend\n" in said
    assert "taken back: on one line\n" in said
    assert code == 0
    assert answer.endswith("\n")


@pytest.mark.parametrize(
    ("text", "opened", "message"),
    [
        ("plain", False, ("plain", False)),
        (" /help x ", False, ("/help x", True)),
        ('"""', True, ("", False)),
        ('""""""', False, ("", False)),
        ('"""a\nb', True, ("a\nb", False)),
        ('"""a\nb"""\n', False, ("a\nb", False)),
        ('say """ and', False, ('say """ and', False)),
    ],
)
def test_quotes(text: str, opened: bool, message: tuple[str, bool]) -> None:
    assert is_open(text) is opened
    assert read_message(text) == message


def test_lines_of_a_pipe() -> None:
    lines = [b"one\n", b'"""two\n', b"three\n", b'"""\n', b'"""never ends\n', b"at all"]
    assert list(whole_messages(lines)) == ["one\n", '"""two\nthree\n"""\n', '"""never ends\nat all']
