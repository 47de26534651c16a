"""`load(…, isolated=True)`: the same object, with the engine in a child process.

Whatever native code does (an assertion that fails, memory that runs out) ends the child alone. The call that was
running raises EngineCrashed; the next one starts another child, loads again, and a conversation is read again by
itself, for each turn brings all of it. The host imports neither llama_cpp nor numpy, the latter until it asks for an
array.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import weakref
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from edgellm.config import LoadParams, SamplingParams
from edgellm.engine.adapters import Lora
from edgellm.engine.model import Messages, Model, Progress
from edgellm.engine.process import Call, EngineProcess
from edgellm.engine.protocol import response_of, sampling_as_data
from edgellm.engine.stream import Ticket
from edgellm.engine.turn import Turns, check_not_cancelled
from edgellm.generation import GenerationResponse
from edgellm.gguf_header import read_header
from edgellm.speculation.drafts import DraftChoice
from edgellm.text import plain_ids

if TYPE_CHECKING:
    from edgellm.chat.session import Memory
    from edgellm.chat.tool_schema import Tool
    from edgellm.engine.parallel import Answer, Request
    from edgellm.engine.vectors import FloatMatrix

logger = logging.getLogger(__name__)


class IsolatedModel(Model):
    """A model in a process of its own. All is as in `Model`, and any call may raise EngineCrashed.

    Memory and adapters are the child's; a new child gets the adapters of the old one. The engine is up to 32 pieces
    ahead of a stream's consumer. It logs what the logger "edgellm" of this process let through when it was started.
    """

    def __init__(
        self, path: Path, params: LoadParams, *, lora: Sequence[Lora] = (), on_progress: Progress | None = None
    ) -> None:
        # Model's own __init__ loads native code; here it is the child that has a Model
        self.path = path
        self._engine = _Engine(path, params, _adapters(lora))
        self._end_child = weakref.finalize(self, self._engine.kill)
        try:
            self._engine.start(on_progress)
        except BaseException:
            self._engine.close()
            raise
        loaded = self._loaded = self._engine.about
        self.params = LoadParams(**loaded["params"])
        self.metadata = _Metadata(path)
        self.settings = MappingProxyType(loaded["settings"])
        self.n_ctx: int = loaded["n_ctx"]

    def __repr__(self) -> str:
        state = "closed" if self._engine.closed else f"n_ctx={self.n_ctx}"
        return f"<edgellm.Model {self.path.name} isolated {state}>"

    @property
    def engine_pid(self) -> int | None:
        """Of the child process; None where there is none now."""
        return self._engine.pid

    @property
    def n_threads(self) -> int:
        return int(self._loaded["n_threads"])

    @property
    def n_vocab(self) -> int:
        return int(self._loaded["n_vocab"])

    @property
    def bos(self) -> int | None:
        bos: int | None = self._loaded["bos"]
        return bos

    def ends(self, token: int) -> bool:
        return bool(self._engine.ask("ends", token))

    @property
    def context_used(self) -> int:
        return int(self._engine.ask("context_used"))

    def prompt_tokens(self, prompt: str | Sequence[int]) -> list[int]:
        return self._ids("prompt_tokens", prompt if isinstance(prompt, str) else plain_ids(prompt))

    def chat_tokens(self, messages: Messages, *, tools: Sequence[Tool] = (), answer_follows: bool = True) -> list[int]:
        from edgellm.chat.tool_schema import tool_schemas

        schemas = tool_schemas(tools) if tools else []
        return self._ids("chat_tokens", messages, tools=schemas, answer_follows=answer_follows)

    def tokenize(self, text: str, *, special: bool = False) -> list[int]:
        return self._ids("tokenize", text, special=special)

    def _ids(self, do: str, *arguments: Any, **options: Any) -> list[int]:
        ids: list[int] = self._engine.ask(do, *arguments, **options)
        return ids

    def detokenize(self, ids: Sequence[int], *, special: bool = False) -> str:
        return str(self._engine.ask("detokenize", plain_ids(ids), special=special))

    def logits(self, tokens: Sequence[int]) -> FloatMatrix:
        with self._engine.turn_call(Ticket(None), "logits", tokens=plain_ids(tokens)) as call:
            return _matrix(*call.result())

    def embed(self, texts: str | Sequence[str]) -> FloatMatrix:
        texts = texts if isinstance(texts, str) else list(texts)
        with self._engine.turn_call(Ticket(None), "embed", texts=texts) as call:
            return _matrix(*call.result())

    @property
    def lora(self) -> tuple[tuple[Path, float], ...]:
        return tuple((Path(path), scale) for path, scale in self._engine.adapters)

    def set_lora(self, *adapters: Lora) -> None:
        with self._engine.turn_call(Ticket(None), "set_lora", lora=_adapters(adapters)) as call:
            self._engine.adapters = call.result()[0]

    @property
    def memory_maker(self) -> Mapping[str, Any]:
        made_by: Mapping[str, Any] = self._engine.ask("memory_maker")
        return made_by

    def save_memory(self) -> Memory:
        from edgellm.chat.session import Memory

        with self._engine.turn_call(Ticket(None), "save_memory") as call:
            about, data = call.result()
        return Memory(tuple(about["tokens"]), about["made_by"], bytes(data))

    def restore_memory(self, memory: Memory) -> bool:
        about = {"tokens": memory.tokens, "made_by": memory.made_by}
        with self._engine.turn_call(Ticket(None), "restore_memory", memory.data, **about) as call:
            return bool(call.result()[0])

    def close(self) -> None:
        self._engine.close()

    @property
    def _turns(self) -> Turns:
        return self._engine

    def _take_turn_and_generate(
        self,
        ticket: Ticket,
        prompt: list[int],
        params: SamplingParams,
        draft: DraftChoice,
        on_progress: Progress | None,
    ) -> Generator[GenerationResponse, None, None]:
        asked = {
            "prompt": prompt,
            "params": sampling_as_data(params),
            "draft": _draft(draft),
            "progress": on_progress is not None,
        }
        with self._engine.turn_call(ticket, "generate", **asked) as call:
            for message, _ in call.frames(on_progress):
                if "item" in message:
                    yield response_of(message["item"])

    def answer_all(
        self, requests: Iterable[Request], n_parallel: int = 8, *, n_ctx: int | None = None
    ) -> Iterator[Answer]:
        from edgellm.engine.parallel import Answer

        waiting = enumerate(requests)
        keys: dict[int, object] = {}  # stay here; the child knows a request by its number

        def following() -> dict[str, Any] | None:
            for number, request in waiting:
                keys[number] = request.key
                return {"key": number, "prompt": request.prompt, "params": sampling_as_data(request.params)}
            return None

        with self._engine.turn_call(Ticket(None), "answer_all", n_parallel=n_parallel, n_ctx=n_ctx) as call:
            for message, _ in call.frames():
                if "want" in message:
                    call.answer(request=following())
                elif "item" in message:
                    number, text, token_ids, *rest = message["item"]
                    yield Answer(keys.pop(number), text, tuple(token_ids), *rest)


class _Engine(Turns):
    """The child process there is now, if any; it is started where it is needed."""

    def __init__(self, path: Path, params: LoadParams, adapters: list[tuple[str, float]]) -> None:
        super().__init__()
        self.adapters = adapters
        self._path, self._params = Path(os.path.abspath(path)), params  # the child may be started elsewhere
        self._process: EngineProcess | None = None
        self._starting = threading.Lock()
        self._loading: Call | None = None
        self._call: Call | None = None  # that of the turn
        self.about: dict[str, Any] = {}

    @property
    def pid(self) -> int | None:
        process = self._process
        return process.pid if process is not None and process.is_alive else None

    def start(self, on_progress: Progress | None = None) -> EngineProcess:
        """A child with the model in it: the one there is, or a new one. Errors: those of a load, EngineCrashed."""
        with self._starting:
            self.check_open()
            if self._process is not None:
                if self._process.is_alive:
                    return self._process
                self._process.close()
                logger.warning("%s", self._process.end())
                self._process = None
            process = self._process = EngineProcess(self._path.name)
            try:
                self.check_open()  # closed meanwhile
                self._loading = process.call("load", **self._load_arguments(on_progress is not None))
                self.about, _ = self._loading.result(on_progress)
                self.adapters = self.about["lora"]
            except BaseException:
                process.close()
                self._process = None
                raise
            finally:
                self._loading = None
            return process

    def _load_arguments(self, with_progress: bool) -> dict[str, Any]:
        return {
            "path": self._path,
            "params": vars(self._params),
            "lora": self.adapters,
            "progress": with_progress,
            "log_level": logging.getLogger("edgellm").getEffectiveLevel(),
        }

    def ask(self, do: str, *arguments: Any, **options: Any) -> Any:
        """What needs no turn."""
        return self.start().call(do, arguments=arguments, options=options).result()[0]

    @contextlib.contextmanager
    def turn_call(self, ticket: Ticket, do: str, data: bytes = b"", **arguments: Any) -> Iterator[Call]:
        """A call that has the turn, waited for. It is cancelled where the block ends before the call does."""
        with self.turn_of(ticket):
            process = self.start()
            with self._active_lock:
                check_not_cancelled(ticket)
                call = self._call = process.call(do, data, **arguments)
            try:
                yield call
            finally:
                self._call = None
                call.leave()

    def cancel_active(self) -> None:
        """Also a load, whichever call it is for."""
        if loading := self._loading:
            loading.cancel()
        super().cancel_active()

    def _begin(self) -> None:
        self._call = None

    def _interrupt(self) -> None:
        for call in (self._loading, self._call):
            if call is not None:
                call.cancel()

    def kill(self) -> None:
        """End the child, without waiting."""
        self.closed = True
        if process := self._process:
            process.kill()

    def close(self) -> None:
        """End the child and whatever it is doing. Twice is fine."""
        self.closed = True
        if process := self._process:
            process.close()


class _Metadata(Mapping[str, Any]):
    """Of the file, whose header is read when somebody looks: it takes as long as all the rest of a start."""

    def __init__(self, path: Path) -> None:
        self._path = Path(os.path.abspath(path))
        self._read: Mapping[str, Any] | None = None

    def _content(self) -> Mapping[str, Any]:
        if self._read is None:
            self._read = read_header(self._path).metadata
        return self._read

    def __getitem__(self, key: str) -> Any:
        return self._content()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._content())

    def __len__(self) -> int:
        return len(self._content())


def _adapters(adapters: Sequence[Lora]) -> list[tuple[str, float]]:
    pairs = [adapter if isinstance(adapter, tuple) else (adapter, 1.0) for adapter in adapters]
    return [(os.path.abspath(path), scale) for path, scale in pairs]


def _draft(choice: DraftChoice) -> Any:
    """Files by their whole path; the names of kinds and cards stay."""
    if not isinstance(choice, str | Path):
        return [_draft(one) for one in choice]
    is_file = choice not in ("auto", "off", "ngram") and Path(choice).exists()
    return os.path.abspath(choice) if is_file else str(choice)


def _matrix(shape: Sequence[int], data: bytearray) -> FloatMatrix:
    import numpy as np

    return np.frombuffer(data, np.float32).reshape(shape)
