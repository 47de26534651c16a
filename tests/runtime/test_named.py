"""Conversations kept under names: what is written when, and what is never written over."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgellm import Conversation, OutputError, SessionError
from edgellm.chat.named import NamedSession, is_session_name, list_sessions, sessions_folder
from edgellm.chat.session import read_session, read_transcript
from tests.runtime.test_overflow import ScriptedChat, say


@pytest.fixture(autouse=True)
def data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "sessions"
    monkeypatch.setattr("edgellm.chat.named.sessions_folder", lambda: folder)
    return folder


@pytest.mark.parametrize("name", ["a", "trip-2", "Größe_1", "x" * 50, "2026-11-24"])
def test_names(name: str) -> None:
    assert is_session_name(name)


@pytest.mark.parametrize("name", ["", "x" * 51, "a.b", "a/b", "a\\b", "..", "a b", "CON", "lpt1", "a\n", "a:b"])
def test_what_is_no_name(name: str) -> None:
    assert not is_session_name(name)
    with pytest.raises(SessionError, match="can't name a session"):
        NamedSession(name)


def test_only_changes_are_written(data_folder: Path) -> None:
    conversation, named = Conversation(ScriptedChat(100), "be brief"), NamedSession("trip")
    named.keep(conversation, memory=False)
    assert not data_folder.exists()  # nothing was said yet
    say(conversation, "hello")
    named.keep(conversation, memory=False)
    assert read_session(named.path, {}).memory is None
    written = named.path.stat().st_mtime_ns
    named.keep(conversation, memory=False)
    assert named.path.stat().st_mtime_ns == written
    named.keep(conversation, memory=True)
    assert read_session(named.path, {}).memory is not None
    conversation.undo()
    named.keep(conversation, memory=False)
    assert read_transcript(named.path) == [{"role": "system", "content": "be brief"}]
    assert [path.name for path in data_folder.iterdir()] == ["trip.session"]


def test_looking_at_a_session_does_not_write_it(data_folder: Path) -> None:
    conversation, named = Conversation(ScriptedChat(100)), NamedSession("trip")
    say(conversation, "hello")
    named.keep(conversation, memory=True)
    content = named.path.stat().st_mtime_ns
    again = NamedSession("trip")
    again.keep(again.load(ScriptedChat(100)), memory=True)
    assert named.path.stat().st_mtime_ns == content


def test_what_another_chat_wrote_is_not_written_over() -> None:
    ours, theirs = NamedSession("trip"), NamedSession("trip")
    conversation, other = Conversation(ScriptedChat(100)), Conversation(ScriptedChat(100))
    say(conversation, "mine")
    ours.keep(conversation, memory=False)
    say(other, "theirs")
    with pytest.raises(OutputError, match=r"another chat has written the session trip.*/save OTHER-NAME"):
        theirs.keep(other, memory=False)
    assert read_transcript(ours.path)[0]["content"] == "mine"
    say(conversation, "more")
    ours.keep(conversation, memory=False)
    assert len(read_transcript(ours.path)) == 4


def test_the_list_has_the_latest_first_and_the_damaged_too(data_folder: Path) -> None:
    import os

    for i, name in enumerate(("old", "new")):
        conversation = Conversation(ScriptedChat(100))
        say(conversation, f"this is the {name} one")
        named = NamedSession(name)
        named.keep(conversation, memory=False)
        os.utime(named.path, (1000 + i, 1000 + i))
    (data_folder / "broken.session").write_bytes(b"\xff")
    (data_folder / ".old.session.x.partial").write_bytes(b"what a kill left")
    (data_folder / "other.txt").write_text("not ours")
    broken, new, old = list_sessions()
    assert (new.name, new.n_messages, new.first_words, new.trouble) == ("new", 2, "this is the new one", "")
    assert old.name == "old"
    assert broken.name == "broken"
    assert "damaged" in broken.trouble


def test_the_folder_is_the_users() -> None:
    assert sessions_folder().parts[-2:] == ("edgellm", "sessions")
