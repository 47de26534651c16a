"""Saved conversations: gone on with at once, and read again wherever what was saved can't be trusted."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import edgellm
from edgellm import Conversation, LoadParams, Model, SamplingParams, SessionError
from edgellm.chat.session import Memory, read_session, write_session

SHORT = SamplingParams(max_tokens=12)
MAKER = {"model": "m", "type of KV cache": "f16"}


@pytest.fixture
def talked(model: Model, tmp_path: Path) -> tuple[Conversation, Path]:
    conversation = Conversation(model, "You are brief.")
    list(conversation.say("Tell me about the sea, the shore and the lighthouse on the cape.", SHORT))
    conversation.save(tmp_path / "talk")
    return conversation, tmp_path / "talk"


def evaluated(conversation: Conversation) -> int:
    return list(conversation.say("And then?", SHORT))[-1].stats.evaluated_prompt_tokens


def test_another_process_goes_on_without_reading_again(talked: tuple[Conversation, Path], model_path: Path) -> None:
    before, path = talked
    with edgellm.load(model_path, LoadParams(n_ctx=512)) as fresh:
        conversation = Conversation.load(fresh, path)
        assert conversation.messages == before.messages
        assert conversation.notice == ""
        expected = list(before.say("And then?", SHORT))
        found = list(conversation.say("And then?", SHORT))
    assert found[-1].stats.evaluated_prompt_tokens < 20
    assert "".join(r.text for r in found) == "".join(r.text for r in expected)


@pytest.mark.parametrize("damage", ["flip", "cut", "memory gone"])
def test_damaged_memory_is_read_again(talked: tuple[Conversation, Path], damage: str) -> None:
    before, path = talked
    data = bytearray(path.read_bytes())
    start = data.index(b"\n", data.index(b"\n") + 1) + 1
    if damage == "flip":
        data[(start + len(data)) // 2] ^= 16
    elif damage == "cut":
        del data[len(data) - 1000 :]
    else:
        del data[start:]
    path.write_bytes(data)
    before._model._context.reuse_prefix(())  # type: ignore[attr-defined]
    conversation = Conversation.load(before._model, path)
    assert conversation.messages == before.messages
    assert (conversation.notice != "") == (damage != "memory gone")
    assert evaluated(conversation) > 30


@pytest.mark.parametrize(
    ("params", "other"),
    [(LoadParams(n_ctx=512, kv_type="f32"), "KV cache"), (LoadParams(n_ctx=512, flash_attn=False), "flash attention")],
)
def test_memory_of_other_settings_is_not_used(
    talked: tuple[Conversation, Path], model_path: Path, params: LoadParams, other: str
) -> None:
    before, path = talked
    with edgellm.load(model_path, params) as differently:
        conversation = Conversation.load(differently, path)
        assert conversation.messages == before.messages
        assert other in conversation.notice
        assert evaluated(conversation) > 30


def test_a_context_too_small_for_the_memory(talked: tuple[Conversation, Path], model_path: Path) -> None:
    with edgellm.load(model_path, LoadParams(n_ctx=32)) as small:
        assert "doesn't fit" in Conversation.load(small, talked[1]).notice


def test_every_flipped_byte_leaves_the_text_or_says_so(tmp_path: Path) -> None:
    path = tmp_path / "s"
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    write_session(path, messages, Memory([1, 2, 3], MAKER, bytes(range(40))))
    whole = path.read_bytes()
    assert read_session(path, MAKER).memory == Memory([1, 2, 3], MAKER, bytes(range(40)))
    assert json.loads(whole.splitlines()[0])["messages"] == messages
    for i in range(len(whole)):
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :])
        try:
            saved = read_session(path, MAKER)
        except SessionError:
            assert i < whole.index(b"\n") + 1
            continue
        assert saved.memory is None
        assert saved.notice
    for i in range(whole.index(b"\n") + 1, len(whole)):
        path.write_bytes(whole[:i])
        assert read_session(path, MAKER).messages == messages
        assert read_session(path, MAKER).memory is None


def test_files_of_the_first_version_are_read(tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    messages = [{"role": "user", "content": "Hi"}]
    path.write_text(json.dumps({"format": "edgellm-conversation", "version": 1, "messages": messages}, indent=1))
    assert read_session(path, MAKER).messages == messages


SAVE = """
import sys
from pathlib import Path
from edgellm.chat.session import Memory, write_session
path = Path(sys.argv[1])
data = bytes(4_000_000)
n = 1
while True:
    write_session(path, [{"role": "user", "content": str(n)}], Memory([n], {"n": n}, data))
    n += 1
"""


def test_a_kill_while_saving_leaves_one_whole_file(tmp_path: Path) -> None:
    path, rng, last = tmp_path / "talk", random.Random(0), 0
    for _ in range(50):
        with subprocess.Popen([sys.executable, "-c", SAVE, str(path)]) as process:
            before = path.stat().st_mtime_ns if path.exists() else 0
            while not path.exists() or path.stat().st_mtime_ns == before:
                time.sleep(0.001)
            time.sleep(rng.random() / 50)
            process.send_signal(signal.SIGKILL)
        saved = read_session(path, None)
        assert saved.notice == ""
        assert saved.memory is not None
        last = int(saved.messages[0]["content"])
        assert list(saved.memory.tokens) == [last]
    assert last >= 1
