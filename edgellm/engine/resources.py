"""What a loaded model holds of native memory, whose turn it is to use it, and how all of it is let go."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TypeVar

from edgellm.config import DEFAULT_N_BATCH, LoadParams
from edgellm.engine.adapters import LoadedAdapters, Lora
from edgellm.engine.drafts import Drafts
from edgellm.engine.stream import Ticket
from edgellm.engine.turn import Turns
from edgellm.errors import GenerationError
from edgellm.gguf_header import GGUFHeader
from edgellm.native.context import Context
from edgellm.native.model import NativeModel
from edgellm.native.parallel import ParallelContext

AnyContext = TypeVar("AnyContext", Context, ParallelContext)


class Resources(Turns):
    """Weights, adapters, drafts and contexts. One ticket at a time has the turn; `cancel` and `close` act at once."""

    def __init__(
        self,
        header: GGUFHeader,
        asked: LoadParams,
        params: LoadParams,
        verify_cost: Mapping[int, float] | None,
        on_progress: Callable[[float], object] | None,
    ) -> None:
        super().__init__()
        self._asked, self.params = asked, params  # before and after a tuning had its say
        self.adapters = LoadedAdapters(header)
        self.native = NativeModel(
            header.path, load_mode=params.load_mode, n_gpu_layers=params.n_gpu_layers, on_progress=on_progress
        )
        self.drafts = Drafts(header, self.native, params, verify_cost)
        self._contexts: set[Context | ParallelContext] = set()
        self._closing = threading.Lock()

    def _begin(self) -> None:
        self.drafts.clear_abort()
        for context in tuple(self._contexts):
            context.clear_abort()

    def _interrupt(self) -> None:
        self.drafts.abort()
        for context in tuple(self._contexts):
            context.abort()

    def open_context(self, params: LoadParams, *, n_outputs: int = 1, embeddings: bool = False) -> Context:
        """A context with the adapters in use. Errors: GenerationError (closed, no memory)."""
        return self._opened(lambda: Context(self.native, params, n_outputs=n_outputs, embeddings=embeddings))

    def _opened(self, make: Callable[[], AnyContext]) -> AnyContext:
        with self._closing:
            self.check_open()
            context = make()
            self._contexts.add(context)
            context.use_adapters(self.adapters.in_use)
            return context

    @contextlib.contextmanager
    def _for_one_call(self, make: Callable[[], AnyContext]) -> Iterator[AnyContext]:
        """A context beside the main one, so that the chat in that stays as it is. It holds the turn."""
        with self.turn_of(Ticket(None)):
            context = self._opened(make)
            try:
                yield context
            finally:
                context.close()
                self._contexts.discard(context)

    def side_context(
        self, *, n_ctx: int, n_outputs: int, n_batch: int | None = None, embeddings: bool = False
    ) -> AbstractContextManager[Context]:
        """A context for one call, of one sequence."""
        params = replace(self.params, n_ctx=n_ctx, n_batch=n_batch or self.params.n_batch)
        return self._for_one_call(lambda: Context(self.native, params, n_outputs=n_outputs, embeddings=embeddings))

    def parallel_context(self, n_sequences: int, n_ctx: int) -> AbstractContextManager[ParallelContext]:
        """A context for one call, for n_sequences of n_ctx tokens each, at most what the model was trained with.

        Its attention isn't the tuned one, which is that of one long context: without flash attention SmolLM2 writes a
        tenth more after 2,000 tokens, and eight answers at a time take 1.3 times as long.
        """
        each = min(n_ctx, self.native.n_ctx_train or n_ctx)
        n_batch = max(n_sequences, self.params.n_batch or DEFAULT_N_BATCH)
        asked = self._asked
        params = replace(
            self.params,
            n_ctx=each * n_sequences,
            n_batch=n_batch,
            kv_type=asked.kv_type,
            flash_attn=asked.flash_attn,
        )
        return self._for_one_call(lambda: ParallelContext(self.native, params, n_sequences))

    def set_adapters(self, adapters: Sequence[Lora]) -> None:
        """Put these in use in every context. Errors: AdapterError, with all as it was before."""
        with self.turn_of(Ticket(None)), self._closing:
            self.check_open()
            if self.adapters.choose(self.native, adapters):
                for context in self._contexts:
                    context.use_adapters(self.adapters.in_use)
                self.adapters.free_unused()

    def close(self) -> None:
        """Interrupt what is running and free everything. Twice is fine."""
        with self._closing:
            self.closed = True
            for context in tuple(self._contexts):
                context.close()
            self._contexts.clear()
            self.drafts.close()
            self.native.close()


def in_background(work: Callable[[], object]) -> None:
    """Do what may fail on a thread of its own, which doesn't keep the process alive; nobody hears of a failure."""

    def do() -> None:
        with contextlib.suppress(GenerationError):
            work()

    threading.Thread(target=do, daemon=True).start()
