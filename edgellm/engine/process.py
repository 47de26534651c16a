"""A child process with an engine in it, as its host sees it: calls, their answers, and how it ended.

The child ends when its standard input does, so when the host ends, however that happens. One thread here reads what
the child says, one writes to it and one keeps the end of its stderr, where ggml says why it aborts. Writing has a
thread because the garbage collector may end a stream in the middle of anything, and must not wait for a lock then.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import logging
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Any

from edgellm.engine.protocol import REFILL, Message, error_of, pack, read_frame
from edgellm.errors import EdgeLLMError, EngineCrashed, GenerationError

logger = logging.getLogger("edgellm.engine")

_SWITCH = "--edgellm-engine"
_TAIL = 20  # lines of stderr that are kept
_LINE = 4096  # bytes
_PATIENCE_S = 10.0  # for a child that has closed its pipe to end

_CLOSED = "the model is closed; load it again"

_Frame = tuple[Message, bytearray]


def freeze_support() -> None:
    """Call it first in the main program of a frozen app (PyInstaller, py2app …) that loads models isolated.

    The app's executable is started again for the engine, and this call then runs the engine and exits. Elsewhere it
    does nothing.
    """
    if sys.argv[1:2] == [_SWITCH]:
        from edgellm.engine.child import main

        main()
        sys.exit()


def engine_command() -> list[str]:
    """What starts an engine. It finds modules where the host found them; the host's main isn't imported."""
    if not sys.executable:
        raise GenerationError("there is no Python to start an engine with: set sys.executable, or load not isolated")
    if getattr(sys, "frozen", False):
        return [sys.executable, _SWITCH]
    paths = [path or os.getcwd() for path in sys.path]
    return [
        sys.executable,
        "-c",
        f"import sys; sys.path[:] = {paths!r}; from edgellm.engine.child import main; main()",
    ]


class EngineProcess:
    """One child process. Any thread may call; only the answers, and `close`, are waited for."""

    def __init__(self, name: str) -> None:
        """name: of the model, for messages. GenerationError: no process can be started."""
        self._name = name
        self._host = os.getpid()
        self._ids = itertools.count(1)
        self._inboxes: dict[int, SimpleQueue[_Frame]] = {}
        self._outbox: SimpleQueue[tuple[bytes, bytes] | None] = SimpleQueue()
        self._closed = False
        self._end: EdgeLLMError | None = None
        self._complaint = ""
        self._stderr_tail: deque[str] = deque(maxlen=_TAIL)
        self._popen = _start()
        self._watcher = _thread(self._keep_stderr, "stderr")
        self._writer = _thread(self._write, "writer")
        self._reader = _thread(self._read, "reader")

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def is_alive(self) -> bool:
        return self._end is None and self._popen.poll() is None

    def call(self, do: str, data: bytes = b"", **arguments: Any) -> Call:
        """Have the engine do something. GenerationError: the arguments can't be handed over."""
        call = Call(self, next(self._ids))
        frame = pack({"id": call.id, "do": do, **arguments}, len(data))
        self._inboxes[call.id] = call.inbox
        if self._end is not None:
            call.inbox.put(_ENDED)
        self._outbox.put((frame, data))
        return call

    def tell(self, **message: Any) -> None:
        """About a call that runs."""
        self._outbox.put((pack(message), b""))

    def forget(self, call_id: int) -> None:
        self._inboxes.pop(call_id, None)

    def end(self) -> Exception:
        """How the process ended, as the error for a call that was running."""
        end = self._end or GenerationError(_CLOSED)
        return type(end)(*end.args)  # several callers may raise it

    def kill(self) -> None:
        """Without waiting: for finalizers, on whatever thread they run."""
        self._closed = True
        self._outbox.put(None)
        if os.getpid() == self._host:  # not in a process that was forked: the child is its parent's
            self._popen.kill()

    def close(self) -> None:
        """End it, and wait until nothing of it is left: no process, no pipe, no thread. Twice is fine."""
        self.kill()
        for thread in (self._reader, self._writer, self._watcher):
            if thread is not threading.current_thread():
                thread.join()

    def _read(self) -> None:
        stdout = self._popen.stdout
        assert isinstance(stdout, io.BufferedReader)
        with stdout:
            try:
                while (frame := read_frame(stdout)) is not None:
                    self._deliver(*frame)
            except Exception as exc:  # whatever a child gone wrong may send, it must be the end of the child alone
                self._complaint = f"ended, for it sent {exc or type(exc).__name__}"
                self._popen.kill()
        self._end = self._find_end()
        self._outbox.put(None)
        for inbox in list(self._inboxes.values()):
            inbox.put(_ENDED)

    def _deliver(self, message: Message, data: bytearray) -> None:
        if "log" in message:
            name, level, text = message["log"]
            with contextlib.suppress(Exception):  # a handler of the host's
                logging.getLogger(name if name.startswith("edgellm.") else "edgellm").log(level, "%s", text)
        elif (inbox := self._inboxes.get(message["id"])) is not None:
            inbox.put((message, data))

    def _write(self) -> None:
        stdin = self._popen.stdin
        assert stdin is not None
        with contextlib.suppress(OSError):  # the child is gone, which the reader tells
            while (frame := self._outbox.get()) is not None:
                for part in frame:
                    stdin.write(part)
                stdin.flush()
        with contextlib.suppress(OSError):
            stdin.close()

    def _keep_stderr(self) -> None:
        stderr = self._popen.stderr
        assert stderr is not None
        with stderr:
            for line in iter(lambda: stderr.readline(_LINE), b""):
                if text := line.decode("utf-8", "replace").strip():
                    self._stderr_tail.append(text)
                    logger.debug("%s", text)

    def _find_end(self) -> EdgeLLMError:
        try:
            code = self._popen.wait(_PATIENCE_S)
        except subprocess.TimeoutExpired:  # it lives, without a pipe to be reached by
            self._popen.kill()
            code = self._popen.wait()
        self._watcher.join()
        if self._closed:
            return GenerationError(_CLOSED)
        how = self._complaint or _how_it_ended(code, self._stderr_tail)
        return EngineCrashed(f"the engine of {self._name} {how}; the next call starts it anew")


class Call:
    """Something an engine was asked to do. Used by one thread; `cancel` by any."""

    def __init__(self, process: EngineProcess, call_id: int) -> None:
        self._process, self.id = process, call_id
        self.inbox: SimpleQueue[_Frame] = SimpleQueue()
        self._ended = False
        self._taken = 0

    def frames(self, on_progress: Callable[[float], object] | None = None) -> Iterator[_Frame]:
        """Every "item" and "want", and "done", the last. Raises what was raised in the engine, EngineCrashed."""
        while not self._ended:
            message, data = self.inbox.get()
            if "progress" in message:
                if on_progress is not None and on_progress(message["progress"]) is False:
                    self.cancel()
                continue
            if message is _ENDED[0] or "error" in message:
                self._ended = True
                raise self._process.end() if message is _ENDED[0] else error_of(message["error"])
            self._ended = "done" in message
            yield message, data
            if "item" in message:
                self._taken += 1
                if self._taken % REFILL == 0:
                    self._process.tell(more=self.id)

    def result(self, on_progress: Callable[[float], object] | None = None) -> tuple[Any, bytearray]:
        """What a call without items comes to."""
        try:
            for message, data in self.frames(on_progress):
                if "done" in message:
                    return message["done"], data
        finally:
            self.leave()
        raise AssertionError("frames end with done")

    def answer(self, **message: Any) -> None:
        """To a "want"."""
        self._process.tell(id=self.id, **message)

    def cancel(self) -> None:
        self._process.tell(cancel=self.id)

    def leave(self) -> None:
        """Wait for no more of it: where it hasn't ended, it is cancelled. Twice is fine."""
        self._process.forget(self.id)
        if not self._ended:
            self._ended = True
            self.cancel()


_ENDED: _Frame = ({}, bytearray())  # the process ended


def _start() -> subprocess.Popen[bytes]:
    pipe = subprocess.PIPE
    command, environment = engine_command(), {**os.environ, "GGML_NO_BACKTRACE": "1"}
    try:
        # apart: Ctrl-C in the host's terminal is for the host alone, which decides what it cancels
        if sys.platform == "win32":
            flags = subprocess.CREATE_NEW_PROCESS_GROUP | subprocess.CREATE_NO_WINDOW
            return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, env=environment, creationflags=flags)
        return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, env=environment, process_group=0)
    except OSError as exc:
        raise GenerationError(f"no engine can be started: {exc.strerror or exc}; load the model not isolated") from exc


def _how_it_ended(code: int, stderr: deque[str]) -> str:
    said = next((line for line in reversed(stderr) if "ASSERT" in line or "error" in line.lower()), "")
    if code >= 0 and stderr:
        said = said or stderr[-1]
    because = f" ({said[:200]})" if said else ""
    if code >= 0:
        return f"ended with code {code}{because}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    if name == "SIGKILL":
        return "was killed by SIGKILL, which the system does when memory runs out"
    return f"was killed by {name}{because}"


def _thread(run: Callable[[], None], name: str) -> threading.Thread:
    thread = threading.Thread(target=run, name=f"edgellm-engine-{name}", daemon=True)
    thread.start()
    return thread
