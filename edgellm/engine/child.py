"""The engine's side of an isolated model: `python -m edgellm.engine.child`, or `engine_command` of process.py.

Three threads. The main one reads what the host says, and so a cancel takes effect in the middle of anything; when
there is nothing more to read the host is gone, and so is this process, at once. One worker does all that uses the
model's context, one after the other; another one answers what needs no context, also meanwhile.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, NoReturn

from edgellm.config import LoadParams
from edgellm.engine.protocol import (
    WINDOW,
    Message,
    error_as_data,
    pack,
    read_frame,
    response_as_data,
    sampling_of,
)
from edgellm.errors import Cancelled, EdgeLLMError

if TYPE_CHECKING:
    from edgellm.engine.model import Model

logger = logging.getLogger(__name__)

_AGAIN_S = 0.02  # a cancel that came just before the model began is repeated
_WATCH_S = 2.0  # how often to look whether the host still is the parent
_LOG_PATIENCE_S = 1.0

# what needs no context: methods of the model, and attributes
_METHODS = ("prompt_tokens", "chat_tokens", "tokenize", "detokenize", "ends")
_ATTRIBUTES = ("context_used", "memory_maker")


class HostPipe:
    """To the host, from any thread."""

    def __init__(self, file: io.BufferedWriter) -> None:
        self._file, self._lock = file, threading.Lock()

    def send(self, message: Message, data: bytes | memoryview = b"", *, patience: float = -1) -> None:
        """patience: seconds, after which it is dropped."""
        frame = pack(message, len(data))
        if not self._lock.acquire(timeout=patience):
            return
        try:
            self._file.write(frame)
            self._file.write(data)
            self._file.flush()
        except OSError:
            _leave(0)  # the host is gone
        finally:
            self._lock.release()


class _HostLog(logging.Handler):
    """Log records go to the host's loggers."""

    def __init__(self, pipe: HostPipe) -> None:
        super().__init__()
        self._pipe = pipe

    def emit(self, record: logging.LogRecord) -> None:
        # with patience: the garbage collector may free something that logs in the middle of sending
        self._pipe.send({"log": [record.name, record.levelno, self.format(record)]}, patience=_LOG_PATIENCE_S)


class Job:
    """A call of the host's."""

    def __init__(self, message: Message, data: bytearray, pipe: HostPipe) -> None:
        self.asked, self.data = message, data
        self.id: int = message["id"]
        self.cancelled = False
        self.done = threading.Event()
        self.room = threading.Semaphore(WINDOW)  # for items that the host hasn't consumed
        self.requests: SimpleQueue[Message | None] = SimpleQueue()
        self._pipe = pipe

    def cancel(self) -> None:
        self.cancelled = True
        self.room.release(WINDOW)
        self.requests.put(None)

    def check(self) -> None:
        if self.cancelled:
            raise Cancelled("cancelled before the first token")

    def send_item(self, item: Any) -> None:
        self.room.acquire()
        self._pipe.send({"id": self.id, "item": item})

    def next_request(self) -> Message | None:
        """Of a batch. Cancelled."""
        self._pipe.send({"id": self.id, "want": True})
        request = self.requests.get()
        self.check()
        return request

    @property
    def progress(self) -> Callable[[float], object] | None:
        """For a model's on_progress."""
        return self._report if self.asked["progress"] else None

    def report_load(self, fraction: float) -> bool:
        """As on_progress, for a load, which nothing else can cancel."""
        if self.asked["progress"]:
            self._report(fraction)
        return not self.cancelled

    def _report(self, fraction: float) -> bool:
        self._pipe.send({"id": self.id, "progress": fraction})
        return not self.cancelled


class Engine:
    """Reads calls, does them, and sends what comes of them."""

    def __init__(self, from_host: io.BufferedReader, to_host: HostPipe) -> None:
        self._from_host, self._pipe = from_host, to_host
        self._jobs: dict[int, Job] = {}
        self._turns: SimpleQueue[Job] = SimpleQueue()
        self._asides: SimpleQueue[Job] = SimpleQueue()
        self._switch = threading.Lock()  # a job doesn't begin or end while another is being interrupted
        self._running: Job | None = None
        self._loaded: Model | None = None

    def serve(self) -> NoReturn:
        for queue in (self._turns, self._asides):
            threading.Thread(target=self._work, args=(queue,), daemon=True).start()
        while (frame := read_frame(self._from_host)) is not None:
            self._take(*frame)
        _leave(0)

    def _take(self, message: Message, data: bytearray) -> None:
        if "do" in message:
            job = self._jobs[message["id"]] = Job(message, data, self._pipe)
            is_aside = job.asked["do"] in _METHODS + _ATTRIBUTES
            (self._asides if is_aside else self._turns).put(job)
        elif "more" in message:
            if known := self._jobs.get(message["more"]):
                known.room.release(WINDOW // 2)
        elif "cancel" in message:
            if known := self._jobs.get(message["cancel"]):
                known.cancel()
                threading.Thread(target=self._interrupt, args=(known,), daemon=True).start()
        elif known := self._jobs.get(message["id"]):
            known.requests.put(message["request"])

    def _interrupt(self, job: Job) -> None:
        """Again and again, as long as it runs: a call may not have come to where the model can be cancelled."""
        while True:
            with self._switch:
                if self._running is job and self._loaded is not None:
                    self._loaded.cancel()
            if job.done.wait(_AGAIN_S):
                return

    def _work(self, queue: SimpleQueue[Job]) -> NoReturn:
        try:
            while True:
                self._do(queue.get(), in_turn=queue is self._turns)
        except BaseException:  # nobody would answer the host any more
            traceback.print_exc()
            _leave(1)

    def _do(self, job: Job, *, in_turn: bool) -> None:
        with self._switch:
            if in_turn:
                self._running = job
        data: bytes | memoryview = b""
        try:
            job.check()
            done, data = self._answer(job)
            message = {"id": job.id, "done": done}
        except Exception as exc:
            if not isinstance(exc, EdgeLLMError | ValueError | TypeError):
                logger.exception("%s failed", job.asked["do"])
            message = {"id": job.id, "error": error_as_data(exc)}
        with self._switch:
            if in_turn:
                self._running = None
        del self._jobs[job.id]
        job.done.set()
        self._pipe.send(message, data)

    def _answer(self, job: Job) -> tuple[Any, bytes | memoryview]:
        """(what it comes to, data)."""
        do, asked = job.asked["do"], job.asked
        if do in _METHODS:
            return getattr(self._model, do)(*asked["arguments"], **asked["options"]), b""
        if do in _ATTRIBUTES:
            return getattr(self._model, do), b""
        return _IN_TURN[do](self, job)

    @property
    def _model(self) -> Model:
        assert self._loaded is not None, "the host loads first"
        return self._loaded

    def _load(self, job: Job) -> tuple[Message, bytes]:
        from edgellm.engine.model import load

        asked = job.asked
        logging.getLogger("edgellm").setLevel(asked["log_level"])
        lora = [(Path(path), scale) for path, scale in asked["lora"]]
        model = load(Path(asked["path"]), LoadParams(**asked["params"]), lora=lora, on_progress=job.report_load)
        job.check()
        self._loaded = model
        about = {name: getattr(model, name) for name in ("n_ctx", "n_threads", "n_vocab", "bos")}
        more = {"settings": dict(model.settings), "params": vars(model.params), "lora": _lora_in_use(model)}
        return about | more, b""

    def _generate(self, job: Job) -> tuple[None, bytes]:
        asked = job.asked
        params, draft = sampling_of(asked["params"]), asked["draft"]
        with self._model.generate(asked["prompt"], params, draft=draft, on_progress=job.progress) as stream:
            for response in stream:
                job.send_item(response_as_data(response))
        return None, b""

    def _answer_all(self, job: Job) -> tuple[None, bytes]:
        from edgellm.engine.parallel import Request

        def requests() -> Iterator[Request]:
            while (asked := job.next_request()) is not None:
                yield Request(asked["key"], asked["prompt"], sampling_of(asked["params"]))

        for answer in self._model.answer_all(requests(), job.asked["n_parallel"], n_ctx=job.asked["n_ctx"]):
            job.send_item([getattr(answer, field.name) for field in fields(answer)])
        return None, b""

    def _logits(self, job: Job) -> tuple[list[int], memoryview]:
        return _matrix(self._model.logits(job.asked["tokens"]))

    def _embed(self, job: Job) -> tuple[list[int], memoryview]:
        return _matrix(self._model.embed(job.asked["texts"]))

    def _set_lora(self, job: Job) -> tuple[list[Any], bytes]:
        self._model.set_lora(*[(Path(path), scale) for path, scale in job.asked["lora"]])
        return _lora_in_use(self._model), b""

    def _save_memory(self, job: Job) -> tuple[Message, bytes]:
        memory = self._model.save_memory()
        return {"tokens": memory.tokens, "made_by": memory.made_by}, memory.data

    def _restore_memory(self, job: Job) -> tuple[bool, bytes]:
        from edgellm.chat.session import Memory

        memory = Memory(tuple(job.asked["tokens"]), job.asked["made_by"], bytes(job.data))
        return self._model.restore_memory(memory), b""


_IN_TURN: dict[str, Callable[[Engine, Job], tuple[Any, bytes | memoryview]]] = {
    "load": Engine._load,
    "generate": Engine._generate,
    "answer_all": Engine._answer_all,
    "logits": Engine._logits,
    "embed": Engine._embed,
    "set_lora": Engine._set_lora,
    "save_memory": Engine._save_memory,
    "restore_memory": Engine._restore_memory,
}


def _matrix(array: Any) -> tuple[list[int], memoryview]:
    """(shape, bytes) of a float32 array."""
    import numpy as np

    return list(array.shape), np.ascontiguousarray(array).data.cast("B")


def _lora_in_use(model: Model) -> list[tuple[Path, float]]:
    return list(model.lora)


def _leave(code: int) -> NoReturn:
    """At once, whatever native code is doing: the system frees everything."""
    os._exit(code)


def _leave_with_host(host: int) -> NoReturn:
    """A process that the host forked may keep the pipe open when the host is gone."""
    while os.getppid() == host:
        time.sleep(_WATCH_S)
    _leave(0)


def main() -> None:
    """Serve the host at the other end of stdin and stdout until it is gone. What native code prints goes to stderr."""
    from_host = os.fdopen(os.dup(0), "rb")
    to_host = HostPipe(os.fdopen(os.dup(1), "wb"))
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    os.close(nothing)
    if sys.platform != "win32":
        threading.Thread(target=_leave_with_host, args=(os.getppid(),), daemon=True).start()
    with contextlib.suppress(OSError):  # Linux: where memory runs out, the engine goes before its host
        Path("/proc/self/oom_score_adj").write_text("500", encoding="ascii")
    log = logging.getLogger("edgellm")
    log.propagate = False
    log.addHandler(_HostLog(to_host))
    Engine(from_host, to_host).serve()


if __name__ == "__main__":
    main()
