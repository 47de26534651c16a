"""Isolated models when something goes wrong, is cancelled, or waits: the child dies, the host doesn't."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

import edgellm
from edgellm import Cancelled, Conversation, EngineCrashed, GenerationError, Model, SamplingParams
from tests.runtime.isolated import (
    ENDLESS,
    GREEDY,
    LONG_PROMPT,
    MESSAGES,
    PARAMS,
    PROMPT,
    engine_that,
    eventually,
    is_gone,
    isolated,
    pid_of,
    plain,
    shared,
    started,
    tiny_path,
)
from tests.runtime.test_lora import Tiny

__all__ = ["isolated", "plain", "shared", "tiny_path"]  # fixtures

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals")

# llama.cpp asserts that the token sampled from has logits; our own code would refuse first
ABORT = """
from edgellm.native.context import Context
Context.sample = lambda self, chain, i=None: self._lib.llama_sampler_sample(chain, self._open_pointer(), 400)
"""


def die_in_decode(model: Model, how: int) -> None:
    with model.generate(PROMPT, ENDLESS) as stream:
        next(stream)
        os.kill(pid_of(model), how)
        list(stream)


def die_in_prefill(model: Model, how: int) -> None:
    pid, killed = pid_of(model), []

    def kill(_: float) -> None:
        if not killed:
            killed.append(os.kill(pid, how))

    model.complete(LONG_PROMPT, on_progress=kill)


def die_in_logits(model: Model, how: int) -> None:
    pid, engine = pid_of(model), model._engine  # type: ignore[attr-defined]
    started(lambda: eventually(lambda: engine._call is not None) and os.kill(pid, how))
    model.logits(LONG_PROMPT)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGABRT, signal.SIGSEGV])
@pytest.mark.parametrize("die", [die_in_decode, die_in_prefill, die_in_logits])
def test_a_dead_child_is_one_error_and_the_next_call_goes_on(
    isolated: Model, plain: Model, die: Any, how: signal.Signals
) -> None:
    pid = pid_of(isolated)
    with pytest.raises(EngineCrashed, match=rf"tiny\.gguf was killed by {how.name}.*; the next call starts it anew"):
        die(isolated, how)
    assert is_gone(pid)
    assert isolated.complete(PROMPT, GREEDY).token_ids == plain.complete(PROMPT, GREEDY).token_ids
    assert pid_of(isolated) != pid


def test_a_child_that_dies_idle_is_replaced_and_the_conversation_read_again(isolated: Model, caplog: Any) -> None:
    conversation = Conversation(isolated)
    list(conversation.say("Hello", GREEDY))
    os.kill(pid_of(isolated), signal.SIGKILL)
    assert eventually(lambda: isolated.engine_pid is None)  # type: ignore[attr-defined]
    *_, last = conversation.say("And now?", GREEDY)
    assert last.stats.evaluated_prompt_tokens == last.stats.prompt_tokens
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"] * 2
    assert "was killed by SIGKILL" in caplog.text


def test_a_conversation_survives_a_crash_in_its_middle(isolated: Model) -> None:
    conversation = Conversation(isolated)
    list(conversation.say("Hello", GREEDY))
    answer = conversation.say("And now?", ENDLESS)
    begun = next(answer).text
    os.kill(pid_of(isolated), signal.SIGKILL)
    with pytest.raises(EngineCrashed):
        list(answer)
    assert conversation.messages[3]["content"].startswith(begun)  # kept as far as it came
    list(conversation.regenerate(GREEDY))
    assert len(conversation.messages) == 4


def test_a_real_assertion_of_ggml(tiny_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    engine_that(ABORT, monkeypatch)
    with edgellm.load(tiny_path, PARAMS, isolated=True) as model:
        with pytest.raises(EngineCrashed, match=r"SIGABRT \(.*GGML_ASSERT.*\)"):
            model.complete(PROMPT, GREEDY, draft="off")
        monkeypatch.undo()
        assert model.complete(PROMPT, GREEDY).finish_reason == "length"
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(sys.platform != "linux", reason="prlimit")
def test_a_child_without_memory_does_no_harm(isolated: Model, plain: Model) -> None:
    import resource

    pid = pid_of(isolated)
    isolated.logits(PROMPT)
    used = psutil.Process(pid).memory_info().vms
    resource.prlimit(pid, resource.RLIMIT_AS, (used + (1 << 20), used + (1 << 20)))
    with pytest.raises((EngineCrashed, GenerationError, MemoryError)):
        isolated.logits(LONG_PROMPT)  # 80 MB of logits, and a context
    with contextlib.suppress(ProcessLookupError):  # where C++ aborts for want of memory, it is gone already
        os.kill(pid, signal.SIGKILL)
    assert eventually(lambda: isolated.engine_pid is None)  # type: ignore[attr-defined]
    assert isolated.complete(PROMPT, GREEDY).token_ids == plain.complete(PROMPT, GREEDY).token_ids


@pytest.fixture
def memory_cgroup() -> Iterator[Path]:
    """The limit of a control group that processes can be moved into: the kernel kills who takes more."""
    v1, v2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
    at, limit = (v1, "memory.limit_in_bytes") if v1.is_dir() else (v2, "memory.max")
    group = at / f"edgellm-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / limit).write_text(str(1 << 30))
    except OSError as exc:
        if group.is_dir():
            group.rmdir()
        pytest.skip(f"no control groups for memory here: {exc}")
    yield group / limit
    assert eventually(lambda: not (group / "cgroup.procs").read_text())
    group.rmdir()


def test_the_systems_own_out_of_memory_kill(isolated: Model, plain: Model, memory_cgroup: Path) -> None:
    pid = pid_of(isolated)
    (memory_cgroup.parent / "cgroup.procs").write_text(str(pid))
    isolated.logits(PROMPT)
    memory_cgroup.write_text(str(16 << 20))  # what it holds already isn't counted; 80 MB of logits are
    with pytest.raises(EngineCrashed, match="was killed by SIGKILL"):
        isolated.logits(LONG_PROMPT)
    assert is_gone(pid)
    assert isolated.complete(PROMPT, GREEDY).token_ids == plain.complete(PROMPT, GREEDY).token_ids


def test_a_child_that_dies_while_it_loads(tiny_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        engine_that("import os\nos.abort()", patch)
        with pytest.raises(EngineCrashed, match="SIGABRT"):
            edgellm.load(tiny_path, PARAMS, isolated=True)
        engine_that("raise SystemExit('no engine today')", patch)
        with pytest.raises(EngineCrashed, match=r"ended with code 1 \(no engine today\)"):
            edgellm.load(tiny_path, PARAMS, isolated=True)
        engine_that("import os\nos.write(1, bytes(range(256)) * 9)\nos.read(0, 9)", patch)
        with pytest.raises(EngineCrashed, match="ended, for it sent"):
            edgellm.load(tiny_path, PARAMS, isolated=True)
    with edgellm.load(tiny_path, PARAMS, isolated=True) as model:
        assert model.n_vocab == 1000


def test_adapters_come_again_with_the_new_child(tmp_path: Path) -> None:
    small = Tiny(tmp_path)
    _, adapter = small.adapter("plain")
    params = edgellm.LoadParams(n_ctx=256, n_threads=1)
    with edgellm.load(small.gguf, params, isolated=True, lora=[(adapter, 0.5)]) as model:
        adapted = model.logits(PROMPT)
        in_use = model.lora
        assert [scale for _, scale in in_use] == [0.5]
        os.kill(pid_of(model), signal.SIGKILL)
        assert eventually(lambda: model.engine_pid is None)  # type: ignore[attr-defined]
        np.testing.assert_array_equal(model.logits(PROMPT), adapted)
        assert model.lora == in_use
        model.set_lora()
        os.kill(pid_of(model), signal.SIGKILL)
        assert eventually(lambda: model.engine_pid is None)  # type: ignore[attr-defined]
        assert float(np.abs(model.logits(PROMPT) - adapted).max()) > 0.01


HOST = """
import os, sys, time, edgellm
model = edgellm.load(sys.argv[1], edgellm.LoadParams(n_ctx=24_000, n_threads=1), isolated=True)
if sys.argv[2] == "forked" and not os.fork():
    time.sleep(600)  # holds all the pipes
print(model.engine_pid, flush=True)
if sys.argv[2] == "busy":
    model.complete([5] * 20_000, on_progress=lambda _: print("reading", flush=True))
time.sleep(600)
"""


@pytest.mark.parametrize("host_is", ["idle", "busy", "forked"])
def test_no_child_outlives_its_host(tiny_path: Path, host_is: str) -> None:
    with subprocess.Popen([sys.executable, "-c", HOST, tiny_path, host_is], stdout=subprocess.PIPE) as host:
        assert host.stdout is not None
        pid = int(host.stdout.readline())
        if host_is == "busy":
            assert host.stdout.readline() == b"reading\n"
        forked = [child for child in psutil.Process(host.pid).children() if child.pid != pid]
        host.kill()
        for child in forked:
            assert eventually(lambda: is_gone(pid))
            child.kill()
    assert eventually(lambda: is_gone(pid))


def test_twenty_restarts_leave_nothing_behind(isolated: Model) -> None:
    this = psutil.Process()
    isolated.complete(PROMPT, SamplingParams(max_tokens=1))
    before = this.num_fds(), threading.active_count(), len(this.children())
    for _ in range(20):
        os.kill(pid_of(isolated), signal.SIGKILL)
        assert eventually(lambda: isolated.engine_pid is None)  # type: ignore[attr-defined]
        isolated.tokenize("x")
    assert (this.num_fds(), threading.active_count(), len(this.children())) == before
    isolated.close()
    assert (this.num_fds(), threading.active_count(), len(this.children())) == (
        before[0] - 3,
        before[1] - 3,
        before[2] - 1,
    )


def test_cancel_while_a_new_child_loads(isolated: Model) -> None:
    os.kill(pid_of(isolated), signal.SIGKILL)
    assert eventually(lambda: isolated.engine_pid is None)  # type: ignore[attr-defined]
    outcome: list[object] = []

    def work() -> None:
        try:
            outcome.append(isolated.complete(PROMPT, GREEDY))
        except Cancelled as exc:
            outcome.append(exc)

    thread = started(work)
    assert eventually(lambda: isolated._engine._loading is not None)  # type: ignore[attr-defined]
    isolated.cancel()
    thread.join()
    assert isinstance(outcome[0], Cancelled)
    assert isolated.complete(PROMPT, GREEDY).finish_reason == "length"


@pytest.mark.parametrize("by", ["model", "stream"])
def test_cancel_in_a_prompt_from_another_thread(shared: Model, by: str) -> None:
    reading = threading.Event()
    stream = shared.generate(LONG_PROMPT, GREEDY, on_progress=lambda _: reading.set())
    canceller = started(lambda: reading.wait(60) and (stream if by == "stream" else shared).cancel())
    with pytest.raises(Cancelled):
        next(stream)
    canceller.join()
    assert shared.context_used < len(LONG_PROMPT)
    assert shared.complete(PROMPT, GREEDY).finish_reason == "length"


@pytest.mark.parametrize("by", ["model", "stream"])
def test_cancel_in_an_answer_from_another_thread(shared: Model, plain: Model, by: str) -> None:
    with shared.generate(PROMPT, ENDLESS, draft="off") as stream:
        responses = [next(stream)]
        thread = started((stream if by == "stream" else shared).cancel)
        responses += stream
        thread.join()
    assert responses[-1].finish_reason == "cancelled"
    tokens = [token for response in responses for token in response.token_ids]
    expected = plain.complete(PROMPT, SamplingParams(max_tokens=len(tokens)), draft="off")
    assert tokens == expected.token_ids
    conversation = Conversation(shared)
    list(conversation.say("Hello", GREEDY))
    assert len(conversation.messages) == 2


@pytest.mark.parametrize(
    "call",
    [
        lambda model: model.logits(LONG_PROMPT),
        lambda model: list(model.answer_all(iter(lambda: _request(), None), 2)),
    ],
)
def test_cancel_in_other_calls(shared: Model, call: Any) -> None:
    turns = shared._engine  # type: ignore[attr-defined]
    canceller = started(lambda: eventually(lambda: turns._call is not None) and shared.cancel())
    with pytest.raises(Cancelled):
        call(shared)
    canceller.join()
    assert shared.complete(PROMPT, GREEDY).finish_reason == "length"


def _request() -> Any:
    from edgellm.engine.parallel import Request

    return Request(0, PROMPT, GREEDY)


def test_cancel_with_nothing_running_has_no_effect(shared: Model) -> None:
    shared.cancel()
    assert shared.complete(PROMPT, GREEDY).stats.completion_tokens == 24


def test_an_asyncio_task_is_cancelled_in_prompt_and_answer(shared: Model, plain: Model) -> None:
    async def cancelled(prompt: list[int], params: SamplingParams, at_progress: bool) -> None:
        begun = asyncio.Event()
        loop = asyncio.get_running_loop()

        async def work() -> None:
            progress = (lambda _: loop.call_soon_threadsafe(begun.set)) if at_progress else None
            async for _ in shared.agenerate(prompt, params, on_progress=progress):
                begun.set()

        task = asyncio.create_task(work())
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    async def scenario() -> str:
        await cancelled(LONG_PROMPT, GREEDY, True)
        await cancelled(PROMPT, ENDLESS, False)
        return "".join([response.text async for response in shared.achat(MESSAGES, GREEDY)])

    assert asyncio.run(scenario()) == "".join(response.text for response in plain.chat(MESSAGES, GREEDY))


@pytest.mark.parametrize("kind", ["plain", "shared"])
def test_callers_are_served_in_the_order_they_came(kind: str, request: pytest.FixtureRequest) -> None:
    model: Model = request.getfixturevalue(kind)
    line = (model._engine if kind == "shared" else model._held).turn  # type: ignore[attr-defined]
    served: list[str] = []

    def work(name: str) -> None:
        for _ in range(3):
            with model.generate(PROMPT, SamplingParams(max_tokens=2)) as stream:
                next(stream)
                served.append(name)
                list(stream)

    with model.generate(PROMPT, ENDLESS) as stream:
        next(stream)
        threads = []
        for n, name in enumerate("abc"):
            threads.append(started(lambda name=name: work(name)))
            assert eventually(lambda n=n: line.n_waiting == n + 1)
    for thread in threads:
        thread.join()
    assert "".join(served) == "abcabcabc"


def test_one_who_waits_can_be_cancelled_and_a_second_stream_here_is_refused(shared: Model) -> None:
    outcome: list[object] = []
    with shared.generate(PROMPT, ENDLESS) as stream:
        next(stream)
        with pytest.raises(GenerationError, match="already has a stream open"):
            shared.complete(PROMPT, GREEDY)
        other = shared.generate(PROMPT, GREEDY)

        def work() -> None:
            try:
                next(other)
            except Cancelled as exc:
                outcome.append(exc)

        thread = started(work)
        assert eventually(lambda: shared._engine.turn.n_waiting == 1)  # type: ignore[attr-defined]
        other.cancel()
        thread.join()
        assert isinstance(outcome[0], Cancelled)
        assert next(stream).token_ids
    assert shared.complete(PROMPT, GREEDY).finish_reason == "length"
